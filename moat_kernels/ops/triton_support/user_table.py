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
import reprlib
import tempfile
import threading
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch

from moat_kernels.ops.triton_support.launch_table import LAUNCH_TABLES, Blocks, Chooser, Problem
from moat_kernels.ops.triton_support.launching import triton_missing

ENVIRONMENT_VARIABLE = "MOAT_KERNELS_LAUNCH_TABLE"
_IN_CONFIGURATION = Path("moat_kernels", "launches.json")
_TOLD = 3  # reasons in a warning; a file may hold thousands
_TOO_DEEP = "not a launch table: it is nested too deeply"
_warned: set[str] = set()
_warning = threading.Lock()  # of _warned
_DTYPES = {str(dtype): dtype for dtype in (torch.float32, torch.bfloat16, torch.float16)}


class LaunchTableError(Exception):
    """The file cannot be read or written; the text says why."""


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
    """MOAT_KERNELS_LAUNCH_TABLE, or moat_kernels/launches.json among the user's configuration.

    LaunchTableError if there is no such place: the user has no home folder.
    """
    named = os.environ.get(ENVIRONMENT_VARIABLE)
    if named:
        return Path(named)
    try:
        configuration = os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config"
    except RuntimeError as error:  # no HOME, and a user id that the system does not know
        raise LaunchTableError(f"no home folder ({error})") from error
    return Path(configuration) / _IN_CONFIGURATION


def location() -> str:
    """Where the file is looked for, printable, also where `path` raises."""
    try:
        return os.fsencode(path()).decode(errors="backslashreplace")
    except LaunchTableError:
        return f"~/.config/{_IN_CONFIGURATION.as_posix()}"


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
        _warn_once(
            f"launch table {location()}: {'; '.join(section.ignored)}. Ignored; "
            "`python -m moat_kernels.tune` measures anew"
        )
    launches = section.launches
    return launches.get if launches else None


def _warn_once(text: str) -> None:
    """Once for all GPUs and threads that find the same."""
    with _warning:
        if text in _warned:
            return
        _warned.add(text)
    warnings.warn(text, stacklevel=3)


def read(device_name: str) -> Section:
    """What the file holds for a GPU, without warning or raising."""
    try:
        sections = _sections(path())
    except LaunchTableError as error:
        return Section({}, (str(error),))
    if sections is None:
        named = bool(os.environ.get(ENVIRONMENT_VARIABLE))
        return Section({}, ("there is no such file",) if named else ())
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
            ignored.append(f"launches must be a list, got {reprlib.repr(entries)}")
            continue
        for entry in entries:
            try:
                problem, blocks = _decode(entry)
            except ValueError as error:
                ignored.append(str(error))
                continue
            if problem in launches:
                sizes = reprlib.repr(list(problem.sizes))
                ignored.append(f"{problem.kernel}: sizes {sizes} are there twice, the first counts")
            else:
                launches[problem] = blocks
    if outdated and not launches:
        ignored.append(outdated)
    if len(ignored) > _TOLD:
        ignored[_TOLD:] = [f"{len(ignored) - _TOLD} more like these"]
    return Section(launches, tuple(ignored))


def write(device_name: str, entries: Iterable[Entry]) -> Path:
    """Add measured launches to the file, in place of older ones of the same problems.

    LaunchTableError if it cannot be written, or is something else than a launch table: then it
    stays as it was.
    """
    file = path()
    header = {"device": device_name, **versions()}
    kept: dict[Problem, dict[str, Any]] = {}
    others = []
    for section in _sections(file) or []:
        if section.get("device") != device_name:
            others.append(section)
        # Sections of other versions on the same GPU would never be used again.
        elif {name: section.get(name) for name in header} == header:
            for problem, entry in _usable(section.get("launches")):
                kept.setdefault(problem, entry)
    kept |= {entry.problem: _encode(entry) for entry in entries}
    merged = [*others, {**header, "launches": list(kept.values())}]
    with _replacement(file) as temporary:
        temporary.write_text(json.dumps({"sections": merged}, indent=1) + "\n", encoding="utf-8")
    chooser.cache_clear()
    return file


def check_writable() -> None:
    """Find before measuring that `write` would fail: LaunchTableError."""
    file = path()
    _sections(file)
    with _write_errors(), tempfile.TemporaryFile(dir=_folder(file)):
        pass


@contextmanager
def _replacement(file: Path) -> Iterator[Path]:
    """A file to write, which takes the other's place in one step: another process may be reading.

    What fails leaves nothing behind.
    """
    target = Path(os.path.realpath(file))  # a link stays one
    with _write_errors():
        temporary = _folder(file) / f"{target.name}.{os.getpid()}"
        try:
            yield temporary
            temporary.replace(target)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise


def _folder(file: Path) -> Path:
    folder = Path(os.path.realpath(file)).parent
    folder.mkdir(parents=True, exist_ok=True)
    return folder


@contextmanager
def _write_errors() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise LaunchTableError(f"cannot be written: {error}") from error


def _sections(file: Path) -> list[dict[str, Any]] | None:
    """The file's sections; None: there is no file; LaunchTableError: it holds something else."""
    try:
        # Before it is opened: a pipe would keep us waiting.
        if file.exists() and not file.is_file():
            raise LaunchTableError("it is no file")
        content = json.loads(file.read_bytes(), object_pairs_hook=_without_duplicates)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError) as error:
        raise LaunchTableError(str(error)) from error
    except RecursionError as error:
        raise LaunchTableError(_TOO_DEEP) from error
    if not _is_flat(content):
        raise LaunchTableError(_TOO_DEEP)
    sections = content.get("sections") if isinstance(content, dict) else None
    if not isinstance(sections, list) or not all(isinstance(each, dict) for each in sections):
        raise LaunchTableError('not a launch table: it has no list of "sections"')
    return sections


def _is_flat(value: Any, levels: int = 16) -> bool:
    """Whether reading and writing can do with it, however deep in calls they happen."""
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return not parts or (levels > 0 and all(_is_flat(part, levels - 1) for part in parts))


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in pairs:
        if name in found:
            raise ValueError(f"{reprlib.repr(name)} is there twice in one object")
        found[name] = value
    return found


def _usable(entries: Any) -> Iterator[tuple[Problem, dict[str, Any]]]:
    """The entries that `read` takes, as they are in the file."""
    for entry in entries if isinstance(entries, list) else []:
        with suppress(ValueError):
            yield _decode(entry)[0], entry


def _spell(measured: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {reprlib.repr(version)}" for name, version in measured.items())


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
        raise ValueError(f"{reprlib.repr(entry)} is not a launch")
    op, kernel, dtype, sizes, blocks = (
        entry.get(name) for name in ("op", "kernel", "dtype", "sizes", "blocks")
    )
    if not isinstance(op, str) or op not in LAUNCH_TABLES:
        raise ValueError(f"op must be one of {', '.join(LAUNCH_TABLES)}, got {reprlib.repr(op)}")
    table = LAUNCH_TABLES[op]
    if not isinstance(kernel, str) or (example := table.example(kernel)) is None:
        raise ValueError(f"{op} has no kernel {reprlib.repr(kernel)}")
    if not isinstance(dtype, str) or dtype not in _DTYPES:
        raise ValueError(
            f"{kernel}: dtype must be one of {', '.join(_DTYPES)}, got {reprlib.repr(dtype)}"
        )
    if not isinstance(sizes, list) or not all(map(_is_power_of_2, sizes)):
        raise ValueError(f"{kernel}: sizes must be powers of 2, got {reprlib.repr(sizes)}")
    names = [field.name for field in fields(example)]
    if not isinstance(blocks, dict) or sorted(blocks) != sorted(names):
        raise ValueError(
            f"{kernel}: blocks must have {', '.join(names)}, got {reprlib.repr(blocks)}"
        )
    for name, value in blocks.items():
        # By type too: True and 4.0 equal numbers that are allowed.
        if not any(type(value) is type(each) and value == each for each in table.choices[name]):
            allowed = ", ".join(map(str, table.choices[name]))
            raise ValueError(
                f"{kernel}: {name} must be one of {allowed}, got {reprlib.repr(value)}"
            )
    return Problem(op, kernel, _DTYPES[dtype], tuple(sizes)), type(example)(**blocks)


def _is_power_of_2(size: Any) -> bool:
    return type(size) is int and size > 0 and size & (size - 1) == 0
