"""Triton kernels of window attention: where a window's tokens lie, scores, and the forward pass.

Importing this imports triton. Windows are never copied or padded in memory: each program works out
the map position of its tokens, and masks those beyond the map. Offsets of maps are 64-bit.
Scores are kept in units of log 2, so that the softmax is exp2, one instruction.
"""

from __future__ import annotations

import triton
import triton.language as tl

from moat_kernels.ops.window_attention.triton.kernels.position_bias import (
    LOG2_E,
    bias_of_head,
    bias_tile,
    look_up,
)

# Arguments that differ from map to map without better code for particular values. The window's
# sizes are constants of a compiled kernel: tokens are divided by them.
SIZES = ["height", "width", "heads"]


@triton.jit
def window_count(height, width, window_height, window_width):
    """Windows that cover a map."""
    return tl.cdiv(height, window_height) * tl.cdiv(width, window_width)


@triton.jit
def find_window(index, height, width, window_height, window_width, GRID: tl.constexpr):
    """(batch, row and column of the map) where a window begins, counted over maps and windows."""
    windows = window_count(height, width, window_height, window_width)
    window_columns = tl.cdiv(width, window_width)
    row, column = index % windows // window_columns, index % windows % window_columns
    if not GRID:
        row, column = row * window_height, column * window_width
    return (index // windows).to(tl.int64), row, column


@triton.jit
def locate(
    token, row, column, height, width, window_height, window_width,
    GRID: tl.constexpr, RAGGED: tl.constexpr, LONG: tl.constexpr,
):  # fmt: skip
    """Rows and columns of a window's tokens (row-major, any shape), and which are on the map.

    row, column: where the window begins; rows and columns are counted from there. RAGGED: whether
    windows reach beyond the map. LONG: whether offsets into one map need 64 bits.
    """
    down, right = token // window_width, token % window_width
    valid = down < window_height
    if GRID:
        down *= tl.cdiv(height, window_height)
        right *= tl.cdiv(width, window_width)
    if RAGGED:
        valid &= (row + down < height) & (column + right < width)
    if LONG:
        down, right = down.to(tl.int64), right.to(tl.int64)
    return down, right, valid


@triton.jit
def load_rows(base, offset, valid, HEAD_DIM: tl.constexpr):
    """[tokens, HEAD_DIM] from memory, zero where not valid."""
    pointers = base + offset[:, None] + tl.arange(0, HEAD_DIM)[None, :]
    return tl.load(pointers, mask=valid[:, None], other=0.0)


@triton.jit
def store_rows(base, offset, valid, values, HEAD_DIM: tl.constexpr):
    """[tokens, HEAD_DIM] to memory where valid, in its dtype."""
    pointers = base + offset[:, None] + tl.arange(0, HEAD_DIM)[None, :]
    tl.store(pointers, values.to(base.dtype.element_ty), mask=valid[:, None])


@triton.jit
def scores(
    rows, columns, first_row, first_column, column_valid, bias, scale,
    window_height, window_width,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, RAGGED: tl.constexpr,
    BIAS: tl.constexpr, PADDED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """log2(e) (scale Q K^T + bias) of a tile; -inf in columns not valid.

    bias: of this head, as BIAS says: "tiles" (`spread_bias_kernel`), "table", or "" for none, then
    any pointer. With a bias columns beyond the window are -inf.
    """
    values = tl.dot(rows, tl.trans(columns), input_precision=PRECISION)
    if BIAS == "tiles":
        added = bias_tile(bias, first_row, first_column, PADDED, ROWS, COLUMNS)
        values = tl.fma(values, scale * LOG2_E, added)
    elif BIAS == "table":
        row, column = first_row + tl.arange(0, ROWS), first_column + tl.arange(0, COLUMNS)
        added = look_up(bias, row[:, None], column[None, :], window_height, window_width)
        values = tl.fma(values, scale * LOG2_E, added)
    else:
        values *= scale * LOG2_E
    if RAGGED or BIAS == "":
        values = tl.where(column_valid[None, :], values, float("-inf"))
    return values


@triton.jit
def load_keys(
    base, token, row, column, stride_row, stride_column, stride_part,
    height, width, window_height, window_width,
    GRID: tl.constexpr, RAGGED: tl.constexpr, LONG: tl.constexpr, HEAD_DIM: tl.constexpr,
):  # fmt: skip
    """(key, value, which are there, pixels) of some tokens.

    base: q of a head where the window begins; pixels are counted from there.
    """
    down, right, valid = locate(
        token, row, column, height, width, window_height, window_width, GRID, RAGGED, LONG
    )
    offset = down * stride_row + right * stride_column
    key = load_rows(base + stride_part, offset, valid, HEAD_DIM)
    value = load_rows(base + 2 * stride_part, offset, valid, HEAD_DIM)
    return key, value, valid, down * width + right


@triton.jit
def load_all_keys(
    base, row, column, stride_row, stride_column, stride_part,
    height, width, window_height: tl.constexpr, window_width: tl.constexpr,
    GRID: tl.constexpr, RAGGED: tl.constexpr, LONG: tl.constexpr, HEAD_DIM: tl.constexpr,
    BLOCK_KEYS: tl.constexpr, REST: tl.constexpr,
):  # fmt: skip
    """(keys, values, which are there) of a window, each a tuple of blocks."""
    FULL: tl.constexpr = window_height * window_width // BLOCK_KEYS * BLOCK_KEYS
    keys, values, valids = (), (), ()
    for start in tl.static_range(0, FULL, BLOCK_KEYS):
        key, value, valid, _ = load_keys(
            base, start + tl.arange(0, BLOCK_KEYS), row, column,
            stride_row, stride_column, stride_part, height, width, window_height, window_width,
            GRID, RAGGED, LONG, HEAD_DIM,
        )  # fmt: skip
        keys, values, valids = keys + (key,), values + (value,), valids + (valid,)  # noqa: RUF005
    if REST > 0:
        key, value, valid, _ = load_keys(
            base, FULL + tl.arange(0, REST), row, column, stride_row, stride_column, stride_part,
            height, width, window_height, window_width, GRID, RAGGED, LONG, HEAD_DIM,
        )  # fmt: skip
        keys, values, valids = keys + (key,), values + (value,), valids + (valid,)  # noqa: RUF005
    return keys, values, valids


@triton.jit
def attend(
    state, query, key, value, valid, first_query, first_key, bias, scale,
    window_height, window_width,
    FIRST: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr, RAGGED: tl.constexpr,
    BIAS: tl.constexpr, PADDED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """(largest score, sum of weights, weighted sum of values) with a block of keys more.

    FIRST: whether it is the first, so that there is nothing to correct.
    """
    largest, total, sums = state
    score = scores(
        query, key, first_query, first_key, valid, bias, scale, window_height, window_width,
        QUERIES, KEYS, RAGGED, BIAS, PADDED, PRECISION,
    )  # fmt: skip
    new_largest = tl.maximum(largest, tl.max(score, 1))
    # Subtracting -inf from -inf, where all keys so far are masked, would make NaN of 0.
    shift = tl.where(new_largest == float("-inf"), 0.0, new_largest)
    weight = tl.exp2(score - shift[:, None])
    low = weight.to(value.dtype)
    if FIRST:
        total = tl.sum(weight, 1)
        sums = tl.dot(low, value, input_precision=PRECISION)
    else:
        correction = tl.exp2(largest - shift)
        total = total * correction + tl.sum(weight, 1)
        sums = tl.dot(low, value, sums * correction[:, None], input_precision=PRECISION)
    return new_largest, total, sums


@triton.jit(do_not_specialize=SIZES)
def forward_kernel(
    qkv, bias, output, log_sum_exp,
    stride_batch, stride_row, stride_column, stride_part, stride_head,
    scale, heads, height, width, window_height: tl.constexpr, window_width: tl.constexpr,
    GRID: tl.constexpr, RAGGED: tl.constexpr, LONG: tl.constexpr, BIAS: tl.constexpr,
    PADDED: tl.constexpr, HEAD_DIM: tl.constexpr,
    BLOCK_QUERIES: tl.constexpr, BLOCK_KEYS: tl.constexpr,
    REST: tl.constexpr, HELD: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """output = softmax(scale Q K^T + bias) V for every groups-th block of queries of a window.

    Reads q, k, v once from DRAM, k and v again for each further program of the window; writes the
    output once, and a float32 log2-sum-exp per query. Scores, weights and the output's accumulator
    stay in registers. HELD: so do k and v in shared memory. Keys come in blocks of BLOCK_KEYS, with
    one of REST at the end.

    Grid: (windows * batch, heads, groups).
    """
    TOKENS: tl.constexpr = window_height * window_width
    FULL: tl.constexpr = TOKENS // BLOCK_KEYS * BLOCK_KEYS
    batch, row, column = find_window(
        tl.program_id(0), height, width, window_height, window_width, GRID
    )
    head = tl.program_id(1)
    base = qkv + batch * stride_batch + head * stride_head
    base += row.to(tl.int64) * stride_row + column.to(tl.int64) * stride_column
    origin = row.to(tl.int64) * width + column
    output += (batch * height * width + origin) * heads * HEAD_DIM + head * HEAD_DIM
    log_sum_exp += (batch * heads + head) * height * width + origin
    bias = bias_of_head(bias, head, window_height, window_width, BIAS, PADDED)
    if HELD:
        keys, values, valids = load_all_keys(
            base, row, column, stride_row, stride_column, stride_part,
            height, width, window_height, window_width,
            GRID, RAGGED, LONG, HEAD_DIM, BLOCK_KEYS, REST,
        )  # fmt: skip

    step = tl.num_programs(2) * BLOCK_QUERIES
    for first in range(tl.program_id(2) * BLOCK_QUERIES, TOKENS, step):
        down, right, query_valid = locate(
            first + tl.arange(0, BLOCK_QUERIES), row, column,
            height, width, window_height, window_width, GRID, RAGGED, LONG,
        )  # fmt: skip
        query = load_rows(base, down * stride_row + right * stride_column, query_valid, HEAD_DIM)
        state = (
            tl.full([BLOCK_QUERIES], float("-inf"), tl.float32),
            tl.zeros([BLOCK_QUERIES], tl.float32),
            tl.zeros([BLOCK_QUERIES, HEAD_DIM], tl.float32),
        )
        if HELD:
            for index in tl.static_range(len(keys)):
                state = attend(
                    state, query, keys[index], values[index], valids[index],
                    first, index * BLOCK_KEYS, bias, scale, window_height, window_width,
                    index == 0, BLOCK_QUERIES, keys[index].shape[0],
                    RAGGED, BIAS, PADDED, PRECISION,
                )  # fmt: skip
        else:
            for start in range(0, FULL, BLOCK_KEYS):
                key, value, valid, _ = load_keys(
                    base, start + tl.arange(0, BLOCK_KEYS), row, column,
                    stride_row, stride_column, stride_part,
                    height, width, window_height, window_width, GRID, RAGGED, LONG, HEAD_DIM,
                )  # fmt: skip
                state = attend(
                    state, query, key, value, valid, first, start, bias, scale,
                    window_height, window_width, False, BLOCK_QUERIES, BLOCK_KEYS,
                    RAGGED, BIAS, PADDED, PRECISION,
                )  # fmt: skip
            if REST > 0:
                key, value, valid, _ = load_keys(
                    base, FULL + tl.arange(0, REST), row, column,
                    stride_row, stride_column, stride_part,
                    height, width, window_height, window_width, GRID, RAGGED, LONG, HEAD_DIM,
                )  # fmt: skip
                state = attend(
                    state, query, key, value, valid, first, FULL, bias, scale,
                    window_height, window_width, FULL == 0, BLOCK_QUERIES, REST,
                    RAGGED, BIAS, PADDED, PRECISION,
                )  # fmt: skip

        largest, total, sums = state
        pixel = down * width + right
        result = sums * (1.0 / total)[:, None]
        store_rows(output, pixel * (heads * HEAD_DIM), query_valid, result, HEAD_DIM)
        tl.store(log_sum_exp + pixel, largest + tl.log2(total), mask=query_valid)
