"""Triton kernels of window attention's backward pass: gradients of q, of k and v, of the table.

With P = softmax(S), recomputed from the saved log2-sum-exp, and G the gradient of the output:

    dV = P^T G      dP = G V^T      delta = rowsum(G * output)      dS = P * (dP - delta)
    dQ = scale dS K      dK = scale dS^T Q      dbias = sum of dS over batch and windows

Importing this imports triton.
"""

from __future__ import annotations

import triton
import triton.language as tl

from moat_kernels.ops.window_attention.triton.kernels.forward import (
    SIZES,
    find_window,
    load_keys,
    load_rows,
    locate,
    scores,
    store_rows,
    window_count,
)
from moat_kernels.ops.window_attention.triton.kernels.position_bias import (
    bias_of_head,
    padded_tokens,
)


@triton.jit
def load_queries(
    base, grad_output, log_sum_exp, token, row, column, stride_row, stride_column,
    heads, height, width, window_height, window_width,
    GRID: tl.constexpr, RAGGED: tl.constexpr, LONG: tl.constexpr, HEAD_DIM: tl.constexpr,
):  # fmt: skip
    """(query, gradient of the output, log2-sum-exp, which are there, pixels) of some tokens.

    base, grad_output, log_sum_exp: of a head where the window begins.
    """
    down, right, valid = locate(
        token, row, column, height, width, window_height, window_width, GRID, RAGGED, LONG
    )
    query = load_rows(base, down * stride_row + right * stride_column, valid, HEAD_DIM)
    pixel = down * width + right
    gradient = load_rows(grad_output, pixel * (heads * HEAD_DIM), valid, HEAD_DIM)
    normalizer = tl.load(log_sum_exp + pixel, mask=valid, other=0.0)
    return query, gradient, normalizer, valid, pixel


@triton.jit
def output_product(gradient, output, pixel, valid, heads, HEAD_DIM: tl.constexpr):
    """delta of some queries; output: of a head where the window begins."""
    result = load_rows(output, pixel * (heads * HEAD_DIM), valid, HEAD_DIM)
    return tl.sum(gradient.to(tl.float32) * result.to(tl.float32), 1)


@triton.jit
def score_gradient(
    query, gradient, normalizer, difference, query_valid, key, value, key_valid,
    first_query, first_key, bias, scale, window_height, window_width,
    QUERIES: tl.constexpr, KEYS: tl.constexpr, RAGGED: tl.constexpr,
    BIAS: tl.constexpr, PADDED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """(P, dS) of a tile; zero where there is no token.

    normalizer, difference: log2-sum-exp and delta of the queries.
    """
    score = scores(
        query, key, first_query, first_key, key_valid, bias, scale, window_height, window_width,
        QUERIES, KEYS, RAGGED, BIAS, PADDED, PRECISION,
    )  # fmt: skip
    weight_gradient = tl.dot(gradient, tl.trans(value), input_precision=PRECISION)
    weight = tl.exp2(score - normalizer[:, None])
    result = weight * (weight_gradient - difference[:, None])
    if RAGGED:
        valid = query_valid[:, None] & key_valid[None, :]
        weight, result = tl.where(valid, weight, 0.0), tl.where(valid, result, 0.0)
    return weight, result


@triton.jit
def store_slab(
    slabs, index, first_query, first_key, values,
    PADDED: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """A tile of slabs[index], [PADDED, PADDED]."""
    slabs += index.to(tl.int64) * PADDED * PADDED
    row = (first_query + tl.arange(0, QUERIES)) * PADDED
    tl.store(slabs + row[:, None] + (first_key + tl.arange(0, KEYS))[None, :], values)


@triton.jit
def add_query_gradient(
    sums, query, gradient, normalizer, difference, query_valid, key, value, key_valid,
    first_query, first_key, bias, scale, window_height, window_width,
    QUERIES: tl.constexpr, KEYS: tl.constexpr, RAGGED: tl.constexpr,
    BIAS: tl.constexpr, PADDED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dQ / scale of a block of queries with a block of keys more."""
    _, grad_score = score_gradient(
        query, gradient, normalizer, difference, query_valid, key, value, key_valid,
        first_query, first_key, bias, scale, window_height, window_width,
        QUERIES, KEYS, RAGGED, BIAS, PADDED, PRECISION,
    )  # fmt: skip
    return tl.dot(grad_score.to(key.dtype), key, sums, input_precision=PRECISION)


@triton.jit(do_not_specialize=SIZES)
def query_gradient_kernel(
    grad_output, output, log_sum_exp, qkv, bias, grad_qkv, delta, qkv_sums,
    stride_batch, stride_row, stride_column, stride_part, stride_head,
    scale, heads, height, width, window_height: tl.constexpr, window_width: tl.constexpr,
    GRID: tl.constexpr, RAGGED: tl.constexpr, LONG: tl.constexpr, BIAS: tl.constexpr,
    PADDED: tl.constexpr, HEAD_DIM: tl.constexpr,
    BLOCK_QUERIES: tl.constexpr, BLOCK_KEYS: tl.constexpr,
    REST: tl.constexpr, HELD: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dQ = scale dS K and delta for one (block of queries, window, head) a program.

    Reads q, k, v, output and its gradient once from DRAM; writes dQ once and a float32 delta per
    query. Scores, dP and dQ's accumulator stay in registers. HELD: the loop over blocks of keys is
    unrolled, the last of REST.

    qkv_sums [query blocks * windows * batch, 3 * heads * HEAD_DIM], or None: what the sums of dQ,
    dK and dV over all tokens are sums of. As rows of P sum to 1 and rows of dS to 0, the sum of dV
    is that of G, and the sum of dK is 0.

    Grid: (query blocks * windows * batch, heads). Maps but qkv are contiguous; grad_qkv has the
    layout of qkv.
    """
    TOKENS: tl.constexpr = window_height * window_width
    FULL: tl.constexpr = TOKENS // BLOCK_KEYS * BLOCK_KEYS
    query_blocks = tl.cdiv(TOKENS, BLOCK_QUERIES)
    first = tl.program_id(0) % query_blocks * BLOCK_QUERIES
    batch, row, column = find_window(
        tl.program_id(0) // query_blocks, height, width, window_height, window_width, GRID
    )
    head = tl.program_id(1)
    base = qkv + batch * stride_batch + head * stride_head
    base += row.to(tl.int64) * stride_row + column.to(tl.int64) * stride_column
    origin = row.to(tl.int64) * width + column
    place = (batch * height * width + origin) * heads * HEAD_DIM + head * HEAD_DIM
    statistic = (batch * heads + head) * height * width + origin
    bias = bias_of_head(bias, head, window_height, window_width, BIAS, PADDED)
    query, gradient, normalizer, valid, pixel = load_queries(
        base, grad_output + place, log_sum_exp + statistic, first + tl.arange(0, BLOCK_QUERIES),
        row, column, stride_row, stride_column, heads, height, width, window_height, window_width,
        GRID, RAGGED, LONG, HEAD_DIM,
    )  # fmt: skip
    difference = output_product(gradient, output + place, pixel, valid, heads, HEAD_DIM)
    tl.store(delta + statistic + pixel, difference, mask=valid)
    channel = tl.arange(0, HEAD_DIM)
    if qkv_sums is not None:
        qkv_sums += tl.program_id(0).to(tl.int64) * 3 * heads * HEAD_DIM + head * stride_head
        # Where P is not finite neither is their sum with it.
        spread = tl.sum(normalizer * 0.0, 0)
        value_sum = tl.sum(gradient.to(tl.float32), 0) + spread
        tl.store(qkv_sums + 2 * stride_part + channel, value_sum)

    sums = tl.zeros([BLOCK_QUERIES, HEAD_DIM], tl.float32)
    if HELD:
        for start in tl.static_range(0, TOKENS, BLOCK_KEYS):
            key, value, key_valid, _ = load_keys(
                base, start + tl.arange(0, BLOCK_KEYS if start < FULL else REST), row, column,
                stride_row, stride_column, stride_part,
                height, width, window_height, window_width, GRID, RAGGED, LONG, HEAD_DIM,
            )  # fmt: skip
            sums = add_query_gradient(
                sums, query, gradient, normalizer, difference, valid, key, value, key_valid,
                first, start, bias, scale, window_height, window_width,
                BLOCK_QUERIES, key.shape[0], RAGGED, BIAS, PADDED, PRECISION,
            )  # fmt: skip
    else:
        for start in range(0, TOKENS, BLOCK_KEYS):
            key, value, key_valid, _ = load_keys(
                base, start + tl.arange(0, BLOCK_KEYS), row, column,
                stride_row, stride_column, stride_part,
                height, width, window_height, window_width, GRID, RAGGED, LONG, HEAD_DIM,
            )  # fmt: skip
            sums = add_query_gradient(
                sums, query, gradient, normalizer, difference, valid, key, value, key_valid,
                first, start, bias, scale, window_height, window_width,
                BLOCK_QUERIES, BLOCK_KEYS, RAGGED, BIAS, PADDED, PRECISION,
            )  # fmt: skip
    sums *= scale
    target = grad_qkv + (batch * height * width + origin) * 3 * heads * HEAD_DIM
    target += head * stride_head
    store_rows(target, pixel * (3 * heads * HEAD_DIM), valid, sums, HEAD_DIM)
    if qkv_sums is not None:
        total = tl.sum(tl.where(valid[:, None], sums, 0.0), 0)
        tl.store(qkv_sums + channel, total)
        tl.store(qkv_sums + stride_part + channel, total * 0.0)  # likewise


@triton.jit
def add_key_gradients(
    key_sums, value_sums, key, value, key_valid, query, gradient, normalizer, difference, valid,
    first_query, first_key, bias, scale, window_height, window_width,
    QUERIES: tl.constexpr, KEYS: tl.constexpr, RAGGED: tl.constexpr,
    BIAS: tl.constexpr, PADDED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """(dK / scale, dV) of a block of keys with a block of queries more."""
    weight, grad_score = score_gradient(
        query, gradient, normalizer, difference, valid, key, value, key_valid,
        first_query, first_key, bias, scale, window_height, window_width,
        QUERIES, KEYS, RAGGED, BIAS, PADDED, PRECISION,
    )  # fmt: skip
    low = tl.trans(weight.to(gradient.dtype))
    value_sums = tl.dot(low, gradient, value_sums, input_precision=PRECISION)
    low = tl.trans(grad_score.to(query.dtype))
    key_sums = tl.dot(low, query, key_sums, input_precision=PRECISION)
    return key_sums, value_sums


@triton.jit(do_not_specialize=SIZES)
def key_value_gradient_kernel(
    grad_output, log_sum_exp, delta, qkv, bias, grad_qkv,
    stride_batch, stride_row, stride_column, stride_part, stride_head,
    scale, heads, height, width, window_height: tl.constexpr, window_width: tl.constexpr,
    GRID: tl.constexpr, RAGGED: tl.constexpr, LONG: tl.constexpr, BIAS: tl.constexpr,
    PADDED: tl.constexpr, HEAD_DIM: tl.constexpr,
    BLOCK_QUERIES: tl.constexpr, BLOCK_KEYS: tl.constexpr,
    REST: tl.constexpr, HELD: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dK = scale dS^T Q and dV = P^T G for every groups-th block of keys of a window.

    Reads q, k, v, the output's gradient and two float32 per query once from DRAM (again for each
    further program of a window); writes dK and dV once. Scores and the two accumulators stay in
    registers; P and dS cross shared memory, to be transposed. HELD: q and the gradient stay in
    shared memory. Queries come in blocks of BLOCK_QUERIES, with one of REST at the end.

    Grid: (windows * batch, heads, groups). Layouts as in `query_gradient_kernel`.
    """
    TOKENS: tl.constexpr = window_height * window_width
    FULL: tl.constexpr = TOKENS // BLOCK_QUERIES * BLOCK_QUERIES
    batch, row, column = find_window(
        tl.program_id(0), height, width, window_height, window_width, GRID
    )
    head = tl.program_id(1)
    base = qkv + batch * stride_batch + head * stride_head
    base += row.to(tl.int64) * stride_row + column.to(tl.int64) * stride_column
    origin = row.to(tl.int64) * width + column
    grad_output += (batch * height * width + origin) * heads * HEAD_DIM + head * HEAD_DIM
    log_sum_exp += (batch * heads + head) * height * width + origin
    delta += (batch * heads + head) * height * width + origin
    grad_qkv += (batch * height * width + origin) * 3 * heads * HEAD_DIM + head * stride_head
    bias = bias_of_head(bias, head, window_height, window_width, BIAS, PADDED)
    held = ()
    if HELD:
        for start in tl.static_range(0, TOKENS, BLOCK_QUERIES):
            query, gradient, normalizer, valid, query_pixel = load_queries(
                base, grad_output, log_sum_exp,
                start + tl.arange(0, BLOCK_QUERIES if start < FULL else REST),
                row, column, stride_row, stride_column, heads, height, width,
                window_height, window_width, GRID, RAGGED, LONG, HEAD_DIM,
            )  # fmt: skip
            difference = tl.load(delta + query_pixel, mask=valid, other=0.0)
            held = held + ((query, gradient, normalizer, difference, valid),)  # noqa: RUF005

    step = tl.num_programs(2) * BLOCK_KEYS
    for first in range(tl.program_id(2) * BLOCK_KEYS, TOKENS, step):
        key, value, key_valid, pixel = load_keys(
            base, first + tl.arange(0, BLOCK_KEYS), row, column,
            stride_row, stride_column, stride_part, height, width, window_height, window_width,
            GRID, RAGGED, LONG, HEAD_DIM,
        )  # fmt: skip
        key_sums = tl.zeros([BLOCK_KEYS, HEAD_DIM], tl.float32)
        value_sums = tl.zeros([BLOCK_KEYS, HEAD_DIM], tl.float32)
        if HELD:
            for block in tl.static_range(len(held)):
                query, gradient, normalizer, difference, valid = held[block]
                key_sums, value_sums = add_key_gradients(
                    key_sums, value_sums, key, value, key_valid,
                    query, gradient, normalizer, difference, valid,
                    block * BLOCK_QUERIES, first, bias, scale, window_height, window_width,
                    query.shape[0], BLOCK_KEYS, RAGGED, BIAS, PADDED, PRECISION,
                )  # fmt: skip
        else:
            for start in range(0, TOKENS, BLOCK_QUERIES):
                query, gradient, normalizer, valid, query_pixel = load_queries(
                    base, grad_output, log_sum_exp, start + tl.arange(0, BLOCK_QUERIES),
                    row, column, stride_row, stride_column, heads, height, width,
                    window_height, window_width, GRID, RAGGED, LONG, HEAD_DIM,
                )  # fmt: skip
                difference = tl.load(delta + query_pixel, mask=valid, other=0.0)
                key_sums, value_sums = add_key_gradients(
                    key_sums, value_sums, key, value, key_valid,
                    query, gradient, normalizer, difference, valid, start, first, bias, scale,
                    window_height, window_width,
                    BLOCK_QUERIES, BLOCK_KEYS, RAGGED, BIAS, PADDED, PRECISION,
                )  # fmt: skip
        offset = pixel * (3 * heads * HEAD_DIM)
        store_rows(grad_qkv + stride_part, offset, key_valid, key_sums * scale, HEAD_DIM)
        store_rows(grad_qkv + 2 * stride_part, offset, key_valid, value_sums, HEAD_DIM)


@triton.jit(do_not_specialize=[*SIZES, "batch_size"])
def bias_gradient_kernel(
    grad_output, log_sum_exp, delta, qkv, bias, slabs,
    stride_batch, stride_row, stride_column, stride_part, stride_head,
    scale, heads, height, width, window_height: tl.constexpr, window_width: tl.constexpr,
    batch_size,
    GRID: tl.constexpr, RAGGED: tl.constexpr, LONG: tl.constexpr, BIAS: tl.constexpr,
    PADDED: tl.constexpr, HEAD_DIM: tl.constexpr,
    BLOCK_QUERIES: tl.constexpr, BLOCK_KEYS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """slabs[split, head] += dS over every splits-th window, one tile of [tokens, tokens] a program.

    Reads what `key_value_gradient_kernel` reads (from the second-level cache, where other bias of
    the same windows run at the time); writes each tile of its slab once, float32. The sum over
    windows stays in registers: no atomics, and always the same order.

    Grid: (query blocks * key blocks, heads, splits).
    """
    TOKENS: tl.constexpr = window_height * window_width
    key_blocks = tl.cdiv(TOKENS, BLOCK_KEYS)
    first_query = tl.program_id(0) // key_blocks * BLOCK_QUERIES
    first_key = tl.program_id(0) % key_blocks * BLOCK_KEYS
    head = tl.program_id(1)
    bias = bias_of_head(bias, head, window_height, window_width, BIAS, PADDED)
    windows = window_count(height, width, window_height, window_width)

    sums = tl.zeros([BLOCK_QUERIES, BLOCK_KEYS], tl.float32)
    for index in range(tl.program_id(2), batch_size * windows, tl.num_programs(2)):
        batch, row, column = find_window(index, height, width, window_height, window_width, GRID)
        base = qkv + batch * stride_batch + head * stride_head
        base += row.to(tl.int64) * stride_row + column.to(tl.int64) * stride_column
        origin = row.to(tl.int64) * width + column
        place = (batch * height * width + origin) * heads * HEAD_DIM + head * HEAD_DIM
        statistic = (batch * heads + head) * height * width + origin
        query, gradient, normalizer, query_valid, pixel = load_queries(
            base, grad_output + place, log_sum_exp + statistic,
            first_query + tl.arange(0, BLOCK_QUERIES), row, column,
            stride_row, stride_column, heads, height, width,
            window_height, window_width, GRID, RAGGED, LONG, HEAD_DIM,
        )  # fmt: skip
        difference = tl.load(delta + statistic + pixel, mask=query_valid, other=0.0)
        key, value, key_valid, _ = load_keys(
            base, first_key + tl.arange(0, BLOCK_KEYS), row, column,
            stride_row, stride_column, stride_part,
            height, width, window_height, window_width, GRID, RAGGED, LONG, HEAD_DIM,
        )  # fmt: skip
        _, grad_score = score_gradient(
            query, gradient, normalizer, difference, query_valid, key, value, key_valid,
            first_query, first_key, bias, scale, window_height, window_width,
            BLOCK_QUERIES, BLOCK_KEYS, RAGGED, BIAS, PADDED, PRECISION,
        )  # fmt: skip
        sums += grad_score
    store_slab(
        slabs, tl.program_id(2) * heads + head, first_query, first_key, sums,
        PADDED, BLOCK_QUERIES, BLOCK_KEYS,
    )  # fmt: skip


@triton.jit
def fold_offsets(
    slabs, grad_table, splits, heads, window_height, window_width, table_row, block, head,
    BLOCK_SPLITS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr, BLOCK_OFFSETS: tl.constexpr,
):  # fmt: skip
    """What `fold_table_kernel` computes of a block of offsets in one row of the table."""
    tokens = padded_tokens(window_height * window_width)
    row_offset = table_row - (window_height - 1)
    table_column = block * BLOCK_OFFSETS + tl.arange(0, BLOCK_OFFSETS)
    column_offset = table_column - (window_width - 1)
    sums = tl.zeros([BLOCK_SPLITS, BLOCK_COLUMNS, BLOCK_OFFSETS], tl.float32)
    for first_split in range(0, splits, BLOCK_SPLITS):
        split = first_split + tl.arange(0, BLOCK_SPLITS)
        slab = slabs + ((split * heads + head).to(tl.int64) * tokens * tokens)[:, None, None]
        for row in range(tl.maximum(0, -row_offset), tl.minimum(0, -row_offset) + window_height):
            for first in range(0, window_width, BLOCK_COLUMNS):
                column = first + tl.arange(0, BLOCK_COLUMNS)
                key_column = column[:, None] + column_offset[None, :]
                query = (row * window_width + column)[:, None]
                key = (row + row_offset) * window_width + key_column
                inside = (column < window_width)[:, None] & (key_column >= 0)
                inside &= key_column < window_width
                pointers = slab + (query * tokens + key)[None, :, :]
                mask = (split < splits)[:, None, None] & inside[None, :, :]
                sums += tl.load(pointers, mask=mask, other=0.0)
    table_width = 2 * window_width - 1
    line = head * (2 * window_height - 1) + table_row
    tl.store(
        grad_table + line * table_width + table_column,
        tl.sum(tl.sum(sums, 0), 0).to(grad_table.dtype.element_ty),
        mask=table_column < table_width,
    )


@triton.jit(do_not_specialize=["splits", "heads", "window_height", "window_width"])
def fold_table_kernel(
    slabs, grad_table, splits, heads, window_height, window_width,
    BLOCK_SPLITS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr, BLOCK_OFFSETS: tl.constexpr,
):  # fmt: skip
    """grad_table[head, offset] = sum of slabs[:, head, query, key] with key - query = offset.

    Reads every slab once; writes the table's gradient once. Fixed order of summation.

    Grid: (offsets by row, blocks of offsets by column, heads).
    """
    fold_offsets(
        slabs, grad_table, splits, heads, window_height, window_width,
        tl.program_id(0), tl.program_id(1), tl.program_id(2),
        BLOCK_SPLITS, BLOCK_COLUMNS, BLOCK_OFFSETS,
    )  # fmt: skip
