"""Triton kernel of window attention's backward pass in one, for small windows.

What it computes is in backward.py. Importing this imports triton.
"""

from __future__ import annotations

import triton
import triton.language as tl

from moat_kernels.ops.window_attention.triton.kernels.backward import (
    load_queries,
    output_product,
    score_gradient,
    store_slab,
)
from moat_kernels.ops.window_attention.triton.kernels.forward import (
    SIZES,
    find_window,
    load_keys,
    store_rows,
    window_count,
)
from moat_kernels.ops.window_attention.triton.kernels.position_bias import bias_of_head


@triton.jit
def zero_blocks(ROWS: tl.constexpr, BLOCKS: tl.constexpr, BLOCK_KEYS: tl.constexpr):
    """Zeros for every block of keys, [ROWS, BLOCK_KEYS] each: a tuple."""
    blocks = ()
    for _ in tl.static_range(BLOCKS):
        blocks = blocks + (tl.zeros([ROWS, BLOCK_KEYS], tl.float32),)  # noqa: RUF005
    return blocks


@triton.jit
def fold_rows(values, ROWS: tl.constexpr, HEAD_DIM: tl.constexpr):
    """Sums of rows 8 apart, two by two: those that a thread has of a tensor core's sum."""
    return tl.sum(tl.reshape(values, [ROWS // 16, 2, 8, HEAD_DIM]), 1)


@triton.jit
def store_total(target, totals, ROWS: tl.constexpr, HEAD_DIM: tl.constexpr):
    """target [HEAD_DIM] = sum of what `fold_rows` left."""
    total = tl.sum(tl.reshape(totals, [ROWS // 2, HEAD_DIM]), 0)
    tl.store(target + tl.arange(0, HEAD_DIM), total)


@triton.jit(do_not_specialize=[*SIZES, "batch_size"])
def gradient_kernel(
    grad_output, output, log_sum_exp, qkv, bias, grad_qkv, slabs, qkv_sums,
    stride_batch, stride_row, stride_column, stride_part, stride_head,
    scale, heads, height, width, window_height: tl.constexpr, window_width: tl.constexpr,
    batch_size,
    GRID: tl.constexpr, RAGGED: tl.constexpr, LONG: tl.constexpr, BIAS: tl.constexpr,
    PADDED: tl.constexpr, HEAD_DIM: tl.constexpr,
    BLOCK_QUERIES: tl.constexpr, BLOCK_KEYS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dQ, dK, dV of every splits-th window of a head, and what they add to other gradients.

    A block of queries is a whole window, so that blocks of keys are done one after the other.

    slabs [splits, heads, PADDED, PADDED] (or None) are sums of dS over a program's windows, and
    qkv_sums [splits, 3 * heads * HEAD_DIM] (or None), packed as qkv, of dQ, dK, dV over tokens too.

    Reads q, k, v, output and its gradient and a float32 per query once from DRAM; writes dQ, dK and
    dV once, and the sums, which stay in registers: no atomics, and always the same order. Compiled
    without fusing multiplications and additions: dS is rounded once for its product and its sum,
    instead of waiting for the latter in two registers.

    Grid: (splits, heads). Maps but qkv are contiguous; grad_qkv has the layout of qkv.
    """
    TOKENS: tl.constexpr = window_height * window_width
    BLOCKS: tl.constexpr = (TOKENS + BLOCK_KEYS - 1) // BLOCK_KEYS
    windows = window_count(height, width, window_height, window_width)
    split = tl.program_id(0)
    head = tl.program_id(1)
    bias = bias_of_head(bias, head, window_height, window_width, BIAS, PADDED)
    score_sums = ()
    if slabs is not None:
        score_sums = zero_blocks(BLOCK_QUERIES, BLOCKS, BLOCK_KEYS)
    if qkv_sums is not None:
        query_totals = tl.zeros([BLOCK_QUERIES // 16, 8, HEAD_DIM], tl.float32)
        key_totals = tl.zeros([BLOCK_KEYS // 16, 8, HEAD_DIM], tl.float32)
        value_totals = tl.zeros([BLOCK_KEYS // 16, 8, HEAD_DIM], tl.float32)

    for index in range(split, batch_size * windows, tl.num_programs(0)):
        # 0, which the compiler does not see: it would keep offsets of all tokens in registers from
        # window to window, and spill them.
        zero = index >> 31
        batch, row, column = find_window(index, height, width, window_height, window_width, GRID)
        base = qkv + batch * stride_batch + head * stride_head
        base += row.to(tl.int64) * stride_row + column.to(tl.int64) * stride_column
        origin = row.to(tl.int64) * width + column
        target = grad_qkv + (batch * height * width + origin) * 3 * heads * HEAD_DIM
        target += head * stride_head
        place = (batch * height * width + origin) * heads * HEAD_DIM + head * HEAD_DIM
        statistic = (batch * heads + head) * height * width + origin
        query, gradient, normalizer, valid, pixel = load_queries(
            base, grad_output + place, log_sum_exp + statistic,
            zero + tl.arange(0, BLOCK_QUERIES),
            row, column, stride_row, stride_column, heads, height, width,
            window_height, window_width, GRID, RAGGED, LONG, HEAD_DIM,
        )  # fmt: skip
        difference = output_product(gradient, output + place, pixel, valid, heads, HEAD_DIM)
        sums = tl.zeros([BLOCK_QUERIES, HEAD_DIM], tl.float32)
        added = ()
        for block in tl.static_range(BLOCKS):
            key, value, key_valid, key_pixel = load_keys(
                base, block * BLOCK_KEYS + zero + tl.arange(0, BLOCK_KEYS), row, column,
                stride_row, stride_column, stride_part,
                height, width, window_height, window_width, GRID, RAGGED, LONG, HEAD_DIM,
            )  # fmt: skip
            weight, grad_score = score_gradient(
                query, gradient, normalizer, difference, valid, key, value, key_valid,
                0, block * BLOCK_KEYS, bias, scale, window_height, window_width,
                BLOCK_QUERIES, BLOCK_KEYS, RAGGED, BIAS, PADDED, PRECISION,
            )  # fmt: skip
            if slabs is not None:
                added = added + (score_sums[block] + grad_score,)  # noqa: RUF005
            low = weight.to(gradient.dtype)
            value_gradient = tl.dot(tl.trans(low), gradient, input_precision=PRECISION)
            low = grad_score.to(query.dtype)
            key_gradient = tl.dot(tl.trans(low), query, input_precision=PRECISION) * scale
            sums = tl.dot(low, key, sums, input_precision=PRECISION)
            offset = key_pixel * (3 * heads * HEAD_DIM)
            store_rows(target + stride_part, offset, key_valid, key_gradient, HEAD_DIM)
            store_rows(target + 2 * stride_part, offset, key_valid, value_gradient, HEAD_DIM)
            if qkv_sums is not None:
                key_totals += fold_rows(key_gradient, BLOCK_KEYS, HEAD_DIM)
                value_totals += fold_rows(value_gradient, BLOCK_KEYS, HEAD_DIM)
        score_sums = added
        sums *= scale
        store_rows(target, pixel * (3 * heads * HEAD_DIM), valid, sums, HEAD_DIM)
        if qkv_sums is not None:
            query_totals += fold_rows(sums, BLOCK_QUERIES, HEAD_DIM)

    if slabs is not None:
        for block in tl.static_range(BLOCKS):
            store_slab(
                slabs, split * heads + head, 0, block * BLOCK_KEYS, score_sums[block],
                PADDED, BLOCK_QUERIES, BLOCK_KEYS,
            )  # fmt: skip
    if qkv_sums is not None:
        qkv_sums += split.to(tl.int64) * 3 * heads * HEAD_DIM + head * stride_head
        store_total(qkv_sums, query_totals, BLOCK_QUERIES, HEAD_DIM)
        store_total(qkv_sums + stride_part, key_totals, BLOCK_KEYS, HEAD_DIM)
        store_total(qkv_sums + 2 * stride_part, value_totals, BLOCK_KEYS, HEAD_DIM)
