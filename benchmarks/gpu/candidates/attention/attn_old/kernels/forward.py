"""Triton kernels of window attention: where a window's tokens lie, scores, and the forward pass.

Importing this imports triton. Windows are never copied or padded in memory: each program works out
the map position of its tokens, and masks those beyond the map. Offsets into maps are 64-bit. Tokens
are counted in slots, ROW_SLOTS for each row of the window (`row_slots` in ../launch_table.py): if
that is a power of 2, no integer is divided, which took half of the kernels' instructions.
Scores are kept in units of log 2, so that the softmax is exp2, one instruction.
"""

from __future__ import annotations

import triton
import triton.language as tl

LOG2_E: tl.constexpr = tl.constexpr(1.4426950408889634)

# Arguments that differ from map to map without better code for particular values. The window's
# sizes are constants of a compiled kernel: tokens are divided by them all the time.
SIZES = ["height", "width", "heads"]


@triton.jit
def window_count(height, width, window_height, window_width):
    """Windows that cover a map."""
    return tl.cdiv(height, window_height) * tl.cdiv(width, window_width)


@triton.jit
def token_of(slot, window_height, window_width, ROW_SLOTS: tl.constexpr):
    """Row and column in the window of some slots, and whether a token is there."""
    row, column = slot // ROW_SLOTS, slot % ROW_SLOTS
    return row, column, (row < window_height) & (column < window_width)


@triton.jit
def locate(
    slot, window, height, width, window_height, window_width,
    ROW_SLOTS: tl.constexpr, GRID: tl.constexpr,
):  # fmt: skip
    """Map row and column of a window's slots (row-major, any shape), and which are on the map."""
    window_columns = tl.cdiv(width, window_width)
    window_row = window // window_columns
    window_column = window % window_columns
    token_row, token_column, there = token_of(slot, window_height, window_width, ROW_SLOTS)
    if GRID:
        row = token_row * tl.cdiv(height, window_height) + window_row
        column = token_column * window_columns + window_column
    else:
        row = window_row * window_height + token_row
        column = window_column * window_width + token_column
    valid = there & (row < height) & (column < width)
    return row.to(tl.int64), column.to(tl.int64), valid


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
def table_offset(slot, window_height, window_width, ROW_SLOTS: tl.constexpr):
    """table[key - query] is at the difference of these, plus that of the last token.

    Slots beyond the window count as its last row or column, to stay in the table.
    """
    row = tl.minimum(slot // ROW_SLOTS, window_height - 1)
    column = tl.minimum(slot % ROW_SLOTS, window_width - 1)
    return row * (2 * window_width - 1) + column


@triton.jit
def scores(
    rows, columns, row_slot, column_slot, column_valid, table, scale,
    window_height, window_width, ROW_SLOTS: tl.constexpr,
    ROWS_ARE_QUERIES: tl.constexpr, HAS_TABLE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """log2(e) (scale Q K^T + bias), or its transpose, of a tile; -inf in columns not valid.

    table: this head's, or any pointer if not HAS_TABLE. What is on chip: the tile, and the few
    kilobytes of the table, which stay in the first-level cache.
    """
    values = tl.dot(rows, tl.trans(columns), input_precision=PRECISION) * (scale * LOG2_E)
    if HAS_TABLE:
        row_offset = table_offset(row_slot, window_height, window_width, ROW_SLOTS)[:, None]
        column_offset = table_offset(column_slot, window_height, window_width, ROW_SLOTS)[None, :]
        middle = (window_height - 1) * (2 * window_width - 1) + window_width - 1
        if ROWS_ARE_QUERIES:
            bias = tl.load(table + (middle - row_offset + column_offset))
        else:
            bias = tl.load(table + (middle + row_offset - column_offset))
        values += bias.to(tl.float32) * LOG2_E
    return tl.where(column_valid[None, :], values, float("-inf"))


@triton.jit
def load_keys(
    base, slot, window, stride_row, stride_column, stride_part,
    height, width, window_height, window_width,
    ROW_SLOTS: tl.constexpr, GRID: tl.constexpr, HEAD_DIM: tl.constexpr,
):  # fmt: skip
    """(row, column, whether there, key, value) of some slots; base: q of a map and a head."""
    row, column, valid = locate(
        slot, window, height, width, window_height, window_width, ROW_SLOTS, GRID
    )
    offset = row * stride_row + column * stride_column
    key = load_rows(base + stride_part, offset, valid, HEAD_DIM)
    value = load_rows(base + 2 * stride_part, offset, valid, HEAD_DIM)
    return row, column, valid, key, value


@triton.jit(do_not_specialize=SIZES)
def forward_kernel(
    qkv, table, output, log_sum_exp,
    stride_batch, stride_row, stride_column, stride_part, stride_head,
    scale, heads, height, width, window_height: tl.constexpr, window_width: tl.constexpr,
    ROW_SLOTS: tl.constexpr, GRID: tl.constexpr, HAS_TABLE: tl.constexpr, HEAD_DIM: tl.constexpr,
    BLOCK_QUERIES: tl.constexpr, BLOCK_KEYS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """output = softmax(scale Q K^T + bias) V for one (block of queries, window, head) a program.

    Reads q, k, v once from DRAM (k and v again for each further block of queries, from the
    second-level cache); writes the output once, and a float32 log2-sum-exp per query. Scores,
    weights and the output's accumulator stay in registers.

    Grid: (query blocks * windows * batch, heads).
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
    row, column, query_valid = locate(
        query_slot, window, height, width, window_height, window_width, ROW_SLOTS, GRID
    )
    offset = row * stride_row + column * stride_column
    query = load_rows(base, offset, query_valid, HEAD_DIM)

    largest = tl.full([BLOCK_QUERIES], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_QUERIES], tl.float32)
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
        new_largest = tl.maximum(largest, tl.max(score, 1))
        # Subtracting -inf from -inf, where all keys so far are masked, would make NaN of 0.
        shift = tl.where(new_largest == float("-inf"), 0.0, new_largest)
        correction = tl.exp2(largest - shift)
        weight = tl.exp2(score - shift[:, None])
        total = total * correction + tl.sum(weight, 1)
        sums = sums * correction[:, None]
        sums = tl.dot(weight.to(value.dtype), value, sums, input_precision=PRECISION)
        largest = new_largest

    position = row * width + column
    output += batch * height * width * heads * HEAD_DIM + head * HEAD_DIM
    store_rows(output, position * heads * HEAD_DIM, query_valid, sums / total[:, None], HEAD_DIM)
    log_sum_exp += (batch * heads + head) * height * width
    tl.store(log_sum_exp + position, largest + tl.log2(total), mask=query_valid)
