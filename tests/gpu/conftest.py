"""Tests of the backend "triton" on a real GPU, at shapes that an interpreter is too slow for.

`pytest -m gpu` runs them where torch can use a GPU, and skips them elsewhere. To try out the small
ones without: `TRITON_INTERPRET=1 pytest tests/gpu -k small`.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from support import cuda_on_cpu

from moat_kernels.extension import reason_cuda_unusable
from moat_kernels.ops.mbconv.triton import passes as depthwise_passes
from moat_kernels.ops.triton_support import replay
from moat_kernels.ops.triton_support.launching import interpreting, triton_missing

# The deterministic algorithms that the tests switch on want it of cuBLAS.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

HERE = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.gpu)


@pytest.fixture(autouse=True)
def exact_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    """cuDNN's convolutions, the stem's among them, would multiply float32 as TF32."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


@pytest.fixture(autouse=True)
def nothing_recorded() -> None:
    """Each test decides anew: it may change what no key of a tape knows of."""
    replay.forget()


@pytest.fixture(autouse=True)
def correct_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    if interpreting():
        from support import triton_interpreter

        triton_interpreter.install(monkeypatch)


@pytest.fixture
def device() -> str:
    if reason := triton_missing():
        pytest.skip(reason)
    if interpreting():
        return "cpu"
    if not torch.cuda.is_available():
        pytest.skip("no GPU that torch can use")
    return "cuda"


@pytest.fixture
def cuda(device: str) -> str:
    """What has no counterpart without a GPU: streams, graphs, devices."""
    if device != "cuda":
        pytest.skip("no GPU")
    return device


@pytest.fixture(params=["never", "always"], ids="CUDA C++ {}".format)
def kernels(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton's kernels alone, and CUDA C++ wherever it covers a call."""
    if request.param == "always" and interpreting() and not cuda_on_cpu.reason_unavailable():
        cuda_on_cpu.load()
    elif request.param == "always" and (reason := reason_cuda_unusable()):
        pytest.skip(f"the CUDA kernels: {reason}")
    monkeypatch.setenv(depthwise_passes.ENVIRONMENT_VARIABLE, request.param)
