"""Backward of the project convolution, the gate and the activation before it.

With y = z scale + shift, a = act(y) and output = (gate * a) weight^T, from the gradient of output.

Without a gate the weight's gradient is a product of what `project_input` stores for it, by BLAS:
one more E-wide map, and a is computed once, not once for each tile of output channels. With a gate
`project_weight` makes it, as the gate's gradient is a sum of the same products image by image.
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
def _sum_biases(
    grad_ptr, drop_path_ptr, biases_ptr, block, count, pixels, channels, part, line,
    HAS_BIAS: tl.constexpr, HAS_SHORTCUT_BIAS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """A block of the sums over a part of the rows, of what `project_input_kernel` says."""
    channel_blocks = tl.cdiv(channels, BLOCK_C)
    blocks = channel_blocks * (HAS_BIAS + HAS_SHORTCUT_BIAS)
    split, block = block // blocks, block % blocks
    begin, end = split * part, tl.minimum(count, (split + 1) * part)
    target = biases_ptr + split.to(tl.int64) * line
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
    activated_ptr,  # [M, E], or None
    sums_ptr,  # [row blocks, 2, E] float32
    biases_ptr,  # [splits, line] float32, from where biases begin; or None
    count,
    pixels,
    wide,
    channels,
    tiles,
    part,
    line,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_WIDE: tl.constexpr,
    BLOCK_C: tl.constexpr,
    WHOLE_WIDE: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_SHORTCUT_BIAS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """dy = (gate * drop_path * (grad weight) + grad_mean) act'(y); sums of dy and dy (z - centre);
    activated = drop_path * act(y).

    Reads grad (C_out-wide) and z, writes dy and activated (E-wide). Blocks of the same rows run
    side by side. grad_mean is what reaches each pixel through squeeze-excite's mean. Programs
    behind those of the tiles sum over parts of the rows: drop_path * grad for project's bias, grad
    for the shortcut's.
    """
    if HAS_BIAS or HAS_SHORTCUT_BIAS:  # noqa: SIM102  decided at compile time
        if tl.program_id(0) >= tiles:
            _sum_biases(
                grad_ptr, drop_path_ptr, biases_ptr, tl.program_id(0) - tiles, count, pixels,
                channels, part, line, HAS_BIAS, HAS_SHORTCUT_BIAS, BLOCK_ROWS, BLOCK_C,
            )  # fmt: skip
            return
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
    z = z.to(tl.float32)
    y = z * scale[None, :] + shift[None, :]
    if drop_path_ptr is not None:
        factor = _load_factor(drop_path_ptr, row, valid_row, pixels)[:, None]
        products *= factor
    if activated_ptr is not None:
        activated = activate(y, ACTIVATION)
        if drop_path_ptr is not None:
            activated *= factor
        tl.store(activated_ptr + offset, activated.to(activated_ptr.dtype.element_ty), mask=mask)
    if gate_ptr is not None:
        gate = tl.load(gate_ptr + image * wide + column, mask=valid_column, other=0.0)
        grad_mean = tl.load(grad_mean_ptr + image * wide + column, mask=valid_column, other=0.0)
        products = products * gate[None, :] + grad_mean[None, :]
    grad_y = tl.where(mask, products * activation_derivative(y, ACTIVATION), 0.0)
    tl.store(output_ptr + offset, grad_y.to(output_ptr.dtype.element_ty), mask=mask)
    target = sums_ptr + row_block.to(tl.int64) * 2 * wide + column
    tl.store(target, tl.sum(grad_y, 0), mask=valid_column)
    product = tl.where(mask, grad_y * (z - centre[None, :]), 0.0)
    tl.store(target + wide, tl.sum(product, 0), mask=valid_column)


class Biases(NamedTuple):
    """Where `project_input` puts the gradients of project's bias and the shortcut's, in parts.

    sums: float32 [splits, as many as there are of them * C_out], as columns of a wider matrix
    perhaps; None: of neither. part: rows of the output that a split sums over.
    """

    project: bool
    shortcut: bool
    sums: Tensor | None
    part: int

    @property
    def line(self) -> int:
        """Elements from one split to the next."""
        return 0 if self.sums is None else self.sums.stride(0)

    def programs(self, block: int) -> int:
        """Of so many channels each."""
        if self.sums is None:
            return 0
        splits, columns = self.sums.shape
        channels = columns // (self.project + self.shortcut)
        return splits * (self.project + self.shortcut) * -(-channels // block)


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
    activates: bool,
    biases: Biases,
) -> tuple[Tensor, Tensor | None, Sums]:
    """(gradient of y [M, E], drop_path_scale * act(y) [M, E] if `activates`, sums [P, 2, E] over
    parts of that gradient, and of it times z - centre). Fills `biases`.

    grad: [M, C_out]; weight: [C_out, E]; z: [M, E]; affine: float32 (scale, shift, centre, ...)
    [., E]; drop_path_scale: [B]; gate, grad_mean: float32 [B, E], both or neither.
    """
    (count, wide), channels = z.shape, grad.shape[1]
    blocks = gemm_blocks("project_input", z, count, wide, channels)
    blocks_of_rows = row_blocks(count, pixels, blocks.rows, gate is not None)
    output = torch.empty_like(z)
    activated = torch.empty_like(z) if activates else None
    sums = z.new_empty((blocks_of_rows, 2, wide), dtype=torch.float32)
    tiles = blocks_of_rows * -(-wide // blocks.columns)
    launch(
        project_input_kernel,
        (tiles + biases.programs(blocks.depth),),
        *(grad, weight, z, affine, drop_path_scale, gate, grad_mean, output, activated, sums),
        *(biases.sums, count, pixels, wide, channels, tiles, biases.part, biases.line),
        BLOCK_ROWS=blocks.rows,
        BLOCK_WIDE=blocks.columns,
        BLOCK_C=blocks.depth,
        WHOLE_WIDE=wide % blocks.columns == 0,
        HAS_BIAS=biases.project,
        HAS_SHORTCUT_BIAS=biases.shortcut,
        ACTIVATION=activation,
        PRECISION=dot_precision(z),
        num_warps=blocks.warps,
        num_stages=blocks.stages,
        reads=(grad, weight, z, affine, drop_path_scale, gate, grad_mean),
        writes=(output, activated, sums, biases.sums),
        flops=2 * count * wide * channels,
    )
    return output, activated, Sums(sums, 0)


@triton.jit(do_not_specialize=["images", "images_per_split"])
def project_weight_kernel(
    grad_ptr,  # [M, C_out]
    z_ptr,  # [M, E]
    affine_ptr,  # [3, E] float32: scale, shift and centre
    drop_path_ptr,  # [B], or None
    gate_ptr,  # [B, E] float32
    weight_ptr,  # [C_out, E]
    partial_ptr,  # [splits, C_out * E, and more] float32
    grad_gate_ptr,  # [B, channel blocks, E] float32
    images,
    pixels,
    wide,
    channels,
    images_per_split,
    line,
    BLOCK_C: tl.constexpr,
    BLOCK_WIDE: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """partial = sum over images of gate * P, P = grad^T (drop_path * act(y)) over an image's rows.

    grad_gate = sum over C_out of weight * P: what the gate's gradient needs of the map, without
    reading z once more.

    Reads grad (C_out-wide) and z (E-wide); tiles of the same rows run side by side, so that all but
    the first find them in L2.
    """
    wide_blocks = tl.cdiv(wide, BLOCK_WIDE)
    channel_block = tl.program_id(0) // wide_blocks
    channel = channel_block * BLOCK_C + tl.arange(0, BLOCK_C)
    column = (tl.program_id(0) % wide_blocks) * BLOCK_WIDE + tl.arange(0, BLOCK_WIDE)
    valid_channel, valid_column = channel < channels, column < wide
    split = tl.program_id(1)
    scale, shift = load_affine(affine_ptr, column, wide, valid_column)
    mask = valid_channel[:, None] & valid_column[None, :]
    weight_offset = channel[:, None] * wide + column[None, :]
    total = tl.zeros([BLOCK_C, BLOCK_WIDE], tl.float32)
    first = split * images_per_split
    for index in tl.range(first, tl.minimum(first + images_per_split, images)):
        products = tl.zeros([BLOCK_C, BLOCK_WIDE], tl.float32)
        image = tl.cast(index, tl.int64)
        for start in tl.range(0, pixels, BLOCK_ROWS):
            pixel = start + tl.arange(0, BLOCK_ROWS)
            row, valid_row = image * pixels + pixel, pixel < pixels
            grad = _load_grad(grad_ptr, row, valid_row, channel, channels)
            z = tl.load(
                z_ptr + row[:, None] * wide + column[None, :],
                mask=valid_row[:, None] & valid_column[None, :],
                other=0.0,
            )
            a = activate(z.to(tl.float32) * scale[None, :] + shift[None, :], ACTIVATION)
            if drop_path_ptr is not None:
                # Not with grad, which goes from memory into the product as it is.
                a *= _load_factor(drop_path_ptr, row, valid_row, pixels)[:, None]
            products = tl.dot(tl.trans(grad), a.to(grad.dtype), products, input_precision=PRECISION)
        weight = tl.load(weight_ptr + weight_offset, mask=mask, other=0.0).to(tl.float32)
        channel_blocks = tl.cdiv(channels, BLOCK_C)
        target = grad_gate_ptr + (image * channel_blocks + channel_block) * wide
        tl.store(target + column, tl.sum(weight * products, 0), mask=valid_column)
        gate = tl.load(gate_ptr + image * wide + column, mask=valid_column, other=0.0)
        total += products * gate[None, :]
    target = partial_ptr + split.to(tl.int64) * line
    tl.store(target + weight_offset, total, mask=mask)


class ProjectWeight(NamedTuple):
    """What `project_weight` computes, float32: a gradient in parts, and the gate's.

    partial: [splits, C_out * E, and as many more as was asked for]. part: rows of the output that
    a split sums over.
    """

    partial: Tensor
    part: int
    grad_gate: Sums  # [B, parts, E]


@tunable
def project_weight(
    grad: Tensor,
    z: Tensor,
    affine: Tensor,
    activation: str,
    drop_path_scale: Tensor | None,
    gate: Tensor,
    weight: Tensor,
    pixels: int,
    more: int,
) -> ProjectWeight:
    """Gradients of the weight and of the gate; `more`: columns of its parts that are left empty.

    Shapes are those of `project_input`.
    """
    (count, wide), channels = z.shape, grad.shape[1]
    blocks = gemm_blocks("project_weight", z, channels, wide, count)
    if blocks.rows <= 32:  # few output channels make few threads, whose registers hold the depth
        blocks = replace(blocks, depth=min(blocks.depth, 32))
    channel_blocks, images = -(-channels // blocks.rows), count // pixels
    tiles = channel_blocks * -(-wide // blocks.columns)
    splits, images_per_split = reduction_splits(images, tiles, 1)
    grad_gate = z.new_empty((images, channel_blocks, wide), dtype=torch.float32)
    partial = z.new_empty((splits, channels * wide + more), dtype=torch.float32)
    launch(
        project_weight_kernel,
        (tiles, splits),
        *(grad, z, affine, drop_path_scale, gate, weight, partial, grad_gate),
        *(images, pixels, wide, channels, images_per_split, channels * wide + more),
        BLOCK_C=blocks.rows,
        BLOCK_WIDE=blocks.columns,
        BLOCK_ROWS=blocks.depth,
        ACTIVATION=activation,
        PRECISION=dot_precision(z),
        num_warps=blocks.warps,
        num_stages=blocks.stages,
        reads=(grad, z, affine, drop_path_scale, gate, weight),
        writes=(partial, grad_gate),
        flops=2 * count * wide * channels,
    )
    return ProjectWeight(partial, images_per_split * pixels, Sums(grad_gate, 1))
