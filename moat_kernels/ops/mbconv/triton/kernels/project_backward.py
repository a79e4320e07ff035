"""Backward of the project convolution, the gate and the activation before it.

With y = z scale + shift, a = act(y) and output = (gate * a) weight^T, from the gradient of output.
"""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from moat_kernels.ops.mbconv.triton.kernels.affine import exist, load_affine
from moat_kernels.ops.mbconv.triton.kernels.moments import Sums
from moat_kernels.ops.mbconv.triton.kernels.project import row_blocks, rows_of_block
from moat_kernels.ops.mbconv.triton.launch_table import (
    dot_precision,
    gemm_blocks,
    reduction_splits,
)
from moat_kernels.ops.triton_support.activations import activate, activation_derivative
from moat_kernels.ops.triton_support.launching import launch, tunable


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
    sums_ptr,  # [row blocks, 2, E] float32
    count,
    pixels,
    wide,
    channels,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_WIDE: tl.constexpr,
    BLOCK_C: tl.constexpr,
    WHOLE_WIDE: tl.constexpr,
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
    valid_column = exist(column, wide, WHOLE_WIDE)
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
    slope = activation_derivative(z * scale[None, :] + shift[None, :], ACTIVATION)
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
    sums = z.new_empty((blocks_of_rows, 2, wide), dtype=torch.float32)
    launch(
        project_input_kernel,
        (blocks_of_rows * -(-wide // blocks.columns),),
        *(
            *(grad, weight, z, affine, drop_path_scale, gate, grad_mean, output, sums),
            *(count, pixels, wide, channels),
        ),
        BLOCK_ROWS=blocks.rows,
        BLOCK_WIDE=blocks.columns,
        BLOCK_C=blocks.depth,
        WHOLE_WIDE=wide % blocks.columns == 0,
        ACTIVATION=activation,
        PRECISION=dot_precision(z),
        num_warps=blocks.warps,
        num_stages=blocks.stages,
        reads=(grad, weight, z, affine, drop_path_scale, gate, grad_mean),
        writes=(output, sums),
        flops=2 * count * wide * channels,
    )
    return output, Sums(sums, 0)


@triton.jit
def _load_grad(grad_ptr, row, valid_row, channel, channels):
    return tl.load(
        grad_ptr + row.to(tl.int64)[:, None] * channels + channel[None, :],
        mask=valid_row[:, None] & (channel < channels)[None, :],
        other=0.0,
    )


@triton.jit
def _load_factor(drop_path_ptr, row, valid_row, pixels):
    return tl.load(drop_path_ptr + row // pixels, mask=valid_row, other=0.0).to(tl.float32)


@triton.jit
def _sum_grad(
    grad_ptr, drop_path_ptr, target_ptr, begin, end, pixels, block, channels,
    BLOCK_C: tl.constexpr, BLOCK_ROWS: tl.constexpr,
):  # fmt: skip
    """target = sum of drop_path * grad over a range of rows, of a block of channels."""
    channel = block * BLOCK_C + tl.arange(0, BLOCK_C)
    sums = tl.zeros([BLOCK_ROWS, BLOCK_C], tl.float32)
    for start in tl.range(begin, end, BLOCK_ROWS):
        row = start + tl.arange(0, BLOCK_ROWS)
        grad = _load_grad(grad_ptr, row, row < end, channel, channels).to(tl.float32)
        if drop_path_ptr is not None:
            grad *= _load_factor(drop_path_ptr, row, row < end, pixels)[:, None]
        sums += grad
    tl.store(target_ptr + channel, tl.sum(sums, 0), mask=channel < channels)


@triton.jit
def project_weight_kernel(
    grad_ptr,  # [M, C_out]
    z_ptr,  # [M, E]
    affine_ptr,  # [3, E] float32: scale, shift and centre
    drop_path_ptr,  # [B], or None
    gate_ptr,  # [B, E] float32, or None
    weight_ptr,  # [C_out, E], given with the gate
    partial_ptr,  # [splits, C_out * E, and C_out for each bias] float32
    grad_gate_ptr,  # [B, channel blocks, E] float32, given with the gate
    count,
    pixels,
    wide,
    channels,
    part,
    parts_per_split,
    HAS_BIAS: tl.constexpr,
    HAS_SHORTCUT_BIAS: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_WIDE: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """partial = sum over parts of gate * P, P = grad^T (drop_path * act(y)) over one part's rows.

    With a gate a part is an image, and grad_gate = sum over C_out of weight * P: what the gate's
    gradient needs of the map, without reading z once more. For biases programs behind those of the
    tiles sum drop_path * grad, and for the shortcut's grad, for which the others have no registers
    left.

    Reads grad (C_out-wide) and z (E-wide); tiles of the same rows run side by side, so that all but
    the first find them in L2.
    """
    wide_blocks = tl.cdiv(wide, BLOCK_WIDE)
    channel_block = tl.program_id(0) // wide_blocks
    if HAS_BIAS or HAS_SHORTCUT_BIAS:
        channel_blocks = tl.cdiv(channels, BLOCK_C)
        block = tl.program_id(0) - channel_blocks * wide_blocks
        if block >= 0:
            begin = tl.program_id(1) * parts_per_split * part
            end = tl.minimum(count, begin + parts_per_split * part)
            target = tl.program_id(1).to(tl.int64) * (wide + HAS_BIAS + HAS_SHORTCUT_BIAS) + wide
            target = partial_ptr + target * channels
            if HAS_BIAS and block < channel_blocks:
                _sum_grad(
                    grad_ptr, drop_path_ptr, target, begin, end, pixels, block, channels,
                    BLOCK_C, BLOCK_ROWS,
                )  # fmt: skip
            elif HAS_SHORTCUT_BIAS:
                _sum_grad(
                    grad_ptr, None, target + HAS_BIAS * channels, begin, end, pixels,
                    block % channel_blocks, channels, BLOCK_C, BLOCK_ROWS,
                )  # fmt: skip
            return
    channel = channel_block * BLOCK_C + tl.arange(0, BLOCK_C)
    column = (tl.program_id(0) % wide_blocks) * BLOCK_WIDE + tl.arange(0, BLOCK_WIDE)
    valid_channel, valid_column = channel < channels, column < wide
    split = tl.program_id(1)
    scale, shift = load_affine(affine_ptr, column, wide, valid_column)
    mask = valid_channel[:, None] & valid_column[None, :]
    weight_offset = channel[:, None] * wide + column[None, :]
    total = tl.zeros([BLOCK_C, BLOCK_WIDE], tl.float32)
    first = split * parts_per_split
    for index in tl.range(first, tl.minimum(first + parts_per_split, tl.cdiv(count, part))):
        products = tl.zeros([BLOCK_C, BLOCK_WIDE], tl.float32)
        end = tl.minimum(count, (index + 1) * part)
        for start in tl.range(index * part, end, BLOCK_ROWS):
            row = start + tl.arange(0, BLOCK_ROWS)
            valid_row, offset = row < end, row.to(tl.int64)
            grad = _load_grad(grad_ptr, row, valid_row, channel, channels)
            z = tl.load(
                z_ptr + offset[:, None] * wide + column[None, :],
                mask=valid_row[:, None] & valid_column[None, :],
                other=0.0,
            )
            a = activate(z.to(tl.float32) * scale[None, :] + shift[None, :], ACTIVATION)
            if drop_path_ptr is not None:
                # Not with grad, which goes from memory into the product as it is.
                a *= _load_factor(drop_path_ptr, row, valid_row, pixels)[:, None]
            products = tl.dot(tl.trans(grad), a.to(grad.dtype), products, input_precision=PRECISION)
        if gate_ptr is not None:
            image = tl.cast(index, tl.int64)
            weight = tl.load(weight_ptr + weight_offset, mask=mask, other=0.0).to(tl.float32)
            channel_blocks = tl.cdiv(channels, BLOCK_C)
            target = grad_gate_ptr + (image * channel_blocks + channel_block) * wide
            tl.store(target + column, tl.sum(weight * products, 0), mask=valid_column)
            gate = tl.load(gate_ptr + image * wide + column, mask=valid_column, other=0.0)
            products *= gate[None, :]
        total += products
    target = partial_ptr + split.to(tl.int64) * channels * (wide + HAS_BIAS + HAS_SHORTCUT_BIAS)
    tl.store(target + weight_offset, total, mask=mask)


class ProjectWeight(NamedTuple):
    """What `project_weight` computes, float32: gradients in parts, and of the gate.

    partial: [splits, C_out * E, and C_out for each bias]; its sum is `split`.
    """

    partial: Tensor
    widths: list[int]  # of the weight, of project's bias and the shortcut's
    grad_gate: Sums | None  # [B, parts, E]

    def split(self, summed: Tensor) -> dict[str, Tensor]:
        """Gradients by name: of the weight [C_out, E] and of the biases [C_out] that there are."""
        names = ("project_weight", "project_bias", "shortcut_bias")
        parts = dict(zip(names, summed.split(self.widths), strict=True))
        return {name: part for name, part in parts.items() if len(part)}


@tunable
def project_weight(
    grad: Tensor,
    z: Tensor,
    affine: Tensor,
    activation: str,
    drop_path_scale: Tensor | None,
    gate: Tensor | None,
    weight: Tensor,
    pixels: int,
    has_bias: bool,
    has_shortcut_bias: bool,
) -> ProjectWeight:
    """Gradients of the weight, of project's bias and the shortcut's, and of the gate.

    Shapes are those of `project_input`.
    """
    (count, wide), channels = z.shape, grad.shape[1]
    blocks = gemm_blocks("project_weight", z, channels, wide, count)
    if blocks.rows <= 32:  # few output channels make few threads, whose registers hold the depth
        blocks = replace(blocks, depth=min(blocks.depth, 32))
    channel_blocks = -(-channels // blocks.rows)
    tiles = channel_blocks * -(-wide // blocks.columns)
    if gate is None:
        splits, part = reduction_splits(count, tiles, blocks.depth)
        parts_per_split, grad_gate = 1, None
    else:
        batch, part = count // pixels, pixels
        splits, parts_per_split = reduction_splits(batch, tiles, 1)
        grad_gate = z.new_empty((batch, channel_blocks, wide), dtype=torch.float32)
    # One row holds all gradients, so that one sum over the splits makes them.
    widths = [channels * lines for lines in (wide, has_bias, has_shortcut_bias)]
    partial = z.new_empty((splits, sum(widths)), dtype=torch.float32)
    gated_weight = None if gate is None else weight
    launch(
        project_weight_kernel,
        (tiles + channel_blocks * (has_bias + has_shortcut_bias), splits),
        *(
            *(grad, z, affine, drop_path_scale, gate, gated_weight, partial, grad_gate),
            *(count, pixels, wide, channels, part, parts_per_split),
        ),
        HAS_BIAS=has_bias,
        HAS_SHORTCUT_BIAS=has_shortcut_bias,
        BLOCK_C=blocks.rows,
        BLOCK_WIDE=blocks.columns,
        BLOCK_ROWS=blocks.depth,
        ACTIVATION=activation,
        PRECISION=dot_precision(z),
        num_warps=blocks.warps,
        num_stages=blocks.stages,
        reads=(grad, z, affine, drop_path_scale, gate, gated_weight),
        writes=(partial, grad_gate),
        flops=2 * count * wide * channels,
    )
    return ProjectWeight(partial, widths, None if grad_gate is None else Sums(grad_gate, 1))
