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
INSTRUCTION_SETS = ["baseline", "avx2", "avx512", "avx512_bf16", "amx"]


def run_marked_tests(isa: str) -> None:
    """Run all tests marked `each_isa`, in a process whose kernels use `isa`.

    Skips where this CPU has no `isa`, or where it is what this process uses anyway.
    """
    active = torch.ops.moat_kernels.cpu_isa()
    if isa == active:
        pytest.skip(f"{isa} is what the other tests run")
    if INSTRUCTION_SETS.index(isa) > INSTRUCTION_SETS.index(active):
        pytest.skip(f"this CPU has no {isa}, or these tests were told to use {active}")
    mark = "pytest.mark.each_isa"
    files = [str(path) for path in TESTS.rglob("test_*.py") if mark in path.read_text()]
    environment = {**os.environ, "MOAT_KERNELS_CPU_ISA": isa}
    command = [sys.executable, "-m", "pytest", "-q", "-m", "each_isa", *sorted(files)]
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout
