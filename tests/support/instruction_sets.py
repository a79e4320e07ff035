"""Running tests of native kernels as compiled for another instruction set."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

INSTRUCTION_SETS = ["baseline", "avx2", "avx512", "avx512_bf16"]


def run_tests_with(isa: str, file: str, selection: str) -> None:
    """Run the tests of `file` that `selection` names in a process whose kernels use `isa`.

    Skips where this CPU has no `isa`, or where it is what this process uses anyway.
    """
    environment = {**os.environ, "MOAT_KERNELS_CPU_ISA": isa}
    probe = "import torch, moat_kernels; torch.ops.moat_kernels.cpu_isa()"
    command = [sys.executable, "-c", probe]
    if subprocess.run(command, env=environment, capture_output=True).returncode:
        pytest.skip(f"this CPU has no {isa}")
    if isa == torch.ops.moat_kernels.cpu_isa():
        pytest.skip(f"{isa} is what the other tests run")
    command = [sys.executable, "-m", "pytest", "-q", file, "-k", selection]
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout
