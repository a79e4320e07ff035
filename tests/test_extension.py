"""Loading the native kernels, and the choice of the instruction set at run time."""

from __future__ import annotations

import importlib
import importlib.util
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from support.instruction_sets import INSTRUCTION_SETS
from support.native import needs_extension

from moat_kernels import extension
from moat_kernels.extension import (
    ExtensionStatus,
    build_record,
    load_extension,
    reason_cuda_unusable,
)
from moat_kernels.source_hashes import source_hashes

ROOT = Path(__file__).parent.parent
# A line for each argument: what a process says that has it in its environment.
ASK_FOR_ISA = """
import os, sys
import torch

for name in sys.argv[1:]:
    os.environ["MOAT_KERNELS_CPU_ISA"] = name
    if os.fork() == 0:  # with torch, which takes seconds to import, and not yet with the library
        try:
            from moat_kernels.extension import load_extension
            assert load_extension().usable
            answer = torch.ops.moat_kernels.cpu_isa()
        except Exception as error:
            answer = error
        print(name, answer, sep=": ", flush=True)
        os._exit(0)
    os.wait()
"""


@pytest.fixture
def fresh_load() -> Iterator[None]:
    """Lets a test load again, which a process otherwise does once."""
    load_extension.cache_clear()
    yield
    load_extension.cache_clear()


@pytest.fixture(scope="module")
def answers() -> dict[str, str]:
    """By the value of MOAT_KERNELS_CPU_ISA: the instruction set in use, or the error."""
    names = ("", *INSTRUCTION_SETS, "avx3")
    output = subprocess.check_output([sys.executable, "-c", ASK_FOR_ISA, *names], text=True)
    return dict(line.split(": ", 1) for line in output.splitlines() if ": " in line)


@needs_extension
def test_the_widest_instruction_set_of_this_cpu_is_chosen(answers: dict[str, str]) -> None:
    by_torch = {"AVX512": "avx512", "AVX2": "avx2"}
    expected = by_torch.get(torch.backends.cpu.get_cpu_capability(), "baseline")
    if torch.cpu._is_avx512_bf16_supported() and torch.cpu._is_vnni_supported():
        # The CPU alone does not say that Linux allows tiles.
        tiles = torch.cpu._is_amx_tile_supported() and torch.cpu._init_amx()
        expected = "amx" if tiles else "avx512_bf16"
    assert answers[""] == expected


@needs_extension
@pytest.mark.parametrize("name", INSTRUCTION_SETS)
def test_the_environment_chooses_an_instruction_set_that_the_cpu_has(
    name: str, answers: dict[str, str]
) -> None:
    if INSTRUCTION_SETS.index(name) <= INSTRUCTION_SETS.index(answers[""]):
        # The kernel reports the flags that it was compiled with, not what was asked for.
        assert answers[name] == name
    else:
        expected = f"MOAT_KERNELS_CPU_ISA='{name}' names an instruction set that this CPU does not"
        assert expected in answers[name]


@needs_extension
def test_an_unknown_instruction_set_is_refused(answers: dict[str, str]) -> None:
    message = (
        "MOAT_KERNELS_CPU_ISA='avx3' is unknown; "
        "it may be baseline, avx2, avx512, avx512_bf16 or amx"
    )
    assert message in answers["avx3"]


@needs_extension
def test_the_build_recorded_what_it_used() -> None:
    record = build_record()
    assert record["reason_not_built"] == ""
    assert record["compiler"]
    assert torch.ops.moat_kernels.cpu_isa() in record["instruction_sets"]
    assert record["sources"] == source_hashes(ROOT)
    kinds = {Path(path).suffix for path in record["sources"]}
    assert kinds == {".cpp", ".h", ".cu", ".cuh"}


def test_a_package_without_the_library_says_why(
    fresh_load: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(extension, "build_record", lambda: {"reason_not_built": "no compiler"})
    assert load_extension().reason == "not built: no compiler"
    assert not load_extension().usable


def test_a_library_that_does_not_load_passes_on_the_loaders_message(
    fresh_load: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(name: str) -> None:
        raise ImportError(f"{name}: undefined symbol: torch_parallel_for")

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    monkeypatch.setattr(extension, "_changed_sources", list)
    monkeypatch.setattr(importlib, "import_module", fail)
    reason = load_extension().reason
    assert reason == "failed to load: moat_kernels._C: undefined symbol: torch_parallel_for"


def test_an_old_torch_is_named_before_the_library_is_tried(
    fresh_load: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "__version__", "2.9.1+cpu")
    assert load_extension().reason == "torch 2.9.1+cpu is installed; at least 2.11 is needed"


BUILT_WITH_CUDA = {"cuda_architectures": [80, 90]}


@pytest.mark.parametrize(
    ("record", "cuda_of_torch", "gpu", "reason"),
    [
        ({}, "13.0", True, "not built: an older build"),
        ({"reason_cuda_not_built": "nvcc not found"}, "13.0", True, "not built: nvcc not found"),
        (BUILT_WITH_CUDA, None, False, f"torch {torch.__version__} is built without CUDA"),
        (BUILT_WITH_CUDA, "13.0", False, "torch finds no GPU"),
        (BUILT_WITH_CUDA, "12.8", True, "the driver is too old"),
    ],
)
def test_cuda_kernels_are_unusable_for_a_reason(
    record: dict[str, object],
    cuda_of_torch: str | None,
    gpu: bool,
    reason: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(extension, "load_extension", lambda: ExtensionStatus(True))
    monkeypatch.setattr(extension, "build_record", lambda: record)
    monkeypatch.setattr(torch.version, "cuda", cuda_of_torch)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    problem = "the driver is too old"
    monkeypatch.setattr(torch.ops.moat_kernels, "cuda_problem", lambda: problem, raising=False)
    assert reason_cuda_unusable.__wrapped__() == reason


@needs_extension
@pytest.mark.skipif(
    "cuda_architectures" not in build_record() or torch.version.cuda is not None,
    reason="about a library with CUDA kernels beside a torch without CUDA",
)
def test_a_library_with_cuda_kernels_serves_a_torch_without_cuda() -> None:
    name = "moat_kernels::cuda_depthwise_forward"
    assert torch._C._dispatch_has_kernel_for_dispatch_key(name, "CUDA")
    # Of CUDA's runtime in the library: no driver, or no GPU that it can use.
    assert torch.cuda.is_available() or torch.ops.moat_kernels.cuda_problem()
    assert torch.ops.moat_kernels.cpu_isa() in INSTRUCTION_SETS


@pytest.fixture
def checkout(fresh_load: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the sources, which the library is taken to lie beside."""
    for name in ("csrc", "pyproject.toml"):
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, tmp_path / name)
    monkeypatch.setattr(extension, "_ROOT", tmp_path)
    return tmp_path


def add_an_op(checkout: Path) -> None:
    (schemas,) = checkout.rglob("registration.cpp")
    first = "  define("
    text = schemas.read_text()
    assert first in text
    schemas.write_text(text.replace(first, f'{first}"cpu_of_tomorrow() -> int");\n{first}', 1))


def change_a_schema(checkout: Path) -> None:
    (schemas,) = checkout.rglob("registration.cpp")
    text = schemas.read_text()
    assert ") -> " in text
    schemas.write_text(text.replace(") -> ", ", int of_tomorrow) -> ", 1))


def add_a_header(checkout: Path) -> None:
    (checkout / "csrc" / "cpu" / "a.h").write_text("#pragma once\n")


def remove_two_files(checkout: Path) -> None:
    for path in sorted(checkout.glob("csrc/**/*.h"))[:2]:
        path.unlink()


@needs_extension
@pytest.mark.parametrize(
    ("change", "changed"),
    [
        (add_an_op, r"csrc/[\w/]*registration\.cpp"),
        (change_a_schema, r"csrc/[\w/]*registration\.cpp"),
        (add_a_header, r"csrc/cpu/a\.h"),
        (remove_two_files, r"csrc/[\w/]+\.h and 1 more"),
    ],
)
def test_a_library_of_other_sources_is_refused(
    change: Callable[[Path], None], changed: str, checkout: Path
) -> None:
    assert load_extension().usable
    load_extension.cache_clear()
    change(checkout)
    assert not load_extension().usable
    expected = rf"{extension.OUTDATED} \({changed}\): run `python setup.py build_ext --inplace`"
    assert re.fullmatch(expected, load_extension().reason)


@needs_extension
def test_a_library_whose_sources_nobody_recorded_is_refused(
    checkout: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(extension, "build_record", dict)
    assert load_extension().reason.startswith(extension.OUTDATED)


@needs_extension
def test_an_installed_library_needs_no_sources_beside_it(
    checkout: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(extension, "build_record", dict)
    (checkout / "pyproject.toml").unlink()
    assert load_extension().usable
