"""Mean and covariance of rows, from which the expand convolution's statistics follow."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from moat_kernels.ops.mbconv.triton.launch_table import dot_precision, gemm_blocks, reduction_splits
from moat_kernels.ops.triton_support.launching import launch, tunable


@triton.jit
def covariance_kernel(
    rows_ptr,  # [N, C]
    pilot_ptr,  # [C] float32
    sums_ptr,  # [splits, C] float32
    products_ptr,  # [splits, C, C] float32
    count,
    channels,
    chunk,
    BLOCK_C: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """sums = sum(d), products = d^T d over a chunk of rows, with d = rows - pilot.

    The products are of d rounded to the dtype of rows, the sums of d itself: rounding would leave
    little of a mean near zero. Reads rows once per block of channels (from L2 after the first),
    writes splits x C x C. One program: one tile of the upper triangle, which it also writes
    mirrored.
    """
    first_block, second_block, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    if second_block < first_block:
        return
    first = first_block * BLOCK_C + tl.arange(0, BLOCK_C)
    second = second_block * BLOCK_C + tl.arange(0, BLOCK_C)
    first_pilot = tl.load(pilot_ptr + first, mask=first < channels, other=0.0)
    second_pilot = tl.load(pilot_ptr + second, mask=second < channels, other=0.0)
    products = tl.zeros([BLOCK_C, BLOCK_C], tl.float32)
    sums = tl.zeros([BLOCK_C], tl.float32)
    end = tl.minimum(count, (split + 1) * chunk)
    for start in tl.range(split * chunk, end, BLOCK_ROWS):
        row = start + tl.arange(0, BLOCK_ROWS)
        pointers = rows_ptr + row.to(tl.int64)[:, None] * channels
        mask = (row < end)[:, None]
        a = tl.load(pointers + first[None, :], mask=mask & (first < channels)[None, :], other=0.0)
        b = tl.load(pointers + second[None, :], mask=mask & (second < channels)[None, :], other=0.0)
        dtype = a.dtype
        a = tl.where(mask, a.to(tl.float32) - first_pilot[None, :], 0.0)
        b = tl.where(mask, b.to(tl.float32) - second_pilot[None, :], 0.0)
        sums += tl.sum(a, 0)
        products = tl.dot(tl.trans(a.to(dtype)), b.to(dtype), products, input_precision=PRECISION)
    target = products_ptr + split.to(tl.int64) * channels * channels
    mask = (first < channels)[:, None] & (second < channels)[None, :]
    tl.store(target + first[:, None] * channels + second[None, :], products, mask=mask)
    if first_block == second_block:
        tl.store(sums_ptr + split * channels + first, sums, mask=first < channels)
    else:
        mirrored = target + second[:, None] * channels + first[None, :]
        tl.store(mirrored, tl.trans(products), mask=tl.trans(mask))


@tunable
def covariance(rows: Tensor, pilot: Tensor) -> tuple[Tensor, Tensor]:
    """(mean [C], biased covariance [C, C]) in float64 of rows [N, C] - pilot [C]."""
    count, channels = rows.shape
    blocks = gemm_blocks("covariance", rows, channels, channels, count)
    tiles = triton.cdiv(channels, blocks.rows)
    splits, chunk = reduction_splits(count, tiles * (tiles + 1) // 2, blocks.depth)
    sums = rows.new_empty((splits, channels), dtype=torch.float32)
    products = rows.new_empty((splits, channels, channels), dtype=torch.float32)
    launch(
        covariance_kernel,
        (tiles, tiles, splits),
        *(rows, pilot, sums, products, count, channels, chunk),
        BLOCK_C=blocks.rows,
        BLOCK_ROWS=blocks.depth,
        PRECISION=dot_precision(rows),
        num_warps=blocks.warps,
        num_stages=blocks.stages,
        reads=(rows, pilot),
        writes=(sums, products),
        flops=count * channels * (channels + 1),
    )
    mean = sums.sum(0, dtype=torch.float64) / count
    return mean, torch.addr(products.sum(0, dtype=torch.float64) / count, mean, mean, alpha=-1)
