"""The user's own launch table: what `python -m moat_kernels.tune` measured on the GPUs here.

A JSON file with a section for each GPU, Triton and version of this package; only the section of
exactly what runs now is used, because another compiler or kernel has other best launches. What
cannot be used is ignored with one warning that says why.
"""

from __future__ import annotations

import functools
import importlib.metadata
import json
import os
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch

from moat_kernels.ops.triton_support.launch_table import LAUNCH_TABLES, Blocks, Chooser, Problem
from moat_kernels.ops.triton_support.launching import triton_missing

ENVIRONMENT_VARIABLE = "MOAT_KERNELS_LAUNCH_TABLE"
_DTYPES = {str(dtype): dtype for dtype in (torch.float32, torch.bfloat16, torch.float16)}


@dataclass(frozen=True)
class Entry:
    """A measured launch, and the times of it and of the static table's, in microseconds."""

    problem: Problem
    blocks: Blocks
    microseconds: float
    static_microseconds: float


@dataclass(frozen=True)
class Section:
    """What the file holds for a GPU: the launches that are used, and why others are not."""

    launches: Mapping[Problem, Blocks]
    ignored: tuple[str, ...] = ()


def path() -> Path:
    """MOAT_KERNELS_LAUNCH_TABLE, or moat_kernels/launches.json among the user's configuration."""
    named = os.environ.get(ENVIRONMENT_VARIABLE)
    if named:
        return Path(named)
    configuration = os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config"
    return Path(configuration) / "moat_kernels" / "launches.json"


def versions() -> dict[str, str]:
    """What a section must have been measured with."""
    import moat_kernels

    triton = "" if triton_missing() else importlib.metadata.version("triton")
    return {"triton": triton, "moat_kernels": moat_kernels.__version__}


@functools.cache
def chooser(device_name: str) -> Chooser | None:
    """Chooses what was measured on the GPU of this name; None: nothing was. Warns, once."""
    if not device_name:
        return None
    section = read(device_name)
    if section.ignored:
        warnings.warn(
            f"launch table {path()}: {'; '.join(section.ignored)}. Ignored; "
            "`python -m moat_kernels.tune` writes it anew",
            stacklevel=2,
        )
    launches = section.launches
    return launches.get if launches else None


def read(device_name: str) -> Section:
    """What the file holds for a GPU, without warning."""
    file = path()
    if not file.exists():
        named = bool(os.environ.get(ENVIRONMENT_VARIABLE))
        return Section({}, ("there is no such file",) if named else ())
    try:
        sections = _sections(file)
    except (OSError, ValueError) as error:
        return Section({}, (str(error),))
    launches: dict[Problem, Blocks] = {}
    ignored = []
    outdated = ""
    for section in sections:
        if section.get("device") != device_name:
            continue
        measured = {name: section.get(name) for name in versions()}
        if measured != versions():
            outdated = f"measured with {_spell(measured)}, while {_spell(versions())} run"
            continue
        entries = section.get("launches")
        if not isinstance(entries, list):
            ignored.append(f"launches must be a list, got {entries!r}")
            continue
        for entry in entries:
            try:
                problem, blocks = _decode(entry)
                launches[problem] = blocks
            except ValueError as error:
                ignored.append(str(error))
    if outdated and not launches:
        ignored.append(outdated)
    return Section(launches, tuple(ignored))


def write(device_name: str, entries: Iterable[Entry]) -> Path:
    """Add measured launches to the file, in place of older ones of the same problems."""
    file = path()
    try:
        sections = _sections(file) if file.exists() else []
    except ValueError:
        sections = []
    header = {"device": device_name, **versions()}
    kept: dict[str, dict[str, Any]] = {}
    for section in sections:
        if {name: section.get(name) for name in header} == header:
            kept |= {_name(entry): entry for entry in section.get("launches") or []}
    # Sections of other versions on the same GPU would never be used again.
    others = [section for section in sections if section.get("device") != device_name]
    kept |= {_name(encoded): encoded for encoded in map(_encode, entries)}
    merged = [*others, {**header, "launches": list(kept.values())}]
    file.parent.mkdir(parents=True, exist_ok=True)
    # In one step: another process may be reading.
    temporary = file.with_name(f"{file.name}.{os.getpid()}")
    temporary.write_text(json.dumps({"sections": merged}, indent=1) + "\n")
    temporary.replace(file)
    chooser.cache_clear()
    return file


def _sections(file: Path) -> list[dict[str, Any]]:
    """The file's sections; ValueError if that is not what it holds."""
    content = json.loads(file.read_text())
    sections = content.get("sections") if isinstance(content, dict) else None
    if not isinstance(sections, list) or not all(isinstance(each, dict) for each in sections):
        raise ValueError('not a launch table: it has no list of "sections"')
    return sections


def _spell(measured: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {version}" for name, version in measured.items())


def _name(entry: Any) -> str:
    """Equal for entries of the same problem."""
    names = ("op", "kernel", "dtype", "sizes")
    return json.dumps([entry.get(name) for name in names] if isinstance(entry, dict) else entry)


def _encode(entry: Entry) -> dict[str, Any]:
    problem = entry.problem
    return {
        "op": problem.op,
        "kernel": problem.kernel,
        "dtype": str(problem.dtype),
        "sizes": list(problem.sizes),
        "blocks": asdict(entry.blocks),
        "microseconds": entry.microseconds,
        "static_microseconds": entry.static_microseconds,
    }


def _decode(entry: Any) -> tuple[Problem, Blocks]:
    """A problem and its launch; ValueError that names what is wrong."""
    if not isinstance(entry, dict):
        raise ValueError(f"{entry!r} is not a launch")
    op, kernel, dtype, sizes, blocks = (
        entry.get(name) for name in ("op", "kernel", "dtype", "sizes", "blocks")
    )
    if not isinstance(op, str) or op not in LAUNCH_TABLES:
        raise ValueError(f"op must be one of {', '.join(LAUNCH_TABLES)}, got {op!r}")
    table = LAUNCH_TABLES[op]
    example = table.example(str(kernel))
    if example is None:
        raise ValueError(f"{op} has no kernel {kernel!r}")
    if dtype not in _DTYPES:
        raise ValueError(f"{kernel}: dtype must be one of {', '.join(_DTYPES)}, got {dtype!r}")
    if not isinstance(sizes, list) or not all(type(size) is int and size > 0 for size in sizes):
        raise ValueError(f"{kernel}: sizes must be positive integers, got {sizes!r}")
    names = [field.name for field in fields(example)]
    if not isinstance(blocks, dict) or sorted(blocks) != sorted(names):
        raise ValueError(f"{kernel}: blocks must have {', '.join(names)}, got {blocks!r}")
    for name, value in blocks.items():
        if value not in table.choices[name] or isinstance(value, bool):
            allowed = ", ".join(map(str, table.choices[name]))
            raise ValueError(f"{kernel}: {name} must be one of {allowed}, got {value!r}")
    return Problem(op, str(kernel), _DTYPES[dtype], tuple(sizes)), type(example)(**blocks)
