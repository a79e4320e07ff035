"""Backward of the expand convolution and of both norms beside it, without reading z1.

In training z1 = d Wf^T of d = x - its mean, Wf = W diag(s) (kernels/fold.py), and the norm behind
it gives dz1 = a dy1 + b z1 + c with sum(dz1) = 0. So with two sums over rows

    P = dy1^T d  [E, C]       S = d^T d  [C, C]

    dz1^T d = F = diag(a) P + diag(b) Wf S                         expand_gradient.py
    dW = F diag(s)                 ds = column sums of F * W
    dx = dy1 diag(a) Wf + d M + constant                           expand_input
         M = Wf^T diag(b) Wf + diag(what pre_norm's variance adds)

where the constant makes dx sum to 0. Only dy1 is read of what is E-wide. Rows are multiplied about
their pilot, by `rest` off their mean: kernels/fold.py says why. Where expand_norm does not
measure its batch b = 0 and S is not needed; where pre_norm does not either, M is not.

The gradient of the shortcut's weight is a sum of products over rows as P is, and as wide as x: the
same launch makes it.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from moat_kernels.ops.mbconv.triton.kernels.expand_gradient import ExpandGradient
from moat_kernels.ops.mbconv.triton.launch_table import (
    dot_precision,
    gemm_blocks,
    reduction_splits,
    statistics_depth,
    statistics_precision,
    sum_splits,
)
from moat_kernels.ops.triton_support.launching import launch, tunable


@triton.jit
def _sum_products(
    left_ptr, left_width, left, left_pilot, rows_ptr, channels, channel, pilot, begin, end,
    CENTRE_LEFT: tl.constexpr, CENTRE: tl.constexpr, BLOCK_LEFT: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_ROWS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """(left - left_pilot)^T (rows - pilot) of a range of rows, and of some columns of each."""
    products = tl.zeros([BLOCK_LEFT, BLOCK_C], tl.float32)
    for start in tl.range(begin, end, BLOCK_ROWS):
        row = start + tl.arange(0, BLOCK_ROWS)
        valid_row = (row < end)[:, None]
        offset = row.to(tl.int64)[:, None]
        a = tl.load(
            left_ptr + offset * left_width + left[None, :],
            mask=valid_row & (left < left_width)[None, :],
            other=0.0,
        )
        if CENTRE_LEFT:
            centred = tl.where(valid_row, a.to(tl.float32) - left_pilot[None, :], 0.0)
            a = centred.to(a.dtype)
        b = tl.load(
            rows_ptr + offset * channels + channel[None, :],
            mask=valid_row & (channel < channels)[None, :],
            other=0.0,
        )
        if CENTRE:
            b = tl.where(valid_row, b.to(tl.float32) - pilot[None, :], 0.0).to(b.dtype)
        products = tl.dot(tl.trans(a), b, products, input_precision=PRECISION)
    return products


@triton.jit
def _store_lines(partial_ptr, split, lines, line, valid_line, channel, channels, products):
    offset = (split.to(tl.int64) * lines + line)[:, None] * channels + channel[None, :]
    mask = valid_line[:, None] & (channel < channels)[None, :]
    tl.store(partial_ptr + offset, products, mask=mask)


@triton.jit
def expand_products_kernel(
    grad_ptr,  # [N, E]: dy1
    rows_ptr,  # [N, C]
    pilot_ptr,  # [C] float32
    output_grad_ptr,  # [M, C_out]; or None
    shortcut_ptr,  # [M, C], given with it
    partial_ptr,  # [splits, lines, C] float32
    count,
    shortcut_count,
    wide,
    out_channels,
    channels,
    chunk,
    shortcut_chunk,
    lines,
    GRAM: tl.constexpr,
    BLOCK_WIDE: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """partial = dy1^T d, below it, if GRAM, d^T d, over a chunk of rows d, and below that
    output_grad^T shortcut over a chunk of theirs.

    Reads dy1 (E-wide), rows and shortcut (C-wide) and output_grad (C_out-wide); tiles of the same
    rows run side by side, so that all but the first find them in L2.
    """
    channel_blocks = tl.cdiv(channels, BLOCK_C)
    block, split = tl.program_id(0) // channel_blocks, tl.program_id(1)
    channel = (tl.program_id(0) % channel_blocks) * BLOCK_C + tl.arange(0, BLOCK_C)
    pilot = tl.load(pilot_ptr + channel, mask=channel < channels, other=0.0)
    begin, end = split * chunk, tl.minimum(count, (split + 1) * chunk)
    wide_blocks = tl.cdiv(wide, BLOCK_WIDE)
    if output_grad_ptr is not None:
        first_block = wide_blocks + GRAM * tl.cdiv(channels, BLOCK_WIDE)
        if block >= first_block:
            left = (block - first_block) * BLOCK_WIDE + tl.arange(0, BLOCK_WIDE)
            begin = split * shortcut_chunk
            products = _sum_products(
                output_grad_ptr, out_channels, left, pilot, shortcut_ptr, channels, channel, pilot,
                begin, tl.minimum(shortcut_count, begin + shortcut_chunk),
                False, False, BLOCK_WIDE, BLOCK_C, BLOCK_ROWS, PRECISION,
            )  # fmt: skip
            line, valid_line = lines - out_channels + left, left < out_channels
            _store_lines(partial_ptr, split, lines, line, valid_line, channel, channels, products)
            return
    if block < wide_blocks:
        left = block * BLOCK_WIDE + tl.arange(0, BLOCK_WIDE)
        line, valid_line = left, left < wide
        if tl.max(tl.abs(pilot), 0) > 0.0:
            products = _sum_products(
                grad_ptr, wide, left, pilot, rows_ptr, channels, channel, pilot, begin, end,
                False, True, BLOCK_WIDE, BLOCK_C, BLOCK_ROWS, PRECISION,
            )  # fmt: skip
        else:  # the usual case: both factors go from memory into the product as they are
            products = _sum_products(
                grad_ptr, wide, left, pilot, rows_ptr, channels, channel, pilot, begin, end,
                False, False, BLOCK_WIDE, BLOCK_C, BLOCK_ROWS, PRECISION,
            )  # fmt: skip
    else:
        left = (block - wide_blocks) * BLOCK_WIDE + tl.arange(0, BLOCK_WIDE)
        line, valid_line = wide + left, left < channels
        left_pilot = tl.load(pilot_ptr + left, mask=valid_line, other=0.0)
        products = _sum_products(
            rows_ptr, channels, left, left_pilot, rows_ptr, channels, channel, pilot, begin, end,
            True, True, BLOCK_WIDE, BLOCK_C, BLOCK_ROWS, PRECISION,
        )  # fmt: skip
    _store_lines(partial_ptr, split, lines, line, valid_line, channel, channels, products)


@tunable
def expand_products(
    grad: Tensor,
    rows: Tensor,
    pilot: Tensor,
    gram: bool,
    shortcut: tuple[Tensor, Tensor] | None,
) -> tuple[Tensor, Tensor | None]:
    """dy1^T d, float32 [E, C], and with `gram` d^T d [C, C] below it; d = rows - pilot.

    And the gradient of the shortcut's weight, float32 [C_out, C], where `shortcut` is given.
    grad: dy1 [N, E]; rows: [N, C]; pilot: float32 [C]; shortcut: the output's gradient [M, C_out]
    and its own rows [M, C], both in the dtype of dy1.
    """
    (count, wide), channels = grad.shape, rows.shape[1]
    blocks = gemm_blocks("expand_products", grad, wide, channels, count)
    output_grad, shortcut_rows = (None, None) if shortcut is None else shortcut
    shortcut_count, out_channels = (0, 0) if output_grad is None else output_grad.shape
    heights = (wide, channels if gram else 0, out_channels)
    left_blocks = sum(-(-height // blocks.rows) for height in heights)
    tiles = left_blocks * -(-channels // blocks.columns)
    splits, chunk = reduction_splits(count, tiles, blocks.depth)
    shortcut_chunk = -(-shortcut_count // (splits * blocks.depth)) * blocks.depth
    lines = sum(heights)
    partial = grad.new_empty((splits, lines, channels), dtype=torch.float32)
    launch(
        expand_products_kernel,
        (tiles, splits),
        *(grad, rows, pilot, output_grad, shortcut_rows, partial, count, shortcut_count),
        *(wide, out_channels, channels, chunk, shortcut_chunk, lines),
        GRAM=gram,
        BLOCK_WIDE=blocks.rows,
        BLOCK_C=blocks.columns,
        BLOCK_ROWS=blocks.depth,
        PRECISION=dot_precision(grad),
        num_warps=blocks.warps,
        num_stages=blocks.stages,
        reads=(grad, rows, pilot, output_grad, shortcut_rows),
        writes=(partial,),
        flops=2 * channels * (count * (lines - out_channels) + shortcut_count * out_channels),
    )
    products = sum_splits(partial)
    if output_grad is None:
        return products, None
    return products[: lines - out_channels], products[lines - out_channels :]


@triton.jit
def _load_square(matrix_ptr, inner, channel, channels):
    return tl.load(
        matrix_ptr + inner.to(tl.int64)[:, None] * channels + channel[None, :],
        mask=(inner < channels)[:, None] & (channel < channels)[None, :],
        other=0.0,
    )


@triton.jit
def _add_correction(
    products, rows_ptr, row_offset, valid_row, pilot_ptr, correction_ptr, left_over_ptr,
    channels, channel, CENTRE: tl.constexpr, BLOCK_INNER: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """products + (rows - pilot) (correction + left_over), which is None in float32."""
    for start in tl.range(0, channels, BLOCK_INNER):
        inner = start + tl.arange(0, BLOCK_INNER)
        valid_inner = inner < channels
        rows = tl.load(
            rows_ptr + row_offset * channels + inner[None, :],
            mask=valid_row[:, None] & valid_inner[None, :],
            other=0.0,
        )
        correction = _load_square(correction_ptr, inner, channel, channels)
        if CENTRE:
            pilot = tl.load(pilot_ptr + inner, mask=valid_inner, other=0.0)
            rows = (rows.to(tl.float32) - pilot[None, :]).to(correction.dtype)
        products = tl.dot(rows, correction, products, input_precision=PRECISION)
        if left_over_ptr is not None:
            left_over = _load_square(left_over_ptr, inner, channel, channels)
            products = tl.dot(rows, left_over, products, input_precision=PRECISION)
    return products


@triton.jit
def expand_input_kernel(
    grad_ptr,  # [N, E]: dy1
    weight_ptr,  # [E, C]
    rows_ptr,  # [N, C], given with the correction
    pilot_ptr,  # [C] float32, given with the correction
    correction_ptr,  # [1, C, C] float32, [2, C, C] bfloat16, or None
    constant_ptr,  # [C] float32, given with the correction
    addend_ptr,  # [N, C], [N / 4, C] where POOLED, or None
    output_ptr,  # [N, C]
    count,
    wide,
    channels,
    width,
    POOLED: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_WIDE: tl.constexpr,
    BLOCK_INNER: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr,
    PRECISION: tl.constexpr,
    CORRECTION_PRECISION: tl.constexpr,
):
    """output = dy1 weight + (rows - pilot) correction + constant + addend.

    POOLED: a quarter of the addend at the pixel that a 2x2 pool takes the row's to, of maps of even
    sizes and `width`.
    Reads dy1 (E-wide), rows and addend (C-wide), and writes C-wide; blocks of the same rows run
    side by side.
    """
    channel_blocks = tl.cdiv(channels, BLOCK_C)
    row = (tl.program_id(0) // channel_blocks) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    channel = (tl.program_id(0) % channel_blocks) * BLOCK_C + tl.arange(0, BLOCK_C)
    valid_row, valid_channel = row < count, channel < channels
    mask = valid_row[:, None] & valid_channel[None, :]
    row_offset = row.to(tl.int64)[:, None]
    offset = row_offset * channels + channel[None, :]
    products = tl.zeros([BLOCK_ROWS, BLOCK_C], tl.float32)
    if addend_ptr is not None:
        share = 1.0
        addend_offset = offset
        if POOLED:
            share = 0.25
            pooled = (row // width // 2) * (width // 2) + row % width // 2
            addend_offset = pooled.to(tl.int64)[:, None] * channels + channel[None, :]
        addend = tl.load(addend_ptr + addend_offset, mask=mask, other=0.0)
        products += share * addend.to(tl.float32)
    if correction_ptr is not None:
        constant = tl.load(constant_ptr + channel, mask=valid_channel, other=0.0)
        products += constant[None, :]
        if correction_ptr.dtype.element_ty == tl.bfloat16:
            whole = tl.arange(0, BLOCK_CHANNELS)
            pilot = tl.load(pilot_ptr + whole, mask=whole < channels, other=0.0)
            left_over_ptr = correction_ptr + channels * channels
            if tl.max(tl.abs(pilot), 0) > 0.0:
                products = _add_correction(
                    products, rows_ptr, row_offset, valid_row, pilot_ptr, correction_ptr,
                    left_over_ptr, channels, channel, True, BLOCK_INNER, CORRECTION_PRECISION,
                )  # fmt: skip
            else:
                products = _add_correction(
                    products, rows_ptr, row_offset, valid_row, pilot_ptr, correction_ptr,
                    left_over_ptr, channels, channel, False, BLOCK_INNER, CORRECTION_PRECISION,
                )  # fmt: skip
        else:
            products = _add_correction(
                products, rows_ptr, row_offset, valid_row, pilot_ptr, correction_ptr, None,
                channels, channel, True, BLOCK_INNER, CORRECTION_PRECISION,
            )  # fmt: skip
    for start in tl.range(0, wide, BLOCK_WIDE):
        column = start + tl.arange(0, BLOCK_WIDE)
        valid_column = column < wide
        grad = tl.load(
            grad_ptr + row_offset * wide + column[None, :],
            mask=valid_row[:, None] & valid_column[None, :],
            other=0.0,
        )
        weight = tl.load(
            weight_ptr + column.to(tl.int64)[:, None] * channels + channel[None, :],
            mask=valid_column[:, None] & valid_channel[None, :],
            other=0.0,
        )
        products = tl.dot(grad, weight, products, input_precision=PRECISION)
    tl.store(output_ptr + offset, products.to(output_ptr.dtype.element_ty), mask=mask)


@tunable
def expand_input(
    grad: Tensor,
    gradient: ExpandGradient,
    rows: Tensor,
    pilot: Tensor,
    addend: Tensor | None,
    width: int,
    dtype: torch.dtype,
) -> Tensor:
    """The gradient of x [N, C] in `dtype`, plus addend [N, C] or what a 2x2 pool of it gets.

    grad: dy1 [N, E]; rows: [N, C], of maps of `width`; pilot: float32 [C]; addend: [N / 4, C] if
    it is to be spread over 2x2 pixels.
    """
    (count, wide), channels = grad.shape, rows.shape[1]
    blocks = gemm_blocks("expand_input", grad, count, channels, wide)
    output = rows.new_empty((count, channels), dtype=dtype)
    correction, constant = gradient.correction, gradient.constant
    planes, inner = 0, blocks.depth
    if correction is not None:
        planes = len(correction)
        if correction.dtype == torch.float32:
            inner = min(inner, statistics_depth(grad))
    corrected = (None, None) if correction is None else (rows, pilot)
    reads = (grad, gradient.scaled, *corrected, correction, constant, addend)
    launch(
        expand_input_kernel,
        (-(-count // blocks.rows) * -(-channels // blocks.columns),),
        *(*reads, output, count, wide, channels, width),
        POOLED=addend is not None and len(addend) != count,
        BLOCK_ROWS=blocks.rows,
        BLOCK_C=blocks.columns,
        BLOCK_WIDE=blocks.depth,
        BLOCK_INNER=inner,
        BLOCK_CHANNELS=triton.next_power_of_2(channels),
        PRECISION=dot_precision(grad),
        CORRECTION_PRECISION=statistics_precision(grad),
        num_warps=blocks.warps,
        num_stages=blocks.stages,
        reads=reads,
        writes=(output,),
        flops=2 * count * channels * (wide + planes * channels),
    )
    return output
