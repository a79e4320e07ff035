"""Backward of the depthwise convolution, with the norm behind it and the activation before it."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from moat_kernels.ops.mbconv.algebra.geometry import Stencil
from moat_kernels.ops.mbconv.triton.kernels.affine import load_affine
from moat_kernels.ops.mbconv.triton.kernels.moments import Sums
from moat_kernels.ops.mbconv.triton.launch_table import depthwise_blocks
from moat_kernels.ops.triton_support.activations import activate, activation_derivative
from moat_kernels.ops.triton_support.launching import launch, tunable


@triton.jit
def depthwise_backward_kernel(
    grad_ptr,  # [B, H_out, W_out, E]: gradient of the norm's output, dy2
    z2_ptr,  # [B, H_out, W_out, E]
    factors_ptr,  # [3, E] float32: a, b, c
    z1_ptr,  # [B, H, W, E]
    affine_ptr,  # [2, E] float32: scale and shift; or None
    taps_ptr,  # [9, E] float32
    output_ptr,  # [B, H, W, E]: dy1
    sums_ptr,  # [programs per channel, 11, E] float32
    height,
    width,
    out_height,
    out_width,
    top,
    left,
    channels,
    band,
    STRIDE: tl.constexpr,
    TOP_PHASE: tl.constexpr,
    LEFT_PHASE: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
    BLOCK_C: tl.constexpr,
    ACTIVATION: tl.constexpr,
):
    """dz2 = a dy2 + b z2 + c;  y1 = z1 scale + shift;  dy1 = (taps correlated with dz2) act'(y1).

    sums = the nine gradients of the taps, sum of act(y1) dz2; the sum of dy1; of dy1 z1. Reads dy2,
    z2 and z1 and writes dy1, all E-wide, once: the nine pixels of dz2 around a pixel of z1 come
    from L1 and L2, and serve both the input's and the taps' gradient. A program walks down a band
    of groups of STRIDE rows. A pixel's place in its group, of STRIDE x STRIDE pixels, tells at
    compile time which taps reach it: those with (pixel + PHASE - tap) % STRIDE == 0, where PHASE is
    the padding modulo STRIDE.
    """
    channel_blocks = tl.cdiv(channels, BLOCK_C)
    column_blocks = tl.cdiv(tl.cdiv(width, STRIDE), BLOCK_WIDTH)
    groups = tl.cdiv(height, STRIDE)
    bands = tl.cdiv(groups, band)
    tile = tl.program_id(0) // channel_blocks
    channel = (tl.program_id(0) % channel_blocks) * BLOCK_C + tl.arange(0, BLOCK_C)
    column_group = (tile % column_blocks) * BLOCK_WIDTH + tl.arange(0, BLOCK_WIDTH)
    first_group = (tile // column_blocks % bands) * band
    image = (tile // column_blocks // bands).to(tl.int64)
    end_group = tl.minimum(first_group + band, groups)

    valid = channel < channels
    a = tl.load(factors_ptr + channel, mask=valid, other=0.0)
    b = tl.load(factors_ptr + channels + channel, mask=valid, other=0.0)
    c = tl.load(factors_ptr + 2 * channels + channel, mask=valid, other=0.0)
    scale, shift = load_affine(affine_ptr, channel, channels, valid)
    grad_ptr += image * out_height * out_width * channels
    z2_ptr += image * out_height * out_width * channels
    z1_ptr += image * height * width * channels
    output_ptr += image * height * width * channels
    zeros = tl.zeros([BLOCK_WIDTH, BLOCK_C], tl.float32)
    grad_taps = (zeros, zeros, zeros, zeros, zeros, zeros, zeros, zeros, zeros)
    total = zeros
    product = zeros
    for group in tl.range(first_group, end_group):
        for down in tl.static_range(STRIDE):
            for right in tl.static_range(STRIDE):
                column = column_group * STRIDE + right
                row = group * STRIDE + down + tl.zeros_like(column)
                mask = ((column < width) & (row < height))[:, None] & valid[None, :]
                offset = (row * width + column)[:, None] * channels + channel[None, :]
                z1 = tl.load(z1_ptr + offset, mask=mask, other=0.0).to(tl.float32)
                y1 = z1 * scale[None, :] + shift[None, :]
                h1 = tl.where(mask, activate(y1, ACTIVATION), 0.0)
                grad_h1 = zeros
                for tap in tl.static_range(9):
                    if ((down + TOP_PHASE + 4 - tap // 3) % STRIDE == 0) and (
                        (right + LEFT_PHASE + 4 - tap % 3) % STRIDE == 0
                    ):
                        out_row = (row + top - tap // 3) // STRIDE
                        out_column = (column + left - tap % 3) // STRIDE
                        inside = (out_row >= 0) & (out_row < out_height)
                        inside = inside & (out_column >= 0) & (out_column < out_width)
                        out_mask = inside[:, None] & valid[None, :]
                        out_offset = (out_row * out_width + out_column)[:, None] * channels
                        out_offset += channel[None, :]
                        grad = tl.load(grad_ptr + out_offset, mask=out_mask, other=0.0)
                        z2 = tl.load(z2_ptr + out_offset, mask=out_mask, other=0.0)
                        grad_z2 = a[None, :] * grad.to(tl.float32) + c[None, :]
                        grad_z2 += b[None, :] * z2.to(tl.float32)
                        grad_z2 = tl.where(out_mask, grad_z2, 0.0)
                        weight = tl.load(taps_ptr + tap * channels + channel, mask=valid, other=0.0)
                        grad_h1 += weight[None, :] * grad_z2
                        grad_taps = _add_at(grad_taps, h1 * grad_z2, tap)
                grad_y1 = tl.where(mask, grad_h1 * activation_derivative(y1, ACTIVATION), 0.0)
                tl.store(output_ptr + offset, grad_y1.to(output_ptr.dtype.element_ty), mask=mask)
                total += grad_y1
                product += grad_y1 * z1
    target = sums_ptr + tile.to(tl.int64) * 11 * channels + channel
    for tap in tl.static_range(9):
        tl.store(target + tap * channels, tl.sum(grad_taps[tap], 0), mask=valid)
    tl.store(target + 9 * channels, tl.sum(total, 0), mask=valid)
    tl.store(target + 10 * channels, tl.sum(product, 0), mask=valid)


@triton.jit
def _add_at(tiles, addend, INDEX: tl.constexpr):
    """The nine tiles with `addend` added to one of them."""
    return (
        tiles[0] + addend if INDEX == 0 else tiles[0],
        tiles[1] + addend if INDEX == 1 else tiles[1],
        tiles[2] + addend if INDEX == 2 else tiles[2],
        tiles[3] + addend if INDEX == 3 else tiles[3],
        tiles[4] + addend if INDEX == 4 else tiles[4],
        tiles[5] + addend if INDEX == 5 else tiles[5],
        tiles[6] + addend if INDEX == 6 else tiles[6],
        tiles[7] + addend if INDEX == 7 else tiles[7],
        tiles[8] + addend if INDEX == 8 else tiles[8],
    )


@tunable
def depthwise_backward(
    grad: Tensor,
    z2: Tensor,
    factors: Tensor,
    z1: Tensor,
    affine: Tensor | None,
    activation: str,
    taps: Tensor,
    stencil: Stencil,
) -> tuple[Tensor, Sums]:
    """Gradient of y1 [B*H*W, E]; and sums [P, 11, E]: of the taps, and of it, and it * z1.

    grad, z2: [B*H_out*W_out, E]; factors: float32 (a, b, c) [3, E] of dz2 = a grad + b z2 + c;
    z1: [B*H*W, E]; affine: float32 (scale, shift) [2, E]; taps: float32 [9, E].
    """
    channels = z1.shape[1]
    blocks = depthwise_blocks("depthwise_backward", z1, channels, stencil)
    stride = stencil.stride
    groups = (-(-stencil.height // stride), -(-stencil.width // stride))
    tiles = stencil.batch * -(-groups[0] // blocks.band) * -(-groups[1] // blocks.width)
    output = torch.empty_like(z1)
    sums = z1.new_empty((tiles, 11, channels), dtype=torch.float32)
    launch(
        depthwise_backward_kernel,
        (tiles * -(-channels // blocks.channels),),
        *(
            *(grad, z2, factors, z1, affine, taps, output, sums),
            *(stencil.height, stencil.width, stencil.out_height, stencil.out_width),
            *(stencil.top, stencil.left, channels, blocks.band),
        ),
        STRIDE=stride,
        TOP_PHASE=stencil.top % stride,
        LEFT_PHASE=stencil.left % stride,
        BLOCK_WIDTH=blocks.width,
        BLOCK_C=blocks.channels,
        ACTIVATION=activation,
        num_warps=blocks.warps,
        num_stages=blocks.stages,
        reads=(grad, z2, factors, z1, affine, taps),
        writes=(output, sums),
        flops=2 * 2 * 9 * grad.numel(),
    )
    return output, Sums(sums, 0)
