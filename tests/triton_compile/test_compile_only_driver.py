"""The compile gate of support/compile_only_driver.py tells good kernels from bad ones."""

from __future__ import annotations

import pytest
import torch

triton = pytest.importorskip("triton")

import triton.language as tl  # noqa: E402
from support.compile_only_driver import (  # noqa: E402
    AMD,
    NVIDIA,
    Usage,
    amd_vector_spills,
    compile_only,
    nvidia_usage,
)

from moat_kernels.ops.triton_support.launching import launch  # noqa: E402


@triton.jit
def product_kernel(a, b, out, SIZE: tl.constexpr):
    """out = a b, all of it in one program."""
    index = tl.arange(0, SIZE)[:, None] * SIZE + tl.arange(0, SIZE)[None, :]
    tl.store(out + index, tl.dot(tl.load(a + index), tl.load(b + index), input_precision="ieee"))


@triton.jit
def centre_kernel(x, out, SIZE: tl.constexpr):
    """out = x - max(x), holding all of x: large sizes do not fit the registers."""
    index = tl.arange(0, SIZE)
    values = tl.load(x + index)
    tl.store(out + index, values - tl.max(values, 0))


def compile_product(arch: int | str, size: int, dtype: torch.dtype):
    a = torch.empty(size, size, dtype=dtype, device="meta")
    with compile_only(arch) as launches:
        launch(
            *(product_kernel, (1,), a, a, a.float()), reads=(), writes=(), SIZE=size, num_warps=1
        )
    (only,) = launches
    return only


@pytest.mark.parametrize("arch", NVIDIA)
def test_each_target_is_compiled_for(arch: int) -> None:
    usage = nvidia_usage(compile_product(arch, 32, torch.bfloat16), arch)
    assert usage.tensor_core_instructions > 0
    assert usage.stack == 0
    assert usage.warps == 1


def test_another_targets_code_is_refused() -> None:
    with pytest.raises(AssertionError, match="sm_80"):
        nvidia_usage(compile_product(80, 32, torch.bfloat16), 90)


@pytest.mark.parametrize(("size", "spills"), [(1024, False), (16384, True)])
def test_spilling_shows(size: int, spills: bool) -> None:
    x = torch.empty(size, device="meta")
    with compile_only(80) as launches:
        launch(centre_kernel, (1,), x, x, reads=(), writes=(), SIZE=size, num_warps=1)
    assert (nvidia_usage(launches[0], 80).stack > 0) == spills


def test_exact_float32_uses_no_tensor_cores() -> None:
    usage = nvidia_usage(compile_product(90, 16, torch.float32), 90)
    assert usage.tensor_core_instructions == 0


def test_amd() -> None:
    assert amd_vector_spills(compile_product(AMD, 32, torch.bfloat16)) == 0


def test_occupancy_is_limited_by_what_runs_out_first() -> None:
    def occupancy(registers: int, shared_memory: int, warps: int) -> float:
        return Usage(registers, 0, shared_memory, 0, warps).occupancy(80)

    assert occupancy(32, 0, 4) == 1.0
    assert occupancy(128, 0, 4) == 0.25  # 65536 / (128 * 128) = 4 blocks
    assert occupancy(32, 80 * 1024, 4) == 0.125  # 164 / 81 = 2 blocks
    assert occupancy(32, 0, 1) == 0.5  # 32 blocks
