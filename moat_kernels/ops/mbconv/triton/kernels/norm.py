"""A norm behind a convolution: its affine map from tiles' moments, and its backward pass.

forward:   y = z scale + shift              of z + constant, which the convolution gives
backward:  dz = a dy + b z + c              from the sums of dy and dy z over the batch

The launch of the latter keeps few multiprocessors busy: programs beside those of the norm add up
what the pass before it left in parts, the gradients of project's weight and biases, or make the
shortcut's pool (kernels/shortcut.py), which the next pass reads.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from moat_kernels.ops.common.batch_norm import Norm, NormParameters, RunningUpdate
from moat_kernels.ops.mbconv.triton.kernels.moments import Moments, Sums, merge_moments
from moat_kernels.ops.mbconv.triton.kernels.norm_parameters import (
    count_batch,
    optional,
    running_tensors,
    update_running,
)
from moat_kernels.ops.mbconv.triton.kernels.shortcut import (
    BLOCK_POOLED,
    BLOCK_POOLED_C,
    Pooling,
    pool_tile,
)
from moat_kernels.ops.triton_support.launching import launch

# Rows of a norm, float32 [5, C]: scale, shift, centre (the mean of a batch), 1/std, variance.
NORM_ROWS, CENTRE, VARIANCE = 5, 2, 4
# Rows of its backward pass, float32 [4, C]: a, b, c, and the sum of dy.
FACTOR_ROWS = 4
_BLOCK_C = 16
# Parts and elements that a program beside the norm's adds up at a time: of few parts, and of many,
# for which it would else wait for memory too often.
_FEW_ADDED, _MANY_ADDED, _FEW = (4, 512), (32, 32), 16


def _block_parts(parts: int) -> int:
    """How many parts a step loads: what waits for memory wants few steps."""
    return 128 if parts <= 256 else 512


@triton.jit
def norm_kernel(
    norm_ptr,  # [5, C] float32
    moments_ptr,  # [P, 2, C] float32, of z; or None
    weight_ptr,  # [C], or None
    bias_ptr,  # [C], or None
    constant_ptr,  # [C], or None
    running_mean_ptr,  # [C], read where FROZEN, updated where a batch is measured; or None
    running_var_ptr,  # [C]
    tracked_ptr,  # [] int64, or None
    channels, tiles, count, height, width, band, block_width, eps, momentum, correction,
    NORMED: tl.constexpr, FROZEN: tl.constexpr, BLOCK_TILES: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """norm = (scale, shift, centre, 1/std, variance) of z. Reads each tile's moments once."""
    channel = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    valid = channel < channels
    constant = optional(constant_ptr, channel, valid, 0.0)
    if moments_ptr is not None:
        centre, variance = merge_moments(
            moments_ptr, channel, channels, tiles, count, height, width, band, block_width,
            BLOCK_TILES,
        )  # fmt: skip
    else:
        centre = -constant
        variance = tl.zeros([BLOCK_C], tl.float32)
        if FROZEN:
            centre += optional(running_mean_ptr, channel, valid, 0.0)
            variance = optional(running_var_ptr, channel, valid, 0.0)
    inverse_std = tl.full([BLOCK_C], 1.0, tl.float32)
    if NORMED:
        inverse_std = tl.rsqrt(variance + eps)
    scale = inverse_std * optional(weight_ptr, channel, valid, 1.0)
    shift = optional(bias_ptr, channel, valid, 0.0) - centre * scale
    target = norm_ptr + channel
    tl.store(target, scale, mask=valid)
    tl.store(target + channels, shift, mask=valid)
    tl.store(target + 2 * channels, centre, mask=valid)
    tl.store(target + 3 * channels, inverse_std, mask=valid)
    tl.store(target + 4 * channels, variance, mask=valid)
    if not FROZEN and running_mean_ptr is not None:
        update_running(
            running_mean_ptr, running_var_ptr, channel, valid, centre + constant,
            variance * correction, momentum,
        )  # fmt: skip
        if tl.program_id(0) == 0:
            count_batch(tracked_ptr)


def fold_norm(
    norm: Norm | None,
    parameters: NormParameters,
    moments: Moments | None,
    constant: Tensor | None,
    like: Tensor,
    update: RunningUpdate | None,
) -> Tensor:
    """The norm of z + constant as float32 (scale, shift, centre, 1/std, variance) [5, C].

    moments: of z where the norm measures its batch, else None. like: float32 [., C]. update: of
    running statistics, made here.
    """
    channels = like.shape[-1]
    result = like.new_empty((NORM_ROWS, channels))
    frozen = norm is not None and norm.frozen
    running = running_tensors(parameters, frozen, update)
    values = None if moments is None else moments.values
    affine = (parameters.weight, parameters.bias)
    sizes = (1,) * 6
    if moments is not None:
        sizes = (moments.values.shape[0], moments.total, *moments.tiles)
    launch(
        norm_kernel,
        (-(-channels // _BLOCK_C),),
        *(result, values, *affine, constant, *running, channels),
        *sizes,
        1.0 if norm is None else norm.eps,
        *((0.0, 1.0) if update is None else (update.momentum, update.correction)),
        NORMED=norm is not None,
        FROZEN=frozen,
        BLOCK_TILES=_block_parts(sizes[0]),
        BLOCK_C=_BLOCK_C,
        num_warps=16,
        num_stages=1,
        reads=(values, *affine, constant, *running),
        writes=(result, *(() if frozen else running)),
    )
    return result


@triton.jit
def _sum_parts(source, stride, parts, valid, BLOCK_PARTS: tl.constexpr, BLOCK_C: tl.constexpr):
    """The sum of a row of every part, in a fixed order; source: pointers to the first part's."""
    sums = tl.zeros([BLOCK_PARTS, BLOCK_C], tl.float32)
    for start in tl.range(0, parts, BLOCK_PARTS):
        part = start + tl.arange(0, BLOCK_PARTS)
        mask = (part < parts)[:, None] & valid[None, :]
        pointers = source[None, :] + part.to(tl.int64)[:, None] * stride
        sums += tl.load(pointers, mask=mask, other=0.0).to(tl.float32)
    return tl.sum(sums, 0)


@triton.jit
def norm_gradient_kernel(
    sums_ptr,  # [P, ROWS, C]: nine rows for the taps (ROWS = 11), then sums of dy and of dy z
    norm_ptr,  # [5, C] float32
    factors_ptr,  # [4, C] float32: a, b, c and the sum of dy
    grad_weight_ptr,  # [C]
    grad_bias_ptr,  # [C]
    grad_constant_ptr,  # [C]
    grad_taps_ptr,  # [C, 9]
    partial_ptr,  # [splits, size] float32, of another gradient; or None
    added_ptr,  # [size] float32, given with it
    pool_ptr,  # [N, C], of any dtype; or None
    pooled_ptr,  # [N / 4, C], given with it
    parts, channels, count, splits, size, pooled_count, pooled_width, pooled_channels,
    ROWS: tl.constexpr, MEASURED: tl.constexpr, CENTRED: tl.constexpr,
    BLOCK_PARTS: tl.constexpr, BLOCK_C: tl.constexpr,
    BLOCK_SPLITS: tl.constexpr, BLOCK_ADDED: tl.constexpr,
    BLOCK_POOLED: tl.constexpr, BLOCK_POOLED_C: tl.constexpr,
):  # fmt: skip
    """dz = a dy + b z + c, and the gradients of weight, bias, constant (the sum of dz) and taps.

    CENTRED: the last row has z less the norm's centre. One program: one tap of a block of
    channels, or their norm, or a block of added = sum of partial, or a tile of the pool. Reads the
    sums once.
    """
    channel = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    valid = channel < channels
    line = tl.program_id(0)
    source = sums_ptr + channel
    stride = ROWS * channels
    if line > ROWS - 2:
        block = (line - ROWS + 1) * tl.num_programs(1) + tl.program_id(1)
        if pooled_ptr is not None:
            pool_tile(
                block, pool_ptr, pooled_ptr, pooled_count, pooled_width, pooled_channels,
                BLOCK_POOLED, BLOCK_POOLED_C,
            )  # fmt: skip
        if partial_ptr is not None:
            index = block * BLOCK_ADDED + tl.arange(0, BLOCK_ADDED)
            added = _sum_parts(
                partial_ptr + index, size, splits, index < size, BLOCK_SPLITS, BLOCK_ADDED
            )
            tl.store(added_ptr + index, added, mask=index < size)
        return
    if grad_taps_ptr is not None:  # noqa: SIM102  decided at compile time
        if line < ROWS - 2:
            taps = _sum_parts(source + line * channels, stride, parts, valid, BLOCK_PARTS, BLOCK_C)
            target = grad_taps_ptr + channel * 9 + line
            tl.store(target, taps.to(grad_taps_ptr.dtype.element_ty), mask=valid)
    if line == ROWS - 2:
        source += (ROWS - 2) * channels
        total = _sum_parts(source, stride, parts, valid, BLOCK_PARTS, BLOCK_C)
        product = _sum_parts(source + channels, stride, parts, valid, BLOCK_PARTS, BLOCK_C)
        scale = tl.load(norm_ptr + channel, mask=valid, other=0.0)
        centre = tl.load(norm_ptr + 2 * channels + channel, mask=valid, other=0.0)
        inverse_std = tl.load(norm_ptr + 3 * channels + channel, mask=valid, other=0.0)
        if not CENTRED:
            product -= centre * total
        grad_weight = product * inverse_std
        slope = tl.zeros([BLOCK_C], tl.float32)
        constant = slope
        grad_constant = scale * total
        if MEASURED:
            slope = -scale * inverse_std * grad_weight / count
            constant = -scale * total / count - slope * centre
            grad_constant = tl.zeros([BLOCK_C], tl.float32)
        target = factors_ptr + channel
        tl.store(target, scale, mask=valid)
        tl.store(target + channels, slope, mask=valid)
        tl.store(target + 2 * channels, constant, mask=valid)
        tl.store(target + 3 * channels, total, mask=valid)
        tl.store(
            grad_weight_ptr + channel,
            grad_weight.to(grad_weight_ptr.dtype.element_ty),
            mask=valid,
        )
        tl.store(grad_bias_ptr + channel, total.to(grad_bias_ptr.dtype.element_ty), mask=valid)
        tl.store(
            grad_constant_ptr + channel,
            grad_constant.to(grad_constant_ptr.dtype.element_ty),
            mask=valid,
        )


class _Adding(NamedTuple):
    """What a launch adds up beside the norm; nothing of None, or of one part."""

    source: Tensor | None  # [splits, size] float32
    target: Tensor | None  # [size] float32
    splits: int
    size: int
    blocks: tuple[int, int]  # of parts and of elements
    programs: int

    @staticmethod
    def of(partial: Tensor | None) -> _Adding:
        if partial is None or len(partial) == 1:
            return _Adding(None, None, 1, 1, _FEW_ADDED, 0)
        splits, size = partial.shape
        blocks = _FEW_ADDED if splits <= _FEW else _MANY_ADDED
        target = partial.new_empty(size)
        return _Adding(partial, target, splits, size, blocks, -(-size // blocks[1]))


class NormGradient(NamedTuple):
    """What `norm_gradient` computes."""

    factors: Tensor  # float32 [4, C]: a, b, c, sum of dy
    gradients: list[Tensor]  # [C] each: of weight, bias and constant
    taps: Tensor | None  # [C, 9]
    added: Tensor | None  # float32 [size]: the sum of what came in parts


def norm_gradient(
    sums: Sums,
    norm: Tensor,
    parameters: NormParameters,
    constant: Tensor | None,
    taps: Tensor | None,
    count: int,
    measured: bool,
    centred: bool,
    partial: Tensor | None,
    pooling: Pooling,
) -> NormGradient:
    """The backward pass of a norm; beside it the sum of partial [splits, size], float32, or a pool.

    sums: [P, 2, C] of dy and dy z, or [P, 11, C] with the taps' before them; centred: of z less
    `norm`'s centre. count: values of each channel. The gradients of weight, bias and constant have
    the dtypes of these, float32 where they are None.
    """
    values = sums.values
    parts, rows, channels = values.shape
    blocks, adding = -(-channels // _BLOCK_C), _Adding.of(partial)
    factors = norm.new_empty((FACTOR_ROWS, channels))
    owners = (parameters.weight, parameters.bias, constant)
    gradients = [
        norm.new_empty(channels, dtype=torch.float32 if owner is None else owner.dtype)
        for owner in owners
    ]
    grad_taps = None if taps is None else torch.empty_like(taps)
    pooled_channels = 1 if pooling.rows is None else pooling.rows.shape[1]
    launch(
        norm_gradient_kernel,
        (rows - 1 + -(-(adding.programs + pooling.programs) // blocks), blocks),
        *(values, norm, factors, *gradients, grad_taps, adding.source, adding.target),
        *(pooling.rows, pooling.pooled, parts, channels, count, adding.splits, adding.size),
        *(pooling.count, pooling.width, pooled_channels),
        ROWS=rows,
        MEASURED=measured,
        CENTRED=centred,
        BLOCK_PARTS=_block_parts(parts),
        BLOCK_C=_BLOCK_C,
        BLOCK_SPLITS=adding.blocks[0],
        BLOCK_ADDED=adding.blocks[1],
        BLOCK_POOLED=BLOCK_POOLED,
        BLOCK_POOLED_C=BLOCK_POOLED_C,
        num_warps=8,
        num_stages=1,
        reads=(values, norm, adding.source, pooling.rows),
        writes=(factors, *gradients, grad_taps, adding.target, pooling.pooled),
    )
    only_part = None if partial is None or len(partial) > 1 else partial[0]
    added = only_part if adding.target is None else adding.target
    return NormGradient(factors, gradients, grad_taps, added)
