"""The expand 1x1 convolution on folded weights."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from moat_kernels.ops.mbconv.triton.kernels.affine import exist
from moat_kernels.ops.mbconv.triton.kernels.moments import (
    Moments,
    Tiles,
    store_tile_moments,
)
from moat_kernels.ops.mbconv.triton.launch_table import dot_precision, gemm_blocks
from moat_kernels.ops.triton_support.activations import activate
from moat_kernels.ops.triton_support.launching import launch, tunable


@triton.jit
def expand_kernel(
    rows_ptr,  # [N, C]
    weight_ptr,  # [E, C]
    bias_ptr,  # [E] float32
    output_ptr,  # [N, E]
    moments_ptr,  # [row blocks, 2, E] float32, or None
    count,
    channels,
    wide,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_WIDE: tl.constexpr,
    BLOCK_C: tl.constexpr,
    WHOLE_ROWS: tl.constexpr,
    WHOLE_WIDE: tl.constexpr,
    ACTIVATION: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """output = act(rows weight^T + bias); moments of each block of rows, if asked for.

    Reads rows (C-wide) and writes output (E-wide) once. Blocks of the same rows run side by side,
    so that all but the first find the rows in L2.
    """
    wide_blocks = tl.cdiv(wide, BLOCK_WIDE)
    row_block = tl.program_id(0) // wide_blocks
    row = row_block * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    column = (tl.program_id(0) % wide_blocks) * BLOCK_WIDE + tl.arange(0, BLOCK_WIDE)
    valid_row, valid_column = exist(row, count, WHOLE_ROWS), exist(column, wide, WHOLE_WIDE)
    row_offset = row.to(tl.int64)
    products = tl.zeros([BLOCK_ROWS, BLOCK_WIDE], tl.float32)
    for start in tl.range(0, channels, BLOCK_C):
        channel = start + tl.arange(0, BLOCK_C)
        a = tl.load(
            rows_ptr + row_offset[:, None] * channels + channel[None, :],
            mask=valid_row[:, None] & (channel < channels)[None, :],
            other=0.0,
        )
        b = tl.load(
            weight_ptr + column[None, :] * channels + channel[:, None],
            mask=valid_column[None, :] & (channel < channels)[:, None],
            other=0.0,
        )
        products = tl.dot(a, b, products, input_precision=PRECISION)
    bias = tl.load(bias_ptr + column, mask=valid_column, other=0.0)
    value = activate(products + bias[None, :], ACTIVATION)
    tl.store(
        output_ptr + row_offset[:, None] * wide + column[None, :],
        value.to(output_ptr.dtype.element_ty),
        mask=valid_row[:, None] & valid_column[None, :],
    )
    if moments_ptr is not None:
        size = tl.minimum(BLOCK_ROWS, count - row_block * BLOCK_ROWS)
        store_tile_moments(moments_ptr, row_block, column, wide, value, valid_row[:, None], size)


@tunable
def expand(
    rows: Tensor, weight: Tensor, bias: Tensor, activation: str, measure: bool
) -> tuple[Tensor, Moments | None]:
    """act(rows [N, C] weight [E, C]^T + bias [E]) in the dtype of rows; to measure, its moments."""
    (count, channels), wide = rows.shape, weight.shape[0]
    blocks = gemm_blocks("expand", rows, count, wide, channels)
    tiles = Tiles(count, 1, blocks.rows, 1)
    row_blocks = tiles.of_images(1)
    output = rows.new_empty((count, wide))
    moments = rows.new_empty((row_blocks, 2, wide), dtype=torch.float32) if measure else None
    launch(
        expand_kernel,
        (row_blocks * -(-wide // blocks.columns),),
        *(rows, weight, bias, output, moments, count, channels, wide),
        BLOCK_ROWS=blocks.rows,
        BLOCK_WIDE=blocks.columns,
        BLOCK_C=blocks.depth,
        WHOLE_ROWS=count % blocks.rows == 0,
        WHOLE_WIDE=wide % blocks.columns == 0,
        ACTIVATION=activation,
        PRECISION=dot_precision(rows),
        num_warps=blocks.warps,
        num_stages=blocks.stages,
        reads=(rows, weight, bias),
        writes=(output, moments),
        flops=2 * count * wide * channels,
    )
    return output, None if moments is None else Moments(moments, tiles, count)
