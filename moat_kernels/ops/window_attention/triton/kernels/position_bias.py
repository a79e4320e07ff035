"""Triton kernel of window attention: the position bias of every pair of tokens, laid out for reuse.

The bias of a head is a function of where two tokens lie to each other. Looking it up for each score
of each window cost more instructions than the softmax. So it is spread out once per call, into
tiles [heads, tokens, tokens] that all windows read, mostly from the first- and second-level cache.

A tile is stored in the order in which a tensor core's sum lies in the registers of a warp: 16 rows
by 8 columns, thread t of 32 having columns 2 (t % 4) and the next of rows t / 4 and t / 4 + 8. Each
thread's share of `2 * VECTOR` columns is one vector of 16 bytes. So nothing crosses shared memory
between there and the scores. On a GPU with another order it would, and be as right.

Tiles of windows beyond some size would take too much memory: there the bias is looked up.

Importing this imports triton.
"""

from __future__ import annotations

import triton
import triton.language as tl

LOG2_E: tl.constexpr = tl.constexpr(1.4426950408889634)

# float16 beyond its range: far more than any difference of scores, and not infinite.
LARGEST_HALF: tl.constexpr = tl.constexpr(65504.0)


@triton.jit
def padded_tokens(tokens):
    """Rows and columns of a tile, and of a slab, for windows of so many tokens."""
    return tl.where(tokens > 64, tl.cdiv(tokens, 128) * 128, 64)


@triton.jit
def look_up(table, row, column, window_height, window_width):
    """log2(e) table[column - row] of a head, for tokens of a window; -inf beyond it."""
    tokens = window_height * window_width
    there = (row < tokens) & (column < tokens)
    down = column // window_width - row // window_width + window_height - 1
    right = column % window_width - row % window_width + window_width - 1
    values = tl.load(table + down * (2 * window_width - 1) + right, mask=there, other=0.0)
    return tl.where(there, values.to(tl.float32) * LOG2_E, float("-inf"))


@triton.jit
def on_table(token, window_width):
    """Where a token lies if rows of the window are as long as those of the table.

    So the offset of two tokens is a difference. No division but one of scalars: exact for token *
    window_width < 2**31.
    """
    inverse = tl.cast(0x7FFFFFFF // window_width + 1, tl.uint32)
    row = tl.cast(tl.umulhi(2 * tl.cast(token, tl.uint32), inverse), tl.int32)
    return token + row * (window_width - 1)


@triton.jit
def spread_block(
    table, tiles, program, window_height, window_width,
    PADDED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """What a program of `spread_bias_kernel` computes."""
    VECTOR: tl.constexpr = 128 // tiles.dtype.element_ty.primitive_bitwidth
    UNIT: tl.constexpr = 32 * VECTOR
    UNITS: tl.constexpr = PADDED // (2 * VECTOR)
    head, block = program // (PADDED * PADDED // BLOCK), program % (PADDED * PADDED // BLOCK)
    # The units of a block lie beside each other. What depends on the program is kept apart from
    # what is known when compiling, so that the elements of a thread share their arithmetic.
    first_row = block // (UNITS * UNIT // BLOCK) * 16
    first_column = block % (UNITS * UNIT // BLOCK) * (BLOCK // UNIT * 2 * VECTOR)
    index = tl.arange(0, BLOCK)
    unit, lane, element = index // UNIT, index % UNIT // VECTOR, index % VECTOR
    row = first_row + element // 2 % 2 * 8 + lane // 4
    column = first_column + unit * (2 * VECTOR) + element // 4 * 8 + lane % 4 * 2 + element % 2
    # As `look_up`, in fewer instructions and more registers.
    tokens = window_height * window_width
    there = (row < tokens) & (column < tokens)
    offset = on_table(column, window_width) - on_table(row, window_width)
    first = head * (2 * window_height - 1) * (2 * window_width - 1)
    first += on_table(tokens - 1, window_width)
    values = tl.load(table + (first + offset), mask=there, other=0.0)
    values = tl.where(there, values.to(tl.float32) * LOG2_E, float("-inf"))
    if tiles.dtype.element_ty == tl.float16:
        finite = tl.minimum(tl.maximum(values, -LARGEST_HALF), LARGEST_HALF)
        # What is infinite or no number stays so.
        values = tl.where(tl.abs(values) < float("inf"), finite, values)
    tiles += head.to(tl.int64) * PADDED * PADDED + block * BLOCK
    tl.store(tiles + index, values.to(tiles.dtype.element_ty))


@triton.jit
def spread_bias_kernel(
    table, tiles, window_height: tl.constexpr, window_width: tl.constexpr,
    PADDED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """tiles[head, query, key] = log2(e) table[head, key - query], -inf beyond the window.

    Reads the table from the first-level cache; writes the tiles once. float16 tiles saturate.

    Grid: blocks of heads * PADDED * PADDED elements.
    """
    spread_block(table, tiles, tl.program_id(0), window_height, window_width, PADDED, BLOCK)


@triton.jit
def bias_of_head(bias, head, window_height, window_width, BIAS: tl.constexpr, PADDED: tl.constexpr):
    """A head's share of what `scores` takes."""
    if BIAS == "tiles":
        bias += head.to(tl.int64) * PADDED * PADDED
    elif BIAS == "table":
        bias += head * (2 * window_height - 1) * (2 * window_width - 1)
    return bias


@triton.jit
def bias_tile(
    tiles, first_row, first_column,
    PADDED: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """[ROWS, COLUMNS] of one head's tiles in float32, from multiples of 16 on."""
    VECTOR: tl.constexpr = 128 // tiles.dtype.element_ty.primitive_bitwidth
    UNIT: tl.constexpr = 32 * VECTOR
    WIDE: tl.constexpr = COLUMNS // (2 * VECTOR)
    down = (first_row // 16 + tl.arange(0, ROWS // 16)) * (PADDED // (2 * VECTOR) * UNIT)
    pointers = tiles + down[:, None, None] + tl.arange(0, UNIT)[None, None, :]
    # Added last, what is known when compiling becomes part of the load's instruction.
    right = (first_column // (2 * VECTOR) + tl.arange(0, WIDE)) * UNIT
    values = tl.load(pointers + right[None, :, None])
    values = tl.reshape(values, [ROWS // 16, WIDE, 8, 4, VECTOR // 4, 2, 2])
    values = tl.permute(values, [0, 5, 2, 1, 4, 3, 6])
    return tl.reshape(values, [ROWS, COLUMNS]).to(tl.float32)
