"""The depthwise 3x3 convolution with its neighbours' norms and activations."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from moat_kernels.ops.mbconv.algebra.geometry import Stencil
from moat_kernels.ops.mbconv.triton.kernels.affine import load_affine
from moat_kernels.ops.mbconv.triton.kernels.moments import Moments, Tiles, store_moments
from moat_kernels.ops.mbconv.triton.launch_table import depthwise_blocks
from moat_kernels.ops.triton_support.activations import activate
from moat_kernels.ops.triton_support.launching import launch, tunable


@triton.jit
def _load_activated(
    image_ptr,
    row,
    column,
    height,
    width,
    channel,
    channels,
    scale,
    shift,
    ACTIVATION: tl.constexpr,
):
    """act(z scale + shift) at one row and several columns; zeros, not act(shift), outside."""
    row += tl.zeros_like(column)
    inside = (row >= 0) & (row < height) & (column >= 0) & (column < width)
    mask = inside[:, None] & (channel < channels)[None, :]
    offset = (row * width + column)[:, None] * channels + channel[None, :]
    z = tl.load(image_ptr + offset, mask=mask, other=0.0)
    y = activate(z.to(tl.float32) * scale[None, :] + shift[None, :], ACTIVATION)
    return tl.where(mask, y, 0.0)


@triton.jit
def _load_row(
    image_ptr,
    row,
    column,
    height,
    width,
    channel,
    channels,
    scale,
    shift,
    ACTIVATION: tl.constexpr,
):
    """What the left, middle and right tap of the stencil see of a row."""
    left = _load_activated(
        image_ptr, row, column, height, width, channel, channels, scale, shift, ACTIVATION
    )
    middle = _load_activated(
        image_ptr, row, column + 1, height, width, channel, channels, scale, shift, ACTIVATION
    )
    right = _load_activated(
        image_ptr, row, column + 2, height, width, channel, channels, scale, shift, ACTIVATION
    )
    return left, middle, right


@triton.jit
def _weigh(row, taps, TAP_ROW: tl.constexpr):
    """A row of the input times one row of the stencil."""
    return (
        row[0] * taps[3 * TAP_ROW][None, :]
        + row[1] * taps[3 * TAP_ROW + 1][None, :]
        + row[2] * taps[3 * TAP_ROW + 2][None, :]
    )


@triton.jit
def _load_taps(taps_ptr, channel, channels):
    """The nine weights of each channel, row by row."""
    mask = channel < channels
    return (
        tl.load(taps_ptr + channel, mask=mask, other=0.0),
        tl.load(taps_ptr + channels + channel, mask=mask, other=0.0),
        tl.load(taps_ptr + 2 * channels + channel, mask=mask, other=0.0),
        tl.load(taps_ptr + 3 * channels + channel, mask=mask, other=0.0),
        tl.load(taps_ptr + 4 * channels + channel, mask=mask, other=0.0),
        tl.load(taps_ptr + 5 * channels + channel, mask=mask, other=0.0),
        tl.load(taps_ptr + 6 * channels + channel, mask=mask, other=0.0),
        tl.load(taps_ptr + 7 * channels + channel, mask=mask, other=0.0),
        tl.load(taps_ptr + 8 * channels + channel, mask=mask, other=0.0),
    )


@triton.jit
def depthwise_kernel(
    z_ptr,  # [B, H, W, E]
    affine_ptr,  # [2, E] float32: scale and shift; or None
    taps_ptr,  # [9, E] float32
    bias_ptr,  # [E] float32, or None
    output_ptr,  # [B, H_out, W_out, E]
    moments_ptr,  # [programs per channel, 2, E] float32, or None
    height,
    width,
    out_height,
    out_width,
    top,
    left,
    channels,
    band,
    STRIDE: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
    BLOCK_C: tl.constexpr,
    ACTIVATION: tl.constexpr,
    OUTPUT_ACTIVATION: tl.constexpr,
):
    """output = act'(sum of taps * act(z scale + shift) + bias); moments of it, if asked for.

    Reads z and writes output once, both E-wide; rows and columns that neighbouring programs share
    come from L2. A program walks down a band of rows: each row of z is activated once for each
    of the three columns of the stencil and added to the sums of the up to three outputs that see
    it, which stay in registers.
    """
    channel_blocks = tl.cdiv(channels, BLOCK_C)
    column_blocks = tl.cdiv(out_width, BLOCK_WIDTH)
    bands = tl.cdiv(out_height, band)
    tile = tl.program_id(0) // channel_blocks
    channel = (tl.program_id(0) % channel_blocks) * BLOCK_C + tl.arange(0, BLOCK_C)
    column = (tile % column_blocks) * BLOCK_WIDTH + tl.arange(0, BLOCK_WIDTH)
    first_row = (tile // column_blocks % bands) * band
    image = (tile // column_blocks // bands).to(tl.int64)
    end_row = tl.minimum(first_row + band, out_height)

    valid = channel < channels
    scale, shift = load_affine(affine_ptr, channel, channels, valid)
    bias = tl.zeros([BLOCK_C], tl.float32)
    if bias_ptr is not None:
        bias += tl.load(bias_ptr + channel, mask=valid, other=0.0)
    taps = _load_taps(taps_ptr, channel, channels)
    source = z_ptr + image * height * width * channels
    target = output_ptr + image * out_height * out_width * channels
    z_column = column * STRIDE - left
    z_row = first_row * STRIDE - top
    mask = (column < out_width)[:, None] & valid[None, :]

    # Sums of the outputs that the rows so far reach and the next row completes: `current`, and
    # at stride 1 `following`, which takes one row more.
    row = _load_row(
        source, z_row, z_column, height, width, channel, channels, scale, shift, ACTIVATION
    )
    current = _weigh(row, taps, 0)
    following = tl.zeros([BLOCK_WIDTH, BLOCK_C], tl.float32)
    if STRIDE == 1:
        row = _load_row(
            source, z_row + 1, z_column, height, width, channel, channels, scale, shift, ACTIVATION
        )
        current += _weigh(row, taps, 1)
        following = _weigh(row, taps, 0)

    # Moments of each pixel column around its first value.
    pilot = tl.zeros([BLOCK_WIDTH, BLOCK_C], tl.float32)
    total = tl.zeros([BLOCK_WIDTH, BLOCK_C], tl.float32)
    squares = tl.zeros([BLOCK_WIDTH, BLOCK_C], tl.float32)
    for out_row in tl.range(first_row, end_row):
        z_row = out_row * STRIDE - top
        if STRIDE == 2:
            row = _load_row(
                source,
                z_row + 1,
                z_column,
                height,
                width,
                channel,
                channels,
                scale,
                shift,
                ACTIVATION,
            )
            current += _weigh(row, taps, 1)
        row = _load_row(
            source, z_row + 2, z_column, height, width, channel, channels, scale, shift, ACTIVATION
        )
        value = activate(current + _weigh(row, taps, 2) + bias[None, :], OUTPUT_ACTIVATION)
        if STRIDE == 1:
            current = following + _weigh(row, taps, 1)
            following = _weigh(row, taps, 0)
        else:
            current = _weigh(row, taps, 0)
        offset = (out_row * out_width + column)[:, None] * channels + channel[None, :]
        tl.store(target + offset, value.to(output_ptr.dtype.element_ty), mask=mask)
        if moments_ptr is not None:
            pilot = tl.where(out_row == first_row, value, pilot)
            total += value - pilot
            squares += (value - pilot) * (value - pilot)
    if moments_ptr is not None:
        rows = end_row - first_row
        columns = tl.minimum(BLOCK_WIDTH, out_width - (tile % column_blocks) * BLOCK_WIDTH)
        mean = tl.where(mask, pilot + total / rows, 0.0)
        tile_mean = tl.sum(mean, 0) / columns
        difference = mean - tile_mean[None, :]
        deviations = squares - total * total / rows + rows * difference * difference
        deviation = tl.sum(tl.where(mask, deviations, 0.0), 0)
        store_moments(moments_ptr, tile, channel, channels, tile_mean, deviation)


@tunable
def depthwise(
    z: Tensor,
    affine: Tensor | None,
    activation: str,
    taps: Tensor,
    bias: Tensor | None,
    output_activation: str,
    stencil: Stencil,
    measure: bool,
) -> tuple[Tensor, Moments | None]:
    """output_activation(convolution of activation(z scale + shift) by taps, + bias).

    z: [B*H*W, E]; affine: float32 (scale, shift) [2, E]; taps: float32 [9, E]; bias: float32 [E].
    Returns [B*H_out*W_out, E] and, to measure, its moments.
    """
    channels = z.shape[1]
    blocks = depthwise_blocks("depthwise", z, channels, stencil)
    out_height, out_width = stencil.out_height, stencil.out_width
    cut = Tiles(out_height, out_width, blocks.band, blocks.width)
    tiles = cut.of_images(stencil.batch)
    output = z.new_empty((stencil.batch * out_height * out_width, channels))
    moments = z.new_empty((tiles, 2, channels), dtype=torch.float32) if measure else None
    launch(
        depthwise_kernel,
        (tiles * -(-channels // blocks.channels),),
        *(
            *(z, affine, taps, bias, output, moments),
            *(stencil.height, stencil.width, out_height, out_width),
            *(stencil.top, stencil.left, channels, blocks.band),
        ),
        STRIDE=stencil.stride,
        BLOCK_WIDTH=blocks.width,
        BLOCK_C=blocks.channels,
        ACTIVATION=activation,
        OUTPUT_ACTIVATION=output_activation,
        num_warps=blocks.warps,
        num_stages=blocks.stages,
        reads=(z, affine, taps, bias),
        writes=(output, moments),
        flops=2 * 9 * output.numel(),
    )
    return output, None if moments is None else Moments(moments, cut, len(output))
