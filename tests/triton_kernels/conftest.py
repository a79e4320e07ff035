"""Triton kernels run on a GPU if there is one, else on the CPU by Triton's interpreter.

Triton decides when it is imported, so these tests have a process of their own: `pytest` runs them
by tests/test_triton.py; `pytest tests/triton_kernels` by itself works too.
"""

from __future__ import annotations

import os
import sys

import pytest
import torch

if "TRITON_INTERPRET" not in os.environ and not torch.cuda.is_available():
    if "triton" in sys.modules:
        raise pytest.UsageError("tests/triton_kernels needs a process of its own")
    os.environ["TRITON_INTERPRET"] = "1"
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

# The deterministic algorithms that the tests switch on want it of cuBLAS.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")


@pytest.fixture
def device() -> str:
    """Where the kernels under test run."""
    return "cpu" if INTERPRETED else "cuda"


@pytest.fixture(autouse=True)
def nothing_recorded() -> None:
    """Each test decides anew: it may change what no key of a tape knows of."""
    from moat_kernels.ops.triton_support import replay

    replay.forget()


@pytest.fixture(autouse=True)
def correct_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    if INTERPRETED:
        from support import triton_interpreter

        triton_interpreter.install(monkeypatch)
