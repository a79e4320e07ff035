"""Triton kernels of the attention half beside those of the norm and of attention.

They do what would be launches of its own for each parameter. Importing this imports triton.
"""

from __future__ import annotations

import triton
import triton.language as tl

from moat_kernels.ops.layer_norm.triton.kernels import locate, normalize_rows
from moat_kernels.ops.window_attention.triton.kernels.backward import fold_offsets
from moat_kernels.ops.window_attention.triton.kernels.position_bias import spread_block

# Arguments without better code for particular values.
WINDOW = ["window_height", "window_width"]


@triton.jit
def cast_block(source, size, low, block, first_block, BLOCK: tl.constexpr):
    """A block of `low`, whose blocks from first_block on are those of source [size]."""
    offset = tl.arange(0, BLOCK)
    index = (block - first_block) * BLOCK + offset
    values = tl.load(source + index, mask=index < size, other=0.0)
    tl.store(low + block.to(tl.int64) * BLOCK + offset, values.to(low.dtype.element_ty))


@triton.jit(do_not_specialize=["rows", "norm_programs", "cast_programs", *WINDOW])
def norm_and_cast_kernel(
    x, weight, bias, normalized, mean, rstd, qkv_weight, qkv_bias, proj_weight, proj_bias, low,
    table, tiles, rows, channels, eps, norm_programs, cast_programs,
    qkv_size, qkv_bias_size, proj_size, proj_bias_size, window_height, window_width,
    BLOCK_ROWS: tl.constexpr, BLOCK_CHANNELS: tl.constexpr, BLOCK_CAST: tl.constexpr,
    PADDED: tl.constexpr, BLOCK_SPREAD: tl.constexpr,
):  # fmt: skip
    """LayerNorm of x [rows, channels], and the linear layers' parameters in low's dtype.

    The first norm_programs programs do what `layer_norm_kernel` does. Each of the next
    cast_programs fills a block of low: the four parameters one after the other, each from the
    beginning of a block on (none if low is None). The others do what `spread_bias_kernel` does
    (none if tiles are None).
    """
    block = tl.program_id(0) - norm_programs
    if block < 0:
        normalize_rows(
            x, weight, bias, normalized, mean, rstd, rows, channels, eps, tl.program_id(0),
            BLOCK_ROWS, BLOCK_CHANNELS,
        )  # fmt: skip
    elif block < cast_programs:
        if low is not None:
            qkv_end = tl.cdiv(qkv_size, BLOCK_CAST)
            qkv_bias_end = qkv_end + tl.cdiv(qkv_bias_size, BLOCK_CAST)
            proj_end = qkv_bias_end + tl.cdiv(proj_size, BLOCK_CAST)
            if block < qkv_end:
                cast_block(qkv_weight, qkv_size, low, block, 0, BLOCK_CAST)
            elif block < qkv_bias_end:
                cast_block(qkv_bias, qkv_bias_size, low, block, qkv_end, BLOCK_CAST)
            elif block < proj_end:
                cast_block(proj_weight, proj_size, low, block, qkv_bias_end, BLOCK_CAST)
            else:
                cast_block(proj_bias, proj_bias_size, low, block, proj_end, BLOCK_CAST)
    elif tiles is not None:
        spread_block(
            table, tiles, block - cast_programs, window_height, window_width, PADDED, BLOCK_SPREAD
        )


@triton.jit(do_not_specialize=["rows", "share", "rows_of_a_sample", "programs", *WINDOW])
def branch_gradient_kernel(
    grad, kept, grad_branch, sums, table, tiles, factor, rows, channels, share, rows_of_a_sample,
    programs, window_height, window_width,
    BLOCK_ROWS: tl.constexpr, BLOCK_CHANNELS: tl.constexpr,
    PADDED: tl.constexpr, BLOCK_SPREAD: tl.constexpr,
):  # fmt: skip
    """grad_branch = grad * kept * factor by rows, and sums [programs, channels] over its rows.

    kept: [samples], or None for all, without the factor. Reads grad once; writes grad_branch once.
    Grid: shares of rows, `programs` of them; behind them what `spread_bias_kernel` does, unless
    tiles are None.
    """
    if tl.program_id(0) >= programs:
        if tiles is not None:
            spread_block(
                table, tiles, tl.program_id(0) - programs, window_height, window_width,
                PADDED, BLOCK_SPREAD,
            )  # fmt: skip
        return
    total = tl.zeros([BLOCK_ROWS, BLOCK_CHANNELS], tl.float32)
    first = tl.program_id(0) * share
    for start in range(first, tl.minimum(first + share, rows), BLOCK_ROWS):
        row = start + tl.arange(0, BLOCK_ROWS)
        offset, inside = locate(row, rows, channels, BLOCK_CHANNELS)
        value = tl.load(grad + offset, mask=inside, other=0.0).to(tl.float32)
        if kept is not None:
            scale = tl.load(kept + row // rows_of_a_sample, mask=row < rows, other=0.0)
            value *= scale.to(tl.float32)[:, None] * factor
        tl.store(grad_branch + offset, value.to(grad_branch.dtype.element_ty), mask=inside)
        total += value
    channel = tl.arange(0, BLOCK_CHANNELS)
    target = sums + tl.program_id(0).to(tl.int64) * channels + channel
    tl.store(target, tl.sum(total, 0), mask=channel < channels)


@triton.jit
def fold_columns(
    sums, rows, stride, gradient, size, block,
    BLOCK_SUMS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr,
):  # fmt: skip
    """A block of gradient [size] = sum of sums [rows, size], in a fixed order."""
    column = block * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    total = tl.zeros([BLOCK_SUMS, BLOCK_COLUMNS], tl.float32)
    for start in range(0, rows, BLOCK_SUMS):
        row = start + tl.arange(0, BLOCK_SUMS)
        inside = (row < rows)[:, None] & (column < size)[None, :]
        offset = row.to(tl.int64)[:, None] * stride + column[None, :]
        total += tl.load(sums + offset, mask=inside, other=0.0)
    result = tl.sum(total, 0).to(gradient.dtype.element_ty)
    tl.store(gradient + column, result, mask=column < size)


@triton.jit(do_not_specialize=["splits", "qkv_rows", "branch_rows", "norm_rows", "heads", *WINDOW])
def fold_sums_kernel(
    qkv_sums, branch_sums, norm_sums, slabs,
    grad_qkv_bias, grad_proj_bias, grad_norm_weight, grad_norm_bias, grad_table,
    qkv_rows, branch_rows, norm_rows, splits, inner, channels,
    heads, window_height, window_width,
    BLOCK_SUMS: tl.constexpr, BLOCK_SUM_COLUMNS: tl.constexpr,
    BLOCK_SPLITS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr, BLOCK_OFFSETS: tl.constexpr,
):  # fmt: skip
    """Gradients that are sums of few rows: of the table (or None), the biases and the norm.

    inner: 3 * heads * head_dim; norm_sums are [norm_rows, 2, channels]. Grid: blocks of qkv's bias,
    of proj's, of the norm's weight and bias, then of the table, as `fold_table_kernel` has them.
    """
    block = tl.program_id(0)
    qkv_end = tl.cdiv(inner, BLOCK_SUM_COLUMNS)
    part = tl.cdiv(channels, BLOCK_SUM_COLUMNS)
    if block < qkv_end:
        fold_columns(
            qkv_sums, qkv_rows, inner, grad_qkv_bias, inner, block, BLOCK_SUMS, BLOCK_SUM_COLUMNS
        )
    elif block < qkv_end + part:
        fold_columns(
            branch_sums, branch_rows, channels, grad_proj_bias, channels, block - qkv_end,
            BLOCK_SUMS, BLOCK_SUM_COLUMNS,
        )  # fmt: skip
    elif block < qkv_end + 2 * part:
        fold_columns(
            norm_sums, norm_rows, 2 * channels, grad_norm_weight, channels, block - qkv_end - part,
            BLOCK_SUMS, BLOCK_SUM_COLUMNS,
        )  # fmt: skip
    elif block < qkv_end + 3 * part:
        fold_columns(
            norm_sums + channels, norm_rows, 2 * channels, grad_norm_bias, channels,
            block - qkv_end - 2 * part, BLOCK_SUMS, BLOCK_SUM_COLUMNS,
        )  # fmt: skip
    elif slabs is not None:
        block -= qkv_end + 3 * part
        blocks = tl.cdiv(2 * window_width - 1, BLOCK_OFFSETS)
        line = block // blocks
        table_height = 2 * window_height - 1
        fold_offsets(
            slabs, grad_table, splits, heads, window_height, window_width,
            line % table_height, block % blocks, line // table_height,
            BLOCK_SPLITS, BLOCK_COLUMNS, BLOCK_OFFSETS,
        )  # fmt: skip
