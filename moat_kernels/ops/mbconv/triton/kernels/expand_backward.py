"""Backward of the expand convolution on folded weights, and of what the folds hide.

dz1 = dy1 where the norm's statistics come from the covariance of the rows; else, with statistics
measured on z1, dz1 = a dy1 + b z1 + c.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from moat_kernels.ops.mbconv.triton.launch_table import dot_precision, gemm_blocks, reduction_splits
from moat_kernels.ops.triton_support.launching import launch, tunable


@triton.jit
def _load_grad(grad_ptr, z_ptr, factors_ptr, row, column, wide, mask, valid_column):
    """dz1 of a tile, in the dtype of dy1, zeros outside."""
    offset = row.to(tl.int64)[:, None] * wide + column[None, :]
    grad = tl.load(grad_ptr + offset, mask=mask, other=0.0)
    if z_ptr is not None:
        a = tl.load(factors_ptr + column, mask=valid_column, other=0.0)
        b = tl.load(factors_ptr + wide + column, mask=valid_column, other=0.0)
        c = tl.load(factors_ptr + 2 * wide + column, mask=valid_column, other=0.0)
        z = tl.load(z_ptr + offset, mask=mask, other=0.0).to(tl.float32)
        grad_z = a[None, :] * grad.to(tl.float32) + b[None, :] * z + c[None, :]
        return tl.where(mask, grad_z, 0.0).to(grad.dtype)
    return grad


@triton.jit
def expand_weight_kernel(
    grad_ptr,  # [N, E]: dy1
    z_ptr,  # [N, E]: z1, or None
    factors_ptr,  # [3, E] float32: a, b, c, given with z1
    rows_ptr,  # [N, C]
    centre_ptr,  # [C] float32
    partial_ptr,  # [splits, E, C] float32
    count,
    wide,
    channels,
    chunk,
    BLOCK_WIDE: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """partial = dz1^T (rows - centre) over a chunk of rows.

    Reads dy1 (and z1 if given), E-wide, and rows, C-wide; tiles of the same rows run side by side,
    so that all but the first find them in L2.
    """
    channel_blocks = tl.cdiv(channels, BLOCK_C)
    column = (tl.program_id(0) // channel_blocks) * BLOCK_WIDE + tl.arange(0, BLOCK_WIDE)
    channel = (tl.program_id(0) % channel_blocks) * BLOCK_C + tl.arange(0, BLOCK_C)
    split = tl.program_id(1)
    valid_column, valid_channel = column < wide, channel < channels
    centre = tl.load(centre_ptr + channel, mask=valid_channel, other=0.0)
    products = tl.zeros([BLOCK_WIDE, BLOCK_C], tl.float32)
    end = tl.minimum(count, (split + 1) * chunk)
    for start in tl.range(split * chunk, end, BLOCK_ROWS):
        row = start + tl.arange(0, BLOCK_ROWS)
        valid_row = (row < end)[:, None]
        mask = valid_row & valid_column[None, :]
        grad = _load_grad(grad_ptr, z_ptr, factors_ptr, row, column, wide, mask, valid_column)
        rows = tl.load(
            rows_ptr + row.to(tl.int64)[:, None] * channels + channel[None, :],
            mask=valid_row & valid_channel[None, :],
            other=0.0,
        )
        centred = tl.where(valid_row, rows.to(tl.float32) - centre[None, :], 0.0).to(rows.dtype)
        products = tl.dot(tl.trans(grad), centred, products, input_precision=PRECISION)
    tl.store(
        partial_ptr
        + split.to(tl.int64) * wide * channels
        + column[:, None] * channels
        + channel[None, :],
        products,
        mask=valid_column[:, None] & valid_channel[None, :],
    )


@tunable
def expand_weight(
    grad: Tensor, z: Tensor | None, factors: Tensor | None, rows: Tensor, centre: Tensor
) -> Tensor:
    """dz1^T (rows - centre), float32 [E, C].

    grad: [N, E]; z: z1 [N, E] and factors: float32 [3, E], both or neither; rows: [N, C]; centre:
    float32 [C].
    """
    (count, wide), channels = grad.shape, rows.shape[1]
    blocks = gemm_blocks("expand_weight", grad, wide, channels, count)
    tiles = triton.cdiv(wide, blocks.rows) * triton.cdiv(channels, blocks.columns)
    splits, chunk = reduction_splits(count, tiles, blocks.depth)
    partial = grad.new_empty((splits, wide, channels), dtype=torch.float32)
    launch(
        expand_weight_kernel,
        (tiles, splits),
        *(grad, z, factors, rows, centre, partial, count, wide, channels, chunk),
        BLOCK_WIDE=blocks.rows,
        BLOCK_C=blocks.columns,
        BLOCK_ROWS=blocks.depth,
        PRECISION=dot_precision(grad),
        num_warps=blocks.warps,
        num_stages=blocks.stages,
        reads=(grad, z, factors, rows, centre),
        writes=(partial,),
        flops=2 * count * wide * channels,
    )
    return partial.sum(0)


@triton.jit
def expand_input_kernel(
    grad_ptr,  # [N, E]: dy1
    z_ptr,  # [N, E]: z1, or None
    factors_ptr,  # [3, E] float32: a, b, c, given with z1
    weight_ptr,  # [E, C]
    rows_ptr,  # [N, C], given with affine
    correction_ptr,  # [C, C] in the dtype of rows, or None
    affine_ptr,  # [2, C] float32: slope and constant; or None
    addend_ptr,  # [N, C], or None
    output_ptr,  # [N, C]
    count,
    wide,
    channels,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_WIDE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """output = dz1 weight + slope * R + constant + addend.

    R = rows correction where there is one (what reaches x through its covariance; slope undoes the
    correction's scaling), else rows. Reads dy1 (and z1 if given), E-wide, and rows and addend,
    C-wide, and writes C-wide; blocks of the same rows run side by side.
    """
    channel_blocks = tl.cdiv(channels, BLOCK_C)
    row = (tl.program_id(0) // channel_blocks) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    channel = (tl.program_id(0) % channel_blocks) * BLOCK_C + tl.arange(0, BLOCK_C)
    valid_row, valid_channel = row < count, channel < channels
    mask = valid_row[:, None] & valid_channel[None, :]
    row_offset = row.to(tl.int64)[:, None] * channels
    offset = row_offset + channel[None, :]
    products = tl.zeros([BLOCK_ROWS, BLOCK_C], tl.float32)
    if correction_ptr is not None:
        for start in tl.range(0, channels, BLOCK_WIDE):
            inner = start + tl.arange(0, BLOCK_WIDE)
            rows = tl.load(
                rows_ptr + row_offset + inner[None, :],
                mask=valid_row[:, None] & (inner < channels)[None, :],
                other=0.0,
            )
            correction = tl.load(
                correction_ptr + inner[:, None] * channels + channel[None, :],
                mask=(inner < channels)[:, None] & valid_channel[None, :],
                other=0.0,
            )
            products = tl.dot(rows, correction, products, input_precision=PRECISION)
    elif affine_ptr is not None:
        products += tl.load(rows_ptr + offset, mask=mask, other=0.0).to(tl.float32)
    if affine_ptr is not None:
        slope = tl.load(affine_ptr + channel, mask=valid_channel, other=0.0)
        constant = tl.load(affine_ptr + channels + channel, mask=valid_channel, other=0.0)
        products = products * slope[None, :] + constant[None, :]
    for start in tl.range(0, wide, BLOCK_WIDE):
        column = start + tl.arange(0, BLOCK_WIDE)
        valid_column = column < wide
        grad_mask = valid_row[:, None] & valid_column[None, :]
        grad = _load_grad(grad_ptr, z_ptr, factors_ptr, row, column, wide, grad_mask, valid_column)
        weight = tl.load(
            weight_ptr + column[:, None] * channels + channel[None, :],
            mask=valid_column[:, None] & valid_channel[None, :],
            other=0.0,
        )
        products = tl.dot(grad, weight, products, input_precision=PRECISION)
    if addend_ptr is not None:
        products += tl.load(addend_ptr + offset, mask=mask, other=0.0).to(tl.float32)
    tl.store(output_ptr + offset, products.to(output_ptr.dtype.element_ty), mask=mask)


@tunable
def expand_input(
    grad: Tensor,
    z: Tensor | None,
    factors: Tensor | None,
    weight: Tensor,
    rows: Tensor,
    correction: Tensor | None,
    affine: Tensor | None,
    addend: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    """dz1 weight + slope * (rows correction, or rows) + constant + addend, [N, C] in `dtype`.

    grad, z, factors, rows: as in `expand_weight`; weight: [E, C]; correction: [C, C] in the dtype
    of rows; affine: float32 (slope, constant) [2, C], None where both are 0; addend: [N, C].
    """
    (count, wide), channels = grad.shape, rows.shape[1]
    blocks = gemm_blocks("expand_input", grad, count, channels, wide)
    output = rows.new_empty((count, channels), dtype=dtype)
    corrected = None if affine is None else rows
    launch(
        expand_input_kernel,
        (triton.cdiv(count, blocks.rows) * triton.cdiv(channels, blocks.columns),),
        *(
            *(grad, z, factors, weight, corrected, correction, affine, addend, output),
            *(count, wide, channels),
        ),
        BLOCK_ROWS=blocks.rows,
        BLOCK_C=blocks.columns,
        BLOCK_WIDE=blocks.depth,
        PRECISION=dot_precision(grad),
        num_warps=blocks.warps,
        num_stages=blocks.stages,
        reads=(grad, z, factors, weight, corrected, correction, affine, addend),
        writes=(output,),
        flops=2 * count * channels * (wide + (0 if correction is None else channels)),
    )
    return output
