"""Triton kernels of LayerNorm, forward and backward. Importing this imports triton.

A tile holds whole rows, in registers, so that each is read once. Offsets are 64-bit.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def locate(row, rows, channels, BLOCK_CHANNELS: tl.constexpr):
    """Offsets of rows' elements, and which exist."""
    channel = tl.arange(0, BLOCK_CHANNELS)[None, :]
    offset = row.to(tl.int64)[:, None] * channels + channel
    return offset, (row < rows)[:, None] & (channel < channels)


@triton.jit
def load_channels(pointer, channels, BLOCK_CHANNELS: tl.constexpr):
    """[1, BLOCK_CHANNELS] in float32."""
    channel = tl.arange(0, BLOCK_CHANNELS)
    values = tl.load(pointer + channel, mask=channel < channels, other=0.0)
    return values.to(tl.float32)[None, :]


@triton.jit
def normalize_rows(
    x, weight, bias, normalized, mean, rstd, rows, channels, eps, block,
    BLOCK_ROWS: tl.constexpr, BLOCK_CHANNELS: tl.constexpr,
):  # fmt: skip
    """What `layer_norm_kernel` computes of its block-th block of rows."""
    row = block * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    offset, inside = locate(row, rows, channels, BLOCK_CHANNELS)
    value = tl.load(x + offset, mask=inside, other=0.0).to(tl.float32)
    row_mean = tl.sum(value, 1) / channels
    centred = tl.where(inside, value - row_mean[:, None], 0.0)
    row_rstd = 1.0 / tl.sqrt(tl.sum(centred * centred, 1) / channels + eps)
    scaled = centred * row_rstd[:, None] * load_channels(weight, channels, BLOCK_CHANNELS)
    result = scaled + load_channels(bias, channels, BLOCK_CHANNELS)
    tl.store(normalized + offset, result.to(normalized.dtype.element_ty), mask=inside)
    tl.store(mean + row, row_mean, mask=row < rows)
    tl.store(rstd + row, row_rstd, mask=row < rows)


@triton.jit(do_not_specialize=["rows"])
def layer_norm_kernel(
    x, weight, bias, normalized, mean, rstd, rows, channels, eps,
    BLOCK_ROWS: tl.constexpr, BLOCK_CHANNELS: tl.constexpr,
):  # fmt: skip
    """normalized = (x - mean) rstd weight + bias, rstd = 1 / sqrt(variance + eps), by rows.

    Reads x once, writes normalized once and 8 bytes a row. Grid: blocks of rows.
    """
    normalize_rows(
        x, weight, bias, normalized, mean, rstd, rows, channels, eps, tl.program_id(0),
        BLOCK_ROWS, BLOCK_CHANNELS,
    )  # fmt: skip


@triton.jit(do_not_specialize=["rows", "share"])
def layer_norm_backward_kernel(
    grad, grad_residual, x, weight, mean, rstd, grad_x, sums, rows, channels, share,
    BLOCK_ROWS: tl.constexpr, BLOCK_CHANNELS: tl.constexpr,
):  # fmt: skip
    """grad_x = rstd (g - mean(g) - h mean(g h)) + grad_residual, g = grad weight, by rows.

    h is x normalised, without weight and bias; sums [programs, 2, channels] are those of grad h and
    of grad over a program's `share` of rows, the gradients of weight and bias. Reads grad, x and
    grad_residual (or None) once, writes grad_x once and the sums (or None). Grid: shares.
    """
    scale = load_channels(weight, channels, BLOCK_CHANNELS)
    weight_sum = tl.zeros([BLOCK_ROWS, BLOCK_CHANNELS], tl.float32)
    bias_sum = tl.zeros([BLOCK_ROWS, BLOCK_CHANNELS], tl.float32)
    first = tl.program_id(0) * share
    for start in range(first, tl.minimum(first + share, rows), BLOCK_ROWS):
        row = start + tl.arange(0, BLOCK_ROWS)
        offset, inside = locate(row, rows, channels, BLOCK_CHANNELS)
        gradient = tl.load(grad + offset, mask=inside, other=0.0).to(tl.float32)
        value = tl.load(x + offset, mask=inside, other=0.0).to(tl.float32)
        row_mean = tl.load(mean + row, mask=row < rows, other=0.0)[:, None]
        row_rstd = tl.load(rstd + row, mask=row < rows, other=0.0)[:, None]
        hat = tl.where(inside, (value - row_mean) * row_rstd, 0.0)
        weight_sum += gradient * hat
        bias_sum += gradient
        scaled = gradient * scale
        projection = tl.sum(scaled * hat, 1)[:, None] / channels
        result = (scaled - tl.sum(scaled, 1)[:, None] / channels - hat * projection) * row_rstd
        if grad_residual is not None:
            result += tl.load(grad_residual + offset, mask=inside, other=0.0).to(tl.float32)
        tl.store(grad_x + offset, result.to(grad_x.dtype.element_ty), mask=inside)
    if sums is not None:
        channel = tl.arange(0, BLOCK_CHANNELS)
        target = sums + tl.program_id(0).to(tl.int64) * 2 * channels + channel
        tl.store(target, tl.sum(weight_sum, 0), mask=channel < channels)
        tl.store(target + channels, tl.sum(bias_sum, 0), mask=channel < channels)
