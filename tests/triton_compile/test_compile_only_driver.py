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
    compile_launches,
    nvidia_usage,
    record_launches,
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
    with record_launches(arch) as launches:
        launch(
            *(product_kernel, (1,), a, a, a.float()), reads=(), writes=(), SIZE=size, num_warps=1
        )
    (compiled,) = compile_launches(launches, arch)
    return compiled


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
    with record_launches(80) as launches:
        launch(centre_kernel, (1,), x, x, reads=(), writes=(), SIZE=size, num_warps=1)
    (compiled,) = compile_launches(launches, 80)
    assert (nvidia_usage(compiled, 80).stack > 0) == spills


def test_launches_are_told_apart_by_what_changes_their_code() -> None:
    x, odd = torch.empty(64, device="meta"), torch.empty(65, device="meta")[1:]
    with record_launches(80) as launches:
        for tensor, size, warps in [(x, 64, 1), (x, 64, 1), (odd, 64, 1), (x, 32, 1), (x, 64, 2)]:
            launch(
                *(centre_kernel, (1,), tensor, x), reads=(), writes=(), SIZE=size, num_warps=warps
            )
    assert [one.key for one in launches] == [
        ("centre_kernel", "SIZE=64 num_warps=1", "x:*fp32/16 out:*fp32/16"),
        ("centre_kernel", "SIZE=64 num_warps=1", "x:*fp32 out:*fp32/16"),
        ("centre_kernel", "SIZE=32 num_warps=1", "x:*fp32/16 out:*fp32/16"),
        ("centre_kernel", "SIZE=64 num_warps=2", "x:*fp32/16 out:*fp32/16"),
    ]
    # Different specialisations by Triton's own count: one machine code for each.
    assert len({kernel.hash for kernel in compile_launches(launches, 80)}) == len(launches)


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
