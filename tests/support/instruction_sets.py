"""Running tests of native kernels as compiled for another instruction set."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

# From the narrowest on: a CPU that has one has those before it.
INSTRUCTION_SETS = ["baseline", "avx2", "avx512", "avx512_bf16"]


def run_tests_with(isa: str, file: str, selection: str) -> None:
    """Run the tests of `file` that `selection` names in a process whose kernels use `isa`.

    Skips where this CPU has no `isa`, or where it is what this process uses anyway.
    """
    active = torch.ops.moat_kernels.cpu_isa()
    if isa == active:
        pytest.skip(f"{isa} is what the other tests run")
    if INSTRUCTION_SETS.index(isa) > INSTRUCTION_SETS.index(active):
        pytest.skip(f"this CPU has no {isa}, or these tests were told to use {active}")
    environment = {**os.environ, "MOAT_KERNELS_CPU_ISA": isa}
    command = [sys.executable, "-m", "pytest", "-q", file, "-k", selection]
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout
