"""Triton kernel of window attention's backward pass in one, for small windows.

What it computes is in backward.py. Importing this imports triton.
"""

from __future__ import annotations

import triton
import triton.language as tl

from attn_old.kernels.backward import (
    load_queries,
    output_product,
    walk_keys,
    walk_queries,
)
from attn_old.kernels.forward import (
    SIZES,
    load_keys,
    store_rows,
    window_count,
)


@triton.jit
def add_sum(target, values, valid, adds, HEAD_DIM: tl.constexpr):
    """target [HEAD_DIM] becomes the sum of valid rows of values [rows, HEAD_DIM], or adds it."""
    pointers = target + tl.arange(0, HEAD_DIM)
    total = tl.sum(tl.where(valid[:, None], values, 0.0), 0)
    tl.debug_barrier()  # other threads of this program may have written what is read
    if adds:
        total += tl.load(pointers)
    tl.store(pointers, total)


@triton.jit(do_not_specialize=[*SIZES, "batch_size"])
def gradient_kernel(
    grad_output, output, log_sum_exp, qkv, table, grad_qkv, slabs, qkv_sums,
    stride_batch, stride_row, stride_column, stride_part, stride_head,
    scale, heads, height, width, window_height: tl.constexpr, window_width: tl.constexpr,
    batch_size,
    ROW_SLOTS: tl.constexpr, GRID: tl.constexpr, HAS_TABLE: tl.constexpr, HEAD_DIM: tl.constexpr,
    BLOCK_HELD: tl.constexpr, BLOCK_WALKED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dQ, dK, dV of every splits-th window of a head, and what they add to other gradients.

    slabs [splits, heads, tokens, tokens] (or None) are sums of dS over a program's windows, and
    qkv_sums [splits, 3 * heads * HEAD_DIM] (or None), packed as qkv, of dQ, dK, dV over tokens too.

    Reads q, k, v, output and its gradient and a float32 per query once from DRAM; writes dQ, dK and
    dV once. A window's keys are held block by block, while its queries pass; then its queries,
    while its keys pass: scores are computed twice, as the accumulators of all of its dQ have no
    room beside a tile. Each program adds to its own slab, which stays in the second-level cache: no
    atomics, and always the same order.

    Grid: (splits, heads). Maps but qkv are contiguous; grad_qkv has the layout of qkv.
    """
    tokens = window_height * window_width
    windows = window_count(height, width, window_height, window_width)
    split = tl.program_id(0)
    head = tl.program_id(1)
    if HAS_TABLE:
        table += head * (2 * window_height - 1) * (2 * window_width - 1)
    if slabs is not None:
        slabs += (split * heads + head).to(tl.int64) * tokens * tokens
    if qkv_sums is not None:
        qkv_sums += split.to(tl.int64) * 3 * heads * HEAD_DIM + head * stride_head

    for index in range(split, batch_size * windows, tl.num_programs(0)):
        window = index % windows
        batch = (index // windows).to(tl.int64)
        base = qkv + batch * stride_batch + head * stride_head
        grad_base = grad_qkv + batch * height * width * 3 * heads * HEAD_DIM + head * stride_head
        for first in range(0, window_height * ROW_SLOTS, BLOCK_HELD):
            slot = first + tl.arange(0, BLOCK_HELD)
            row, column, valid, key, value = load_keys(
                base, slot, window, stride_row, stride_column, stride_part,
                height, width, window_height, window_width, ROW_SLOTS, GRID, HEAD_DIM,
            )  # fmt: skip
            key_gradient, value_gradient = walk_queries(
                key, value, slot, grad_output, output, log_sum_exp, None,
                base, stride_row, stride_column, table, scale,
                batch, head, heads, window, height, width, window_height, window_width,
                ROW_SLOTS, GRID, HAS_TABLE, HEAD_DIM, BLOCK_WALKED, BLOCK_HELD, PRECISION,
            )  # fmt: skip
            grad_offset = (row * width + column) * 3 * heads * HEAD_DIM
            store_rows(grad_base + stride_part, grad_offset, valid, key_gradient, HEAD_DIM)
            store_rows(grad_base + 2 * stride_part, grad_offset, valid, value_gradient, HEAD_DIM)
            if qkv_sums is not None:
                adds = (index != split) | (first > 0)
                add_sum(qkv_sums + stride_part, key_gradient, valid, adds, HEAD_DIM)
                add_sum(qkv_sums + 2 * stride_part, value_gradient, valid, adds, HEAD_DIM)
        for first in range(0, window_height * ROW_SLOTS, BLOCK_HELD):
            slot = first + tl.arange(0, BLOCK_HELD)
            query, gradient, normalizer, valid, pixel, output_offset, _ = load_queries(
                base, grad_output, log_sum_exp, slot, batch, head, heads, window, stride_row,
                stride_column, height, width, window_height, window_width,
                ROW_SLOTS, GRID, HEAD_DIM,
            )  # fmt: skip
            difference = output_product(gradient, output, output_offset, valid, HEAD_DIM)
            query_gradient = walk_keys(
                query, gradient, normalizer, difference, slot, valid, slabs, index != split,
                base, stride_row, stride_column, stride_part, table, scale,
                window, height, width, window_height, window_width,
                ROW_SLOTS, GRID, HAS_TABLE, HEAD_DIM, BLOCK_HELD, BLOCK_WALKED, PRECISION,
            )  # fmt: skip
            grad_offset = pixel * 3 * heads * HEAD_DIM
            store_rows(grad_base, grad_offset, valid, query_gradient, HEAD_DIM)
            if qkv_sums is not None:
                adds = (index != split) | (first > 0)
                add_sum(qkv_sums, query_gradient, valid, adds, HEAD_DIM)
        if slabs is not None:
            tl.debug_barrier()  # as in add_sum
