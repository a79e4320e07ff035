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
    load_keys,
    load_rows,
    locate,
    scores,
    store_rows,
    token_of,
    window_count,
)


@triton.jit
def score_gradient(score, log_sum_exp, delta, weight_gradient, valid):
    """(P, dS) of a tile; zero where not valid, whatever is there."""
    weight = tl.where(valid, tl.exp2(score - log_sum_exp), 0.0)
    return weight, tl.where(valid, weight * (weight_gradient - delta), 0.0)


@triton.jit
def load_queries(
    base, grad_output, log_sum_exp, slot, batch, head, heads, window, stride_row, stride_column,
    height, width, window_height, window_width,
    ROW_SLOTS: tl.constexpr, GRID: tl.constexpr, HEAD_DIM: tl.constexpr,
):  # fmt: skip
    """(query, gradient of the output, log2-sum-exp) of some slots, and where they are.

    That is: whether there, the pixel of the map, offsets of the output and of statistics.
    """
    row, column, valid = locate(
        slot, window, height, width, window_height, window_width, ROW_SLOTS, GRID
    )
    query = load_rows(base, row * stride_row + column * stride_column, valid, HEAD_DIM)
    pixel = row * width + column
    output_offset = ((batch * height * width + pixel) * heads + head) * HEAD_DIM
    gradient = load_rows(grad_output, output_offset, valid, HEAD_DIM)
    statistic = (batch * heads + head) * height * width + pixel
    normalizer = tl.load(log_sum_exp + statistic, mask=valid, other=0.0)
    return query, gradient, normalizer, valid, pixel, output_offset, statistic


@triton.jit
def output_product(gradient, output, output_offset, valid, HEAD_DIM: tl.constexpr):
    """delta of some queries."""
    result = load_rows(output, output_offset, valid, HEAD_DIM)
    return tl.sum(gradient.to(tl.float32) * result.to(tl.float32), 1)


@triton.jit
def slab_tile(
    slab, query_slot, key_slot, window_height, window_width, ROW_SLOTS: tl.constexpr
):  # fmt: skip
    """Pointers into a slab [tokens, tokens], and which are."""
    query_row, query_column, query_there = token_of(
        query_slot, window_height, window_width, ROW_SLOTS
    )
    key_row, key_column, key_there = token_of(key_slot, window_height, window_width, ROW_SLOTS)
    query = query_row * window_width + query_column
    key = key_row * window_width + key_column
    pointers = slab + query[:, None] * (window_height * window_width) + key[None, :]
    return pointers, query_there[:, None] & key_there[None, :]


@triton.jit
def walk_keys(
    query, gradient, normalizer, difference, query_slot, query_valid, slab, adds,
    base, stride_row, stride_column, stride_part, table, scale,
    window, height, width, window_height, window_width,
    ROW_SLOTS: tl.constexpr, GRID: tl.constexpr, HAS_TABLE: tl.constexpr, HEAD_DIM: tl.constexpr,
    BLOCK_QUERIES: tl.constexpr, BLOCK_KEYS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dQ = scale dS K of a block of queries, [BLOCK_QUERIES, HEAD_DIM], over all keys of a window.

    normalizer, difference: log2-sum-exp and delta of the queries. base: q of a map and a head.
    slab [tokens, tokens], if there is one, gets dS, added to what is there if `adds`.
    """
    sums = tl.zeros([BLOCK_QUERIES, HEAD_DIM], tl.float32)
    for start in range(0, window_height * ROW_SLOTS, BLOCK_KEYS):
        key_slot = start + tl.arange(0, BLOCK_KEYS)
        _, _, key_valid, key, value = load_keys(
            base, key_slot, window, stride_row, stride_column, stride_part,
            height, width, window_height, window_width, ROW_SLOTS, GRID, HEAD_DIM,
        )  # fmt: skip
        score = scores(
            query, key, query_slot, key_slot, key_valid, table, scale,
            window_height, window_width, ROW_SLOTS, True, HAS_TABLE, PRECISION,
        )  # fmt: skip
        weight_gradient = tl.dot(gradient, tl.trans(value), input_precision=PRECISION)
        _, grad_score = score_gradient(
            score, normalizer[:, None], difference[:, None], weight_gradient, key_valid[None, :]
        )
        if slab is not None:
            pointers, inside = slab_tile(
                slab, query_slot, key_slot, window_height, window_width, ROW_SLOTS
            )
            total = tl.where(query_valid[:, None], grad_score, 0.0)
            if adds:
                total += tl.load(pointers, mask=inside, other=0.0)
            tl.store(pointers, total, mask=inside)
        sums = tl.dot(grad_score.to(key.dtype), key, sums, input_precision=PRECISION)
    return sums * scale


@triton.jit
def walk_queries(
    key, value, key_slot, grad_output, output, log_sum_exp, delta,
    base, stride_row, stride_column, table, scale,
    batch, head, heads, window, height, width, window_height, window_width,
    ROW_SLOTS: tl.constexpr, GRID: tl.constexpr, HAS_TABLE: tl.constexpr, HEAD_DIM: tl.constexpr,
    BLOCK_QUERIES: tl.constexpr, BLOCK_KEYS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """(dK = scale dS^T Q, dV = P^T G) of a block of keys, [BLOCK_KEYS, HEAD_DIM] each.

    Over all queries of a window. The tile is computed transposed, [keys, queries], as both products
    need it. delta is read, or if None computed from output.
    """
    key_sums = tl.zeros([BLOCK_KEYS, HEAD_DIM], tl.float32)
    value_sums = tl.zeros([BLOCK_KEYS, HEAD_DIM], tl.float32)
    for start in range(0, window_height * ROW_SLOTS, BLOCK_QUERIES):
        query_slot = start + tl.arange(0, BLOCK_QUERIES)
        query, gradient, normalizer, query_valid, _, output_offset, statistic = load_queries(
            base, grad_output, log_sum_exp, query_slot, batch, head, heads, window,
            stride_row, stride_column, height, width, window_height, window_width,
            ROW_SLOTS, GRID, HEAD_DIM,
        )  # fmt: skip
        if delta is not None:
            difference = tl.load(delta + statistic, mask=query_valid, other=0.0)
        else:
            difference = output_product(gradient, output, output_offset, query_valid, HEAD_DIM)
        score = scores(
            key, query, key_slot, query_slot, query_valid, table, scale,
            window_height, window_width, ROW_SLOTS, False, HAS_TABLE, PRECISION,
        )  # fmt: skip
        weight_gradient = tl.dot(value, tl.trans(gradient), input_precision=PRECISION)
        weight, grad_score = score_gradient(
            score, normalizer[None, :], difference[None, :], weight_gradient, query_valid[None, :]
        )
        low = weight.to(gradient.dtype)
        value_sums = tl.dot(low, gradient, value_sums, input_precision=PRECISION)
        key_sums = tl.dot(grad_score.to(query.dtype), query, key_sums, input_precision=PRECISION)
    return key_sums * scale, value_sums


@triton.jit(do_not_specialize=SIZES)
def query_gradient_kernel(
    grad_output, output, log_sum_exp, qkv, table, grad_qkv, delta, sums_of_qkv,
    stride_batch, stride_row, stride_column, stride_part, stride_head,
    scale, heads, height, width, window_height: tl.constexpr, window_width: tl.constexpr,
    ROW_SLOTS: tl.constexpr, GRID: tl.constexpr, HAS_TABLE: tl.constexpr, HEAD_DIM: tl.constexpr,
    BLOCK_QUERIES: tl.constexpr, BLOCK_KEYS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dQ = scale dS K and delta for one (block of queries, window, head) a program.

    Reads q, k, v, output and its gradient once from DRAM; writes dQ once and a float32 delta per
    query. Scores, dP and dQ's accumulator stay in registers.

    sums_of_qkv [query blocks * windows * batch, 3 * heads * HEAD_DIM], or None: what the sums of
    dQ, dK and dV over all tokens are sums of. As rows of P sum to 1 and rows of dS to 0, the sum
    of dV is that of G, and the sum of dK is 0.

    Grid: (query blocks * windows * batch, heads). Maps but qkv are contiguous; grad_qkv has the
    layout of qkv.
    """
    query_blocks = tl.cdiv(window_height * ROW_SLOTS, BLOCK_QUERIES)
    windows = window_count(height, width, window_height, window_width)
    first = tl.program_id(0) % query_blocks * BLOCK_QUERIES
    window = tl.program_id(0) // query_blocks % windows
    batch = (tl.program_id(0) // query_blocks // windows).to(tl.int64)
    head = tl.program_id(1)
    base = qkv + batch * stride_batch + head * stride_head
    if HAS_TABLE:
        table += head * (2 * window_height - 1) * (2 * window_width - 1)

    query_slot = first + tl.arange(0, BLOCK_QUERIES)
    query, gradient, normalizer, query_valid, pixel, output_offset, statistic = load_queries(
        base, grad_output, log_sum_exp, query_slot, batch, head, heads, window,
        stride_row, stride_column, height, width, window_height, window_width,
        ROW_SLOTS, GRID, HEAD_DIM,
    )  # fmt: skip
    difference = output_product(gradient, output, output_offset, query_valid, HEAD_DIM)
    tl.store(delta + statistic, difference, mask=query_valid)
    channel = tl.arange(0, HEAD_DIM)
    if sums_of_qkv is not None:
        sums_of_qkv += tl.program_id(0).to(tl.int64) * 3 * heads * HEAD_DIM + head * stride_head
        # Where P is not finite neither is their sum with it.
        spread = tl.sum(normalizer * 0.0, 0)
        value_sum = tl.sum(gradient.to(tl.float32), 0) + spread
        tl.store(sums_of_qkv + 2 * stride_part + channel, value_sum)

    sums = walk_keys(
        query, gradient, normalizer, difference, query_slot, query_valid, None, False,
        base, stride_row, stride_column, stride_part, table, scale,
        window, height, width, window_height, window_width,
        ROW_SLOTS, GRID, HAS_TABLE, HEAD_DIM, BLOCK_QUERIES, BLOCK_KEYS, PRECISION,
    )  # fmt: skip
    grad_offset = (batch * height * width + pixel) * 3 * heads * HEAD_DIM + head * stride_head
    store_rows(grad_qkv, grad_offset, query_valid, sums, HEAD_DIM)
    if sums_of_qkv is not None:
        total = tl.sum(tl.where(query_valid[:, None], sums, 0.0), 0)
        tl.store(sums_of_qkv + channel, total)
        tl.store(sums_of_qkv + stride_part + channel, total * 0.0)  # likewise


@triton.jit(do_not_specialize=SIZES)
def key_value_gradient_kernel(
    grad_output, log_sum_exp, delta, qkv, table, grad_qkv,
    stride_batch, stride_row, stride_column, stride_part, stride_head,
    scale, heads, height, width, window_height: tl.constexpr, window_width: tl.constexpr,
    ROW_SLOTS: tl.constexpr, GRID: tl.constexpr, HAS_TABLE: tl.constexpr, HEAD_DIM: tl.constexpr,
    BLOCK_QUERIES: tl.constexpr, BLOCK_KEYS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dK = scale dS^T Q and dV = P^T G for one (block of keys, window, head) a program.

    Reads q, k, v, the output's gradient and two float32 per query once from DRAM; writes dK and dV
    once. The tile is computed transposed, [keys, queries], as both products need it; it and the
    two accumulators stay in registers.

    Grid: (key blocks * windows * batch, heads). Layouts as in `query_gradient_kernel`.
    """
    key_blocks = tl.cdiv(window_height * ROW_SLOTS, BLOCK_KEYS)
    windows = window_count(height, width, window_height, window_width)
    first = tl.program_id(0) % key_blocks * BLOCK_KEYS
    window = tl.program_id(0) // key_blocks % windows
    batch = (tl.program_id(0) // key_blocks // windows).to(tl.int64)
    head = tl.program_id(1)
    base = qkv + batch * stride_batch + head * stride_head
    if HAS_TABLE:
        table += head * (2 * window_height - 1) * (2 * window_width - 1)

    key_slot = first + tl.arange(0, BLOCK_KEYS)
    row, column, key_valid, key, value = load_keys(
        base, key_slot, window, stride_row, stride_column, stride_part,
        height, width, window_height, window_width, ROW_SLOTS, GRID, HEAD_DIM,
    )  # fmt: skip

    key_sums, value_sums = walk_queries(
        key, value, key_slot, grad_output, None, log_sum_exp, delta,
        base, stride_row, stride_column, table, scale,
        batch, head, heads, window, height, width, window_height, window_width,
        ROW_SLOTS, GRID, HAS_TABLE, HEAD_DIM, BLOCK_QUERIES, BLOCK_KEYS, PRECISION,
    )  # fmt: skip
    position = batch * height * width + row * width + column
    grad_offset = position * 3 * heads * HEAD_DIM + head * stride_head
    store_rows(grad_qkv + stride_part, grad_offset, key_valid, key_sums, HEAD_DIM)
    store_rows(grad_qkv + 2 * stride_part, grad_offset, key_valid, value_sums, HEAD_DIM)


@triton.jit(do_not_specialize=[*SIZES, "batch_size"])
def bias_gradient_kernel(
    grad_output, log_sum_exp, delta, qkv, table, slabs,
    stride_batch, stride_row, stride_column, stride_part, stride_head,
    scale, heads, height, width, window_height: tl.constexpr, window_width: tl.constexpr,
    batch_size,
    ROW_SLOTS: tl.constexpr, GRID: tl.constexpr, HEAD_DIM: tl.constexpr,
    BLOCK_QUERIES: tl.constexpr, BLOCK_KEYS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """slabs[split, head] += dS over every splits-th window, one tile of [tokens, tokens] a program.

    Reads what `key_value_gradient_kernel` reads (from the second-level cache, where other tiles of
    the same windows run at the time); writes each tile of its slab once, float32. The sum over
    windows stays in registers: no atomics, and always the same order.

    Grid: (query blocks * key blocks, heads, splits).
    """
    key_blocks = tl.cdiv(window_height * ROW_SLOTS, BLOCK_KEYS)
    query_slot = tl.program_id(0) // key_blocks * BLOCK_QUERIES + tl.arange(0, BLOCK_QUERIES)
    key_slot = tl.program_id(0) % key_blocks * BLOCK_KEYS + tl.arange(0, BLOCK_KEYS)
    head = tl.program_id(1)
    table += head * (2 * window_height - 1) * (2 * window_width - 1)
    windows = window_count(height, width, window_height, window_width)

    sums = tl.zeros([BLOCK_QUERIES, BLOCK_KEYS], tl.float32)
    for index in range(tl.program_id(2), batch_size * windows, tl.num_programs(2)):
        window = index % windows
        batch = (index // windows).to(tl.int64)
        base = qkv + batch * stride_batch + head * stride_head
        query, gradient, normalizer, query_valid, _, _, statistic = load_queries(
            base, grad_output, log_sum_exp, query_slot, batch, head, heads, window,
            stride_row, stride_column, height, width, window_height, window_width,
            ROW_SLOTS, GRID, HEAD_DIM,
        )  # fmt: skip
        difference = tl.load(delta + statistic, mask=query_valid, other=0.0)
        _, _, key_valid, key, value = load_keys(
            base, key_slot, window, stride_row, stride_column, stride_part,
            height, width, window_height, window_width, ROW_SLOTS, GRID, HEAD_DIM,
        )  # fmt: skip
        score = scores(
            query, key, query_slot, key_slot, key_valid, table, scale,
            window_height, window_width, ROW_SLOTS, True, True, PRECISION,
        )  # fmt: skip
        weight_gradient = tl.dot(gradient, tl.trans(value), input_precision=PRECISION)
        valid = query_valid[:, None] & key_valid[None, :]
        _, grad_score = score_gradient(
            score, normalizer[:, None], difference[:, None], weight_gradient, valid
        )
        sums += grad_score

    tokens = window_height * window_width
    slabs += (tl.program_id(2) * heads + head).to(tl.int64) * tokens * tokens
    pointers, inside = slab_tile(
        slabs, query_slot, key_slot, window_height, window_width, ROW_SLOTS
    )
    tl.store(pointers, sums, mask=inside)


@triton.jit
def fold_offsets(
    slabs, grad_table, splits, heads, window_height, window_width, table_row, block, head,
    BLOCK_SPLITS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr, BLOCK_OFFSETS: tl.constexpr,
):  # fmt: skip
    """What `fold_table_kernel` computes of a block of offsets in one row of the table."""
    tokens = window_height * window_width
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
