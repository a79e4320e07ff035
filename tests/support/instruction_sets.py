"""Running tests of native kernels as compiled for another instruction set."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

TESTS = Path(__file__).parents[1]
# From the narrowest on: a CPU that has one has those before it.
INSTRUCTION_SETS = ["baseline", "avx2", "avx512", "avx512_bf16"]


def run_marked_tests(isa: str) -> None:
    """Run all tests marked `each_isa`, in a process whose kernels use `isa`.

    Skips where this CPU has no `isa`, or where it is what this process uses anyway.
    """
    mark = "pytest.mark.each_isa"
    files = [str(path) for path in TESTS.rglob("test_*.py") if mark in path.read_text()]
    _run(isa, "-m", "each_isa", *sorted(files))


def run_tests_with(isa: str, file: str, selection: str) -> None:
    """Run the tests of `file` that `selection` names likewise."""
    _run(isa, "-k", selection, file)


def _run(isa: str, *arguments: str) -> None:
    active = torch.ops.moat_kernels.cpu_isa()
    if isa == active:
        pytest.skip(f"{isa} is what the other tests run")
    if INSTRUCTION_SETS.index(isa) > INSTRUCTION_SETS.index(active):
        pytest.skip(f"this CPU has no {isa}, or these tests were told to use {active}")
    environment = {**os.environ, "MOAT_KERNELS_CPU_ISA": isa}
    command = [sys.executable, "-m", "pytest", "-q", *arguments]
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout
