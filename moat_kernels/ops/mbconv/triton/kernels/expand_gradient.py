"""From sums over rows to the gradients of the expand convolution and of pre_norm.

And to what `expand_input` takes. expand_backward.py has the formulas; all here is as small as the
weight.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from moat_kernels.ops.common.batch_norm import NormParameters
from moat_kernels.ops.mbconv.triton.kernels.fold import Folded, Weights
from moat_kernels.ops.mbconv.triton.launch_table import (
    statistics_depth,
    statistics_precision,
    weight_tile,
)
from moat_kernels.ops.triton_support.launching import launch


@triton.jit
def fold_gradient_kernel(
    products_ptr,  # [E, C] float32: P, and below it S [C, C] where MEASURED
    factors_ptr,  # [4, E] float32: a, b, c and the sum of dy1
    pre_ptr,  # [7, C] float32
    weight_ptr,  # [E, C]
    folded_ptr,  # [E, C]
    grad_weight_ptr,  # [E, C]
    scaled_ptr,  # [E, C]: diag(a) Wf
    sums_ptr,  # [blocks of E, 2, C] float32
    count,
    wide,
    channels,
    MEASURED: tl.constexpr,
    BLOCK_WIDE: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_INNER: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """F as expand_backward.py has it; dW; sums over a block of E of F * W, and of the pre_norm's
    output gradient. MEASURED: expand_norm measures its batch.
    """
    column = tl.program_id(0) * BLOCK_WIDE + tl.arange(0, BLOCK_WIDE)
    channel = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    valid_column, valid = column < wide, channel < channels
    mask = valid_column[:, None] & valid[None, :]
    offset = column.to(tl.int64)[:, None] * channels + channel[None, :]
    a = tl.load(factors_ptr + column, mask=valid_column, other=0.0)
    total = tl.load(factors_ptr + 3 * wide + column, mask=valid_column, other=0.0)
    scale = tl.load(pre_ptr + channel, mask=valid, other=0.0)
    rest = tl.load(pre_ptr + 6 * channels + channel, mask=valid, other=0.0)
    folded = tl.load(folded_ptr + offset, mask=mask, other=0.0).to(tl.float32)
    tl.store(scaled_ptr + offset, (folded * a[:, None]).to(scaled_ptr.dtype.element_ty), mask=mask)
    products = tl.load(products_ptr + offset, mask=mask, other=0.0)
    gradient = a[:, None] * (products - total[:, None] * rest[None, :])
    if MEASURED:
        b = tl.load(factors_ptr + wide + column, mask=valid_column, other=0.0)
        through = tl.zeros([BLOCK_WIDE, BLOCK_C], tl.float32)
        for start in tl.range(0, channels, BLOCK_INNER):
            inner = start + tl.arange(0, BLOCK_INNER)
            valid_inner = inner < channels
            left = tl.load(
                folded_ptr + column.to(tl.int64)[:, None] * channels + inner[None, :],
                mask=valid_column[:, None] & valid_inner[None, :],
                other=0.0,
            ).to(tl.float32)
            inner_rest = tl.load(pre_ptr + 6 * channels + inner, mask=valid_inner, other=0.0)
            gram = tl.load(
                products_ptr + (wide + inner)[:, None] * channels + channel[None, :],
                mask=valid_inner[:, None] & valid[None, :],
                other=0.0,
            )
            gram -= count * inner_rest[:, None] * rest[None, :]
            through = tl.dot(left, gram, through, input_precision=PRECISION)
        gradient += b[:, None] * through
    weight = tl.load(weight_ptr + offset, mask=mask, other=0.0).to(tl.float32)
    grad_weight = gradient * scale[None, :]
    shifted = tl.zeros([BLOCK_C], tl.float32)
    if not MEASURED:
        # Nothing takes the mean away again: what shifts z1 has a gradient.
        shift = tl.load(pre_ptr + channels + channel, mask=valid, other=0.0)
        grad_weight += (a * total)[:, None] * shift[None, :]
        shifted = tl.sum((a * total)[:, None] * weight, 0)
    tl.store(grad_weight_ptr + offset, grad_weight.to(grad_weight_ptr.dtype.element_ty), mask=mask)
    target = sums_ptr + tl.program_id(0) * 2 * channels + channel
    tl.store(target, tl.sum(tl.where(mask, gradient * weight, 0.0), 0), mask=valid)
    tl.store(target + channels, shifted, mask=valid)


@triton.jit
def correction_kernel(
    factors_ptr,  # [4, E] float32
    folded_ptr,  # [E, C]
    scaled_ptr,  # [E, C]
    rest_product_ptr,  # [E] float32: Wf rest
    pre_ptr,  # [7, C] float32
    sums_ptr,  # [blocks of E, 2, C] float32
    correction_ptr,  # [C, C] float32, or None
    constant_ptr,  # [C] float32, given with it
    grad_weight_ptr,  # [C]: of pre_norm
    grad_bias_ptr,  # [C]
    parts,
    count,
    wide,
    channels,
    PRE_MEASURED: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_INNER: tl.constexpr,
    BLOCK_PARTS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """M and the constant as expand_backward.py has them, and the gradients of pre_norm.

    One program: a tile of M, or in the last row of programs a block of the vectors.

    In bfloat16 M is two matrices, itself and what rounding left of it: together they hold 16 bits
    of each element, more than TF32 would, and are multiplied as they are.
    """
    first, second = tl.program_id(0), tl.program_id(1)
    left = first * BLOCK_C + tl.arange(0, BLOCK_C)
    channel = second * BLOCK_C + tl.arange(0, BLOCK_C)
    valid_left, valid = left < channels, channel < channels
    scale_parts = tl.zeros([BLOCK_PARTS, BLOCK_C], tl.float32)
    shift_parts = tl.zeros([BLOCK_PARTS, BLOCK_C], tl.float32)
    for start in tl.range(0, parts, BLOCK_PARTS):
        part = start + tl.arange(0, BLOCK_PARTS)
        mask = (part < parts)[:, None] & valid[None, :]
        source = sums_ptr + (part * 2 * channels)[:, None] + channel[None, :]
        scale_parts += tl.load(source, mask=mask, other=0.0)
        shift_parts += tl.load(source + channels, mask=mask, other=0.0)
    grad_scale, grad_shift = tl.sum(scale_parts, 0), tl.sum(shift_parts, 0)
    scale = tl.load(pre_ptr + channel, mask=valid, other=0.0)
    inverse_std = tl.load(pre_ptr + 3 * channels + channel, mask=valid, other=0.0)
    grad_weight = grad_scale * inverse_std
    vectors = first == tl.num_programs(0) - 1
    if vectors:
        tl.store(
            grad_weight_ptr + channel, grad_weight.to(grad_weight_ptr.dtype.element_ty), mask=valid
        )
        tl.store(grad_bias_ptr + channel, grad_shift.to(grad_bias_ptr.dtype.element_ty), mask=valid)
    slope = tl.zeros([BLOCK_C], tl.float32)
    if PRE_MEASURED:
        slope = -scale * inverse_std * grad_weight / count
    if correction_ptr is not None and not vectors:
        matrix = tl.zeros([BLOCK_C, BLOCK_C], tl.float32)
        for start in tl.range(0, wide, BLOCK_INNER):
            column = start + tl.arange(0, BLOCK_INNER)
            valid_column = column < wide
            b = tl.load(factors_ptr + wide + column, mask=valid_column, other=0.0)
            offset = column.to(tl.int64)[:, None] * channels
            left_weight = tl.load(
                folded_ptr + offset + left[None, :],
                mask=valid_column[:, None] & valid_left[None, :],
                other=0.0,
            ).to(tl.float32)
            weight = tl.load(
                folded_ptr + offset + channel[None, :],
                mask=valid_column[:, None] & valid[None, :],
                other=0.0,
            ).to(tl.float32)
            weighted = weight * b[:, None]
            matrix = tl.dot(tl.trans(left_weight), weighted, matrix, input_precision=PRECISION)
        matrix += tl.where(left[:, None] == channel[None, :], slope[None, :], 0.0)
        target = correction_ptr + left.to(tl.int64)[:, None] * channels + channel[None, :]
        rounded = matrix.to(correction_ptr.dtype.element_ty)
        tl.store(target, rounded, mask=valid_left[:, None] & valid[None, :])
        if correction_ptr.dtype.element_ty == tl.bfloat16:
            left_over = (matrix - rounded.to(tl.float32)).to(tl.bfloat16)
            target += channels * channels
            tl.store(target, left_over, mask=valid_left[:, None] & valid[None, :])
    if correction_ptr is not None and vectors:
        rest = tl.load(pre_ptr + 6 * channels + channel, mask=valid, other=0.0)
        constant = -rest * slope
        for start in tl.range(0, wide, BLOCK_INNER):
            column = start + tl.arange(0, BLOCK_INNER)
            valid_column = column < wide
            mask = valid_column[:, None] & valid[None, :]
            offset = column.to(tl.int64)[:, None] * channels + channel[None, :]
            weight = tl.load(folded_ptr + offset, mask=mask, other=0.0).to(tl.float32)
            scaled = tl.load(scaled_ptr + offset, mask=mask, other=0.0).to(tl.float32)
            b = tl.load(factors_ptr + wide + column, mask=valid_column, other=0.0)
            total = tl.load(factors_ptr + 3 * wide + column, mask=valid_column, other=0.0)
            moved = tl.load(rest_product_ptr + column, mask=valid_column, other=0.0)
            removed = (total / count)[:, None] * scaled + (b * moved)[:, None] * weight
            constant -= tl.sum(removed, 0)
        tl.store(constant_ptr + channel, constant, mask=valid)


class ExpandGradient(NamedTuple):
    """Gradients of weights, and what `expand_input` takes."""

    weight: Tensor  # [E, C]
    pre_weight: Tensor  # [C]
    pre_bias: Tensor  # [C]
    scaled: Tensor  # [E, C], in the dtype of the products
    correction: Tensor | None  # [1, C, C] float32, or [2, C, C] bfloat16
    constant: Tensor | None  # [C] float32, given with it


# Columns of a tile of F, and of the sums read at a time by the kernel behind it.
_BLOCK_CHANNELS, _BLOCK_PARTS = 64, 64


def expand_gradient(
    products: Tensor,
    factors: Tensor,
    folded: Folded,
    weights: Weights,
    pre_norm: NormParameters,
    count: int,
    measures: tuple[bool, ...],
) -> ExpandGradient:
    """From the sums over rows to gradients, in the dtypes of the weights.

    products: of `expand_products`, with gram if expand_norm measures its batch. measures: whether
    pre_norm and expand_norm do. factors: float32 (a, b, c, sum of dy1) [4, E]. count: rows.
    """
    wide, channels = folded.expand.shape
    grad_weight, scaled = torch.empty_like(weights.expand), torch.empty_like(folded.expand)
    block_wide, block_correction = weight_tile(wide, channels), weight_tile(channels, channels)
    parts = -(-wide // block_wide)
    sums = factors.new_empty((parts, 2, channels))
    precision, depth = statistics_precision(folded.expand), statistics_depth(folded.expand)
    corrected = any(measures)
    launch(
        fold_gradient_kernel,
        (parts, -(-channels // _BLOCK_CHANNELS)),
        *(products, factors, folded.pre, weights.expand, folded.expand),
        *(grad_weight, scaled, sums, count, wide, channels),
        MEASURED=measures[1],
        BLOCK_WIDE=block_wide,
        BLOCK_C=_BLOCK_CHANNELS,
        BLOCK_INNER=depth,
        PRECISION=precision,
        num_warps=4,
        num_stages=2,
        reads=(products, factors, folded.pre, weights.expand, folded.expand),
        writes=(grad_weight, scaled, sums),
        flops=2 * wide * channels * channels if measures[1] else 0,
    )
    split = folded.expand.dtype == torch.bfloat16
    correction = None
    if corrected:
        dtype = torch.bfloat16 if split else torch.float32
        correction = factors.new_empty((1 + split, channels, channels), dtype=dtype)
    constant = factors.new_empty(channels) if corrected else None
    pre_weight, pre_bias = (
        factors.new_empty(channels, dtype=torch.float32 if owner is None else owner.dtype)
        for owner in (pre_norm.weight, pre_norm.bias)
    )
    blocks = -(-channels // block_correction)
    reads = (factors, folded.expand, scaled, folded.vectors[2], folded.pre, sums)
    writes = (correction, constant, pre_weight, pre_bias)
    launch(
        correction_kernel,
        (blocks + 1 if corrected else 1, blocks),
        *(*reads, *writes, parts, count, wide, channels),
        PRE_MEASURED=measures[0],
        BLOCK_C=block_correction,
        BLOCK_INNER=16 if folded.expand.dtype == torch.float32 else 64,
        BLOCK_PARTS=_BLOCK_PARTS,
        PRECISION=precision,
        num_warps=4,
        num_stages=3,
        reads=reads,
        writes=writes,
        flops=2 * wide * channels * channels if corrected else 0,
    )
    return ExpandGradient(grad_weight, pre_weight, pre_bias, scaled, correction, constant)
