"""Backward of the project convolution, the gate and the activation before it.

With y = z scale + shift, a = act(y) and output = (gate * a) weight^T, from the gradient of output.
"""

from __future__ import annotations

from dataclasses import replace

import torch
import triton
import triton.language as tl
from torch import Tensor

from moat_kernels.ops.mbconv.triton.kernels.affine import load_affine
from moat_kernels.ops.mbconv.triton.kernels.moments import Sums
from moat_kernels.ops.mbconv.triton.kernels.project import row_blocks, rows_of_block
from moat_kernels.ops.mbconv.triton.launch_table import (
    GemmBlocks,
    dot_precision,
    reduction_splits,
    sum_splits,
)
from moat_kernels.ops.triton_support.activations import activate_and_differentiate
from moat_kernels.ops.triton_support.launching import launch, tunable

# What the launch table had for an H200 in 16 bits.
BLOCKS = {
    "project_weight": GemmBlocks(128, 64, 64, 8, 4),
    "project_input": GemmBlocks(64, 64, 64, 4, 3),
}


def gemm_blocks(kernel, like, rows, columns, depth):
    return BLOCKS[kernel]


@triton.jit
def project_input_kernel(
    grad_ptr,  # [M, C_out]
    weight_ptr,  # [C_out, E]
    z_ptr,  # [M, E]
    affine_ptr,  # [3, E] float32: scale, shift and centre
    drop_path_ptr,  # [B], or None
    gate_ptr,  # [B, E] float32, or None
    grad_mean_ptr,  # [B, E] float32, given with the gate
    output_ptr,  # [M, E]
    activated_ptr,  # [M, E]
    sums_ptr,  # [row blocks, 2, E] float32
    count,
    pixels,
    wide,
    channels,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_WIDE: tl.constexpr,
    BLOCK_C: tl.constexpr,
    ACTIVATION: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """dy = (gate * drop_path * (grad weight) + grad_mean) act'(y); sums of dy and dy (z - centre).

    Reads grad (C_out-wide) and z, writes dy (both E-wide). Blocks of the same rows run side by
    side. grad_mean is what reaches each pixel through squeeze-excite's mean.
    """
    wide_blocks = tl.cdiv(wide, BLOCK_WIDE)
    row_block = tl.program_id(0) // wide_blocks
    row, valid_row, image = rows_of_block(
        row_block, count, pixels, BLOCK_ROWS, gate_ptr is not None
    )
    column = (tl.program_id(0) % wide_blocks) * BLOCK_WIDE + tl.arange(0, BLOCK_WIDE)
    valid_column = column < wide
    mask = valid_row[:, None] & valid_column[None, :]
    offset = row[:, None] * wide + column[None, :]
    # Asked for now, it arrives while the tile is multiplied.
    z = tl.load(z_ptr + offset, mask=mask, other=0.0)
    scale, shift = load_affine(affine_ptr, column, wide, valid_column)
    centre = tl.load(affine_ptr + 2 * wide + column, mask=valid_column, other=0.0)
    products = tl.zeros([BLOCK_ROWS, BLOCK_WIDE], tl.float32)
    for start in tl.range(0, channels, BLOCK_C):
        channel = start + tl.arange(0, BLOCK_C)
        grad = tl.load(
            grad_ptr + row[:, None] * channels + channel[None, :],
            mask=valid_row[:, None] & (channel < channels)[None, :],
            other=0.0,
        )
        weight = tl.load(
            weight_ptr + channel[:, None] * wide + column[None, :],
            mask=(channel < channels)[:, None] & valid_column[None, :],
            other=0.0,
        )
        products = tl.dot(grad, weight, products, input_precision=PRECISION)
    if drop_path_ptr is not None:
        factor = tl.load(drop_path_ptr + row // pixels, mask=valid_row, other=0.0)
        products *= factor.to(tl.float32)[:, None]
    if gate_ptr is not None:
        gate = tl.load(gate_ptr + image * wide + column, mask=valid_column, other=0.0)
        grad_mean = tl.load(grad_mean_ptr + image * wide + column, mask=valid_column, other=0.0)
        products = products * gate[None, :] + grad_mean[None, :]
    z = z.to(tl.float32)
    activated, slope = activate_and_differentiate(z * scale[None, :] + shift[None, :], ACTIVATION)
    if drop_path_ptr is not None:
        activated *= factor.to(tl.float32)[:, None]
    tl.store(activated_ptr + offset, activated.to(activated_ptr.dtype.element_ty), mask=mask)
    grad_y = tl.where(mask, products * slope, 0.0)
    tl.store(output_ptr + offset, grad_y.to(output_ptr.dtype.element_ty), mask=mask)
    target = sums_ptr + row_block.to(tl.int64) * 2 * wide + column
    tl.store(target, tl.sum(grad_y, 0), mask=valid_column)
    product = tl.where(mask, grad_y * (z - centre[None, :]), 0.0)
    tl.store(target + wide, tl.sum(product, 0), mask=valid_column)


@tunable
def project_input(
    grad: Tensor,
    weight: Tensor,
    z: Tensor,
    affine: Tensor,
    activation: str,
    drop_path_scale: Tensor | None,
    gate: Tensor | None,
    grad_mean: Tensor | None,
    pixels: int,
) -> tuple[Tensor, Sums]:
    """Gradient of y [M, E], and sums [P, 2, E] over parts of it, and of it times z - centre.

    grad: [M, C_out]; weight: [C_out, E]; z: [M, E]; affine: float32 (scale, shift, centre, ...)
    [., E]; drop_path_scale: [B]; gate, grad_mean: float32 [B, E], both or neither.
    """
    (count, wide), channels = z.shape, grad.shape[1]
    blocks = gemm_blocks("project_input", z, count, wide, channels)
    blocks_of_rows = row_blocks(count, pixels, blocks.rows, gate is not None)
    output = torch.empty_like(z)
    activated = torch.empty_like(z)
    sums = z.new_empty((blocks_of_rows, 2, wide), dtype=torch.float32)
    launch(
        project_input_kernel,
        (blocks_of_rows * -(-wide // blocks.columns),),
        *(
            *(grad, weight, z, affine, drop_path_scale, gate, grad_mean, output, activated, sums),
            *(count, pixels, wide, channels),
        ),
        BLOCK_ROWS=blocks.rows,
        BLOCK_WIDE=blocks.columns,
        BLOCK_C=blocks.depth,
        ACTIVATION=activation,
        PRECISION=dot_precision(z),
        num_warps=blocks.warps,
        num_stages=blocks.stages,
        reads=(grad, weight, z, affine, drop_path_scale, gate, grad_mean),
        writes=(output, activated, sums),
        flops=2 * count * wide * channels,
    )
    return output, Sums(sums, 0), activated
