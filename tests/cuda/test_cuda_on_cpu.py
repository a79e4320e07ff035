"""The emulation of CUDA blocks finds the faults that it is there to find."""

from __future__ import annotations

from types import ModuleType

import numpy as np
import pytest
import torch
from support import cuda_on_cpu

pytestmark = pytest.mark.skipif(
    bool(cuda_on_cpu.reason_unavailable()), reason=cuda_on_cpu.reason_unavailable()
)
LINE = np.arange(64, dtype=np.float32)


@pytest.fixture(scope="module", params=["plain", "portable"])
def harness(request: pytest.FixtureRequest) -> ModuleType:
    return cuda_on_cpu.load_harness(request.param)


def line_of_barrier(kernel: str) -> str:
    lines = cuda_on_cpu.HARNESS_KERNELS.read_text().splitlines()
    start = next(i for i, line in enumerate(lines) if kernel in line)
    found = next(i for i in range(start, len(lines)) if "__syncthreads();" in lines[i])
    return f"{cuda_on_cpu.HARNESS_KERNELS.name}:{found + 1}"


@pytest.mark.parametrize("seed", ["0", "1", "2"])
def test_a_barrier_holds_in_every_order_of_threads(
    seed: str, harness: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_ON_CPU_SEED", seed)
    assert np.array_equal(harness.reverse(LINE), LINE[::-1])


def test_a_missing_barrier_is_seen(harness: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_ON_CPU_SEED", "1")
    monkeypatch.setenv("CUDA_ON_CPU_SKIP_BARRIER", line_of_barrier("reverse_kernel"))
    assert not np.array_equal(harness.reverse(LINE), LINE[::-1])


def test_shared_memory_starts_as_nan(harness: ModuleType) -> None:
    assert np.isnan(harness.read_uninitialised()).all()


def test_an_asynchronous_copy_arrives_only_when_waited_for(harness: ModuleType) -> None:
    assert np.array_equal(harness.copy(LINE, True), LINE)
    assert np.isnan(harness.copy(LINE, False)).all()


def test_threads_that_wait_apart_are_a_deadlock(
    harness: ModuleType, capfd: pytest.CaptureFixture
) -> None:
    with pytest.raises(RuntimeError, match="launch failure"):
        harness.wait_apart()
    assert "deadlock" in capfd.readouterr().err


def test_a_shuffle_without_the_whole_warp_fails(
    harness: ModuleType, capfd: pytest.CaptureFixture
) -> None:
    with pytest.raises(RuntimeError, match="launch failure"):
        harness.half_a_warp_shuffles()
    assert "not with all of its 32 threads" in capfd.readouterr().err


def test_tensor_cores_multiply(harness: ModuleType) -> None:
    a, b = (torch.randn(16, 16).bfloat16().float() for _ in range(2))
    result = torch.from_numpy(harness.multiply(a, b))
    torch.testing.assert_close(result, a @ b.t())


@pytest.mark.parametrize("name", ["bfloat16", "float16"])
def test_conversions_are_those_of_torch(name: str, harness: ModuleType) -> None:
    dtype = getattr(torch, name)
    bits = torch.arange(1 << 16, dtype=torch.int32).to(torch.uint16)
    widened = torch.from_numpy(getattr(harness, f"from_{name}")(bits.numpy()))
    assert torch.equal(widened.nan_to_num(9), bits.view(dtype).float().nan_to_num(9))
    # Every stored value, what lies half way to the next one, and a little to both sides.
    middles = (widened[:-1] + widened[1:]) / 2
    values = torch.cat((widened, middles, middles * (1 + 1e-6), middles * (1 - 1e-6)))
    rounded = torch.from_numpy(getattr(harness, f"to_{name}")(values.numpy())).view(dtype)
    assert torch.equal(rounded.float().nan_to_num(9), values.to(dtype).float().nan_to_num(9))


@pytest.mark.parametrize(
    ("code", "report"),
    [
        ("harness.overrun(0)", ""),
        # Into another array of the same object, which only the bounds sanitizer sees.
        ("harness.overrun(1)", "index 64 out of bounds"),
        ("harness.copy(numpy.zeros(62, numpy.float32), True)", "heap-buffer-overflow"),
    ],
    ids=["inside", "beyond a shared array", "beyond global memory"],
)
def test_accesses_out_of_bounds_are_found(code: str, report: str) -> None:
    program = "import numpy; from support import cuda_on_cpu; harness = cuda_on_cpu.load_harness()"
    result = cuda_on_cpu.run_sanitized("-c", f"{program}; {code}")
    assert (result.returncode == 0) == (not report)
    assert report in result.stderr


def test_the_kernels_stay_within_bounds() -> None:
    selection = "of_every_kind or float32 or bfloat16"
    result = cuda_on_cpu.run_sanitized(
        *("-m", "pytest", "-q", "-x", "-s", "tests/cuda/test_cuda_kernels.py", "-k", selection)
    )
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[:4000]
    assert " passed" in result.stdout
