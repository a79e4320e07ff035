"""Backward of the project convolution, the gate and the activation before it.

With y = z scale + shift, a = act(y) and output = (gate * a) weight^T, from the gradient of output.
Both products are BLAS': the kernels lie between them, read product = grad weight and z, and write
the gradient of y over the one and h = drop_path * gate * a, for the weight's gradient grad^T h.
Kernels that multiplied what they activate took twice as long on an H200: its tensor cores wait for
the activation, which every block of output channels computed anew.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from moat_kernels.ops.mbconv.triton.kernels.affine import load_affine
from moat_kernels.ops.mbconv.triton.kernels.moments import Sums
from moat_kernels.ops.mbconv.triton.launch_table import StencilBlocks, row_tiles
from moat_kernels.ops.triton_support.activations import activate, activate_and_differentiate
from moat_kernels.ops.triton_support.launching import launch, tunable


@triton.jit
def _load_factor(drop_path_ptr, row, valid_row, pixels):
    return tl.load(drop_path_ptr + row // pixels, mask=valid_row, other=0.0).to(tl.float32)


@triton.jit
def _load_gate(gate_ptr, drop_path_ptr, image, wide, column, valid):
    """drop_path * gate of an image."""
    gate = tl.load(gate_ptr + image * wide + column, mask=valid, other=0.0)
    if drop_path_ptr is not None:
        gate *= tl.load(drop_path_ptr + image).to(tl.float32)
    return gate


@triton.jit
def gate_gradient_kernel(
    product_ptr,  # [M, E]: grad weight
    z_ptr,  # [M, E]
    affine_ptr,  # [2, E] float32: scale and shift
    drop_path_ptr,  # [B], or None
    gate_ptr,  # [B, E] float32
    activated_ptr,  # [M, E], or None
    sums_ptr,  # [B, splits, E] float32
    pixels,
    wide,
    chunk,
    splits,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_WIDE: tl.constexpr,
    ACTIVATION: tl.constexpr,
    STAGES: tl.constexpr,
):
    """sums = sum of drop_path * product * act(y) over parts of an image, which is the gate's
    gradient; activated = drop_path * gate * act(y).

    Reads product and z, writes activated (all E-wide).
    """
    wide_blocks = tl.cdiv(wide, BLOCK_WIDE)
    part = tl.program_id(0) // wide_blocks
    column = (tl.program_id(0) % wide_blocks) * BLOCK_WIDE + tl.arange(0, BLOCK_WIDE)
    valid_column = column < wide
    image = (part // splits).to(tl.int64)
    begin = part % splits * chunk
    end = tl.minimum(pixels, begin + chunk)
    scale, shift = load_affine(affine_ptr, column, wide, valid_column)
    gate = _load_gate(gate_ptr, drop_path_ptr, image, wide, column, valid_column)
    sums = tl.zeros([BLOCK_ROWS, BLOCK_WIDE], tl.float32)
    for start in tl.range(begin, end, BLOCK_ROWS, num_stages=STAGES):
        pixel = start + tl.arange(0, BLOCK_ROWS)
        mask = (pixel < end)[:, None] & valid_column[None, :]
        offset = (image * pixels + pixel)[:, None] * wide + column[None, :]
        product = tl.load(product_ptr + offset, mask=mask, other=0.0).to(tl.float32)
        z = tl.load(z_ptr + offset, mask=mask, other=0.0).to(tl.float32)
        activated = activate(z * scale[None, :] + shift[None, :], ACTIVATION)
        sums += product * activated
        if activated_ptr is not None:
            low = (activated * gate[None, :]).to(activated_ptr.dtype.element_ty)
            tl.store(activated_ptr + offset, low, mask=mask)
    total = tl.sum(sums, 0)
    if drop_path_ptr is not None:
        total *= tl.load(drop_path_ptr + image).to(tl.float32)
    tl.store(sums_ptr + part.to(tl.int64) * wide + column, total, mask=valid_column)


@tunable
def gate_gradient(
    product: Tensor,
    z: Tensor,
    affine: Tensor,
    activation: str,
    drop_path_scale: Tensor | None,
    gate: Tensor,
    pixels: int,
    wants_activated: bool,
) -> tuple[Sums, Tensor | None]:
    """(gradient of the gate, float32 [B, parts, E]; drop_path_scale * gate * activation(y) [M, E],
    if that is wanted). Shapes are those of `activation_gradient`.
    """
    count, wide = z.shape
    batch = count // pixels
    blocks = row_tiles("gate_gradient", z, pixels, wide)
    splits = -(-pixels // blocks.band)
    sums = z.new_empty((batch, splits, wide), dtype=torch.float32)
    activated = torch.empty_like(z) if wants_activated else None
    launch(
        gate_gradient_kernel,
        (batch * splits * -(-wide // blocks.channels),),
        *(product, z, affine, drop_path_scale, gate, activated, sums),
        *(pixels, wide, blocks.band, splits),
        **_constants(blocks, activation),
        reads=(product, z, affine, drop_path_scale, gate),
        writes=(activated, sums),
    )
    return Sums(sums, 1), activated


@triton.jit
def _sum_grad(
    grad_ptr, drop_path_ptr, target_ptr, begin, end, pixels, block, channels,
    BLOCK_ROWS: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """target = sum of drop_path * grad over a range of rows, of a block of channels."""
    channel = block * BLOCK_C + tl.arange(0, BLOCK_C)
    valid = channel < channels
    sums = tl.zeros([BLOCK_ROWS, BLOCK_C], tl.float32)
    for start in tl.range(begin, end, BLOCK_ROWS):
        row = start + tl.arange(0, BLOCK_ROWS)
        valid_row = row < end
        grad = tl.load(
            grad_ptr + row.to(tl.int64)[:, None] * channels + channel[None, :],
            mask=valid_row[:, None] & valid[None, :],
            other=0.0,
        ).to(tl.float32)
        if drop_path_ptr is not None:
            grad *= _load_factor(drop_path_ptr, row, valid_row, pixels)[:, None]
        sums += grad
    tl.store(target_ptr + channel, tl.sum(sums, 0), mask=valid)


@triton.jit
def activation_gradient_kernel(
    product_ptr,  # [M, E]: grad weight; becomes dy
    z_ptr,  # [M, E]
    affine_ptr,  # [3, E] float32: scale, shift and centre
    drop_path_ptr,  # [B], or None
    gate_ptr,  # [B, E] float32, or None
    grad_mean_ptr,  # [B, E] float32, given with the gate
    activated_ptr,  # [M, E], or None; not given with the gate
    sums_ptr,  # [parts, 2, E] float32
    grad_ptr,  # [M, C_out], or None
    bias_ptr,  # [parts of it, C_out] float32, given with grad
    count,
    pixels,
    wide,
    channels,
    chunk,
    splits,
    bias_chunk,
    bias_programs,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_WIDE: tl.constexpr,
    ACTIVATION: tl.constexpr,
    STAGES: tl.constexpr,
):
    """dy = (drop_path * gate * product + grad_mean) act'(y), in place of product; sums of dy and
    dy (z - centre); activated = drop_path * act(y).

    Reads product and z, writes dy and activated (all E-wide). With a gate a part lies within an
    image. grad_mean is what reaches each pixel through squeeze-excite's mean. With grad the first
    programs sum drop_path * grad, for the bias.
    """
    program = tl.program_id(0)
    if grad_ptr is not None:
        if program < bias_programs:
            blocks = tl.cdiv(channels, BLOCK_WIDE)
            begin = program // blocks * bias_chunk
            _sum_grad(
                grad_ptr, drop_path_ptr, bias_ptr + (program // blocks) * channels, begin,
                tl.minimum(count, begin + bias_chunk), pixels, program % blocks, channels,
                BLOCK_ROWS, BLOCK_WIDE,
            )  # fmt: skip
            return
        program -= bias_programs
    wide_blocks = tl.cdiv(wide, BLOCK_WIDE)
    part = program // wide_blocks
    column = (program % wide_blocks) * BLOCK_WIDE + tl.arange(0, BLOCK_WIDE)
    valid_column = column < wide
    begin = part * chunk
    end = tl.minimum(count, begin + chunk)
    if gate_ptr is not None:
        image = (part // splits).to(tl.int64)
        begin = part // splits * pixels + part % splits * chunk
        end = tl.minimum(part // splits * pixels + pixels, begin + chunk)
        gate = _load_gate(gate_ptr, drop_path_ptr, image, wide, column, valid_column)
        grad_mean = tl.load(grad_mean_ptr + image * wide + column, mask=valid_column, other=0.0)
    scale, shift = load_affine(affine_ptr, column, wide, valid_column)
    centre = tl.load(affine_ptr + 2 * wide + column, mask=valid_column, other=0.0)
    total = tl.zeros([BLOCK_ROWS, BLOCK_WIDE], tl.float32)
    moment = tl.zeros([BLOCK_ROWS, BLOCK_WIDE], tl.float32)
    for start in tl.range(begin, end, BLOCK_ROWS, num_stages=STAGES):
        row = start + tl.arange(0, BLOCK_ROWS)
        valid_row = row < end
        mask = valid_row[:, None] & valid_column[None, :]
        offset = row.to(tl.int64)[:, None] * wide + column[None, :]
        product = tl.load(product_ptr + offset, mask=mask, other=0.0).to(tl.float32)
        z = tl.load(z_ptr + offset, mask=mask, other=0.0).to(tl.float32)
        activated, slope = activate_and_differentiate(
            z * scale[None, :] + shift[None, :], ACTIVATION
        )
        if gate_ptr is not None:
            # Rows behind the end have no product, but grad_mean.
            product = tl.where(mask, product * gate[None, :] + grad_mean[None, :], 0.0)
        elif drop_path_ptr is not None:
            factor = _load_factor(drop_path_ptr, row, valid_row, pixels)[:, None]
            product *= factor
            activated *= factor
        grad_y = product * slope
        tl.store(product_ptr + offset, grad_y.to(product_ptr.dtype.element_ty), mask=mask)
        if activated_ptr is not None:
            low = activated.to(activated_ptr.dtype.element_ty)
            tl.store(activated_ptr + offset, low, mask=mask)
        total += grad_y
        moment += grad_y * (z - centre[None, :])
    target = sums_ptr + part.to(tl.int64) * 2 * wide + column
    tl.store(target, tl.sum(total, 0), mask=valid_column)
    tl.store(target + wide, tl.sum(moment, 0), mask=valid_column)


# Rows of which a program sums the gradient of the bias.
_BIAS_ROWS = 256


def activation_gradient(
    product: Tensor,
    z: Tensor,
    affine: Tensor,
    activation: str,
    drop_path_scale: Tensor | None,
    gate: Tensor | None,
    grad_mean: Tensor | None,
    pixels: int,
    wants_activated: bool,
    grad: Tensor | None,
) -> tuple[Sums, Tensor | None, Sums | None]:
    """(sums [P, 2, E] over parts of the gradient of y and of it times z - centre; drop_path_scale *
    activation(y) [M, E], if that is wanted; the bias's gradient [Q, C_out] over parts, given grad).

    The gradient of y takes the place of `product`, which spares an E-wide tensor. Not tunable
    therefore: a second call would not see what the first one saw.

    product: grad weight [M, E]; z: [M, E]; affine: float32 (scale, shift, centre, ...) [., E];
    drop_path_scale: [B]; gate, grad_mean: float32 [B, E], both or neither, and then nothing
    activated is given; grad: of the output [M, C_out].
    """
    count, wide = z.shape
    part = count if gate is None else pixels
    blocks = row_tiles("activation_gradient", z, part, wide)
    splits = -(-part // blocks.band)
    parts = count // part * splits
    sums = z.new_empty((parts, 2, wide), dtype=torch.float32)
    activated = torch.empty_like(z) if wants_activated else None
    bias_parts = channels = bias_programs = 0
    bias = None
    if grad is not None:
        channels = grad.shape[1]
        bias_parts = -(-count // _BIAS_ROWS)
        bias_programs = bias_parts * -(-channels // blocks.channels)
        bias = z.new_empty((bias_parts, channels), dtype=torch.float32)
    launch(
        activation_gradient_kernel,
        (bias_programs + parts * -(-wide // blocks.channels),),
        *(product, z, affine, drop_path_scale, gate, grad_mean, activated, sums, grad, bias),
        *(count, pixels, wide, channels, blocks.band, splits, _BIAS_ROWS, bias_programs),
        **_constants(blocks, activation),
        reads=(product, z, affine, drop_path_scale, gate, grad_mean, grad),
        writes=(product, activated, sums, bias),
    )
    return Sums(sums, 0), activated, None if bias is None else Sums(bias, 0)


def _constants(blocks: StencilBlocks, activation: str) -> dict[str, Any]:
    return {
        "BLOCK_ROWS": blocks.width,
        "BLOCK_WIDE": blocks.channels,
        "ACTIVATION": activation,
        "STAGES": blocks.stages,
        "num_warps": blocks.warps,
        "num_stages": blocks.stages,
    }
