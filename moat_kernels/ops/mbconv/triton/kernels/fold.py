"""pre_norm folded into the weight of the expand convolution, and the other weights made ready.

With s = weight / std of pre_norm, `centre` the mean row of x (the running one where no batch is
measured) and `shift` what pre_norm makes of it:

    folded = W diag(s)      z1 = (x - centre) folded^T      constant = W shift + bias

so that z1 + constant is what the expand convolution gives. Rows are multiplied as they are, the
centre by the rounded weight, in float32, so that a large mean cancels; only where they must be
rounded (`shifted`) have they lost it before.

The sums of products over rows that the backward pass takes (kernels/expand_backward.py) are about
`pilot`: the centre, rounded, of channels where it lies beyond four standard deviations, where
subtracting it is exact; else 0, where nothing cancels. `rest` is what is left of the centre.

Folding keeps few multiprocessors busy, most of the time waiting: programs of the same launch,
behind those that fold, make the shortcut's pool (kernels/shortcut.py).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from moat_kernels.ops.common.batch_norm import Norm, NormParameters, RunningUpdate
from moat_kernels.ops.mbconv.triton.kernels.moments import Moments, merge_moments
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

# Rows of a folded pre_norm, float32 [7, C]: those of any norm (kernels/norm.py), pilot and rest.
PRE_ROWS, PILOT = 7, 5
_BLOCK_WIDE, _BLOCK_C = 16, 64
_FAR = tl.constexpr(16.0)  # squared standard deviations between the centre and 0


@triton.jit
def _cast(source_ptr, target_ptr, size, programs, BLOCK: tl.constexpr):
    """A contiguous tensor in the dtype of its target, shared out evenly among the programs."""
    for start in tl.range(tl.program_id(0) * BLOCK, size, programs * BLOCK):
        index = start + tl.arange(0, BLOCK)
        value = tl.load(source_ptr + index, mask=index < size, other=0.0).to(tl.float32)
        tl.store(target_ptr + index, value.to(target_ptr.dtype.element_ty), mask=index < size)


@triton.jit
def _ready_weights(
    taps_ptr, taps_out_ptr, tap_scale, column, wide,
    project_ptr, project_out_ptr, shortcut_ptr, shortcut_out_ptr, shortcut_bias_ptr,
    shortcut_bias_out_ptr, channels, out_channels, programs, BLOCK: tl.constexpr,
):  # fmt: skip
    """The depthwise weight [E, 9], scaled, as float32 [9, E]; the others in their new dtype."""
    valid = column < wide
    for tap in tl.static_range(9):
        weight = tl.load(taps_ptr + column * 9 + tap, mask=valid, other=0.0).to(tl.float32)
        tl.store(taps_out_ptr + tap * wide + column, weight * tap_scale, mask=valid)
    if project_ptr is not None:
        _cast(project_ptr, project_out_ptr, out_channels * wide, programs, BLOCK)
    if shortcut_ptr is not None:
        _cast(shortcut_ptr, shortcut_out_ptr, out_channels * channels, programs, BLOCK)
    if shortcut_bias_ptr is not None:
        _cast(shortcut_bias_ptr, shortcut_bias_out_ptr, out_channels, programs, BLOCK)


@triton.jit
def fold_weights_kernel(
    weight_ptr,  # [E, C]
    moments_ptr,  # [chunks, 2, C] float32, of x; or None
    norm_weight_ptr,  # [C], or None
    norm_bias_ptr,  # [C], or None
    running_mean_ptr,  # [C], read where FROZEN, updated where a batch is measured; or None
    running_var_ptr,  # [C]
    tracked_ptr,  # [] int64, or None
    pre_ptr,  # [7, C] float32, read where GIVEN, else written
    bias_ptr,  # [E], or None
    taps_ptr,  # [E, 9]
    project_ptr,  # [C_out, E], or None
    shortcut_ptr,  # [C_out, C], or None
    shortcut_bias_ptr,  # [C_out], or None
    pool_ptr,  # [N, C] of any dtype: what the shortcut pools; or None
    folded_ptr,  # [E, C]
    vectors_ptr,  # [3, E] float32: bias, constant, folded times rest
    taps_out_ptr,  # [9, E] float32
    project_out_ptr,  # as project_ptr; the next two likewise
    shortcut_out_ptr,
    shortcut_bias_out_ptr,
    pooled_ptr,  # [N / 4, C], or None
    count,
    chunk,
    chunks,
    wide,
    channels,
    out_channels,
    folding,
    pooled_count,
    pooled_width,
    eps,
    momentum,
    correction,
    NORMED: tl.constexpr,
    FROZEN: tl.constexpr,
    GIVEN: tl.constexpr,
    SHIFTED: tl.constexpr,
    BLOCK_WIDE: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_POOLED: tl.constexpr,
    BLOCK_POOLED_C: tl.constexpr,
):
    """folded, pre and vectors as the module's text has them. Reads and writes the weights once.

    One program: a block of rows of the weight; each merges the moments of x again, from L2. Or a
    tile of the shortcut's pool.
    """
    if pooled_ptr is not None:  # noqa: SIM102  decided at compile time
        if tl.program_id(0) >= folding:
            pool_tile(
                tl.program_id(0) - folding, pool_ptr, pooled_ptr, pooled_count, pooled_width,
                channels, BLOCK_POOLED, BLOCK_POOLED_C,
            )  # fmt: skip
            return
    column = tl.program_id(0) * BLOCK_WIDE + tl.arange(0, BLOCK_WIDE)
    valid_column = column < wide
    bias = tl.zeros([BLOCK_WIDE], tl.float32)
    rest_product = tl.zeros([BLOCK_WIDE], tl.float32)
    constant = optional(bias_ptr, column, valid_column, 0.0)
    for start in tl.range(0, channels, BLOCK_C):
        channel = start + tl.arange(0, BLOCK_C)
        valid = channel < channels
        if GIVEN:
            scale = tl.load(pre_ptr + channel, mask=valid, other=0.0)
            shift = tl.load(pre_ptr + channels + channel, mask=valid, other=0.0)
            pilot = tl.load(pre_ptr + 5 * channels + channel, mask=valid, other=0.0)
            rest = tl.load(pre_ptr + 6 * channels + channel, mask=valid, other=0.0)
        else:
            centre = tl.zeros([BLOCK_C], tl.float32)
            variance = tl.zeros([BLOCK_C], tl.float32)
            if moments_ptr is not None:
                centre, variance = merge_moments(
                    moments_ptr, channel, channels, chunks, count, count, 1, chunk, 1, 16
                )
            norm_mean, norm_variance = centre, variance
            if FROZEN:
                norm_mean = optional(running_mean_ptr, channel, valid, 0.0)
                norm_variance = optional(running_var_ptr, channel, valid, 0.0)
                if moments_ptr is None:
                    centre, variance = norm_mean, norm_variance
            if NORMED:
                inverse_std = tl.rsqrt(norm_variance + eps)
                scale = inverse_std * optional(norm_weight_ptr, channel, valid, 1.0)
                shift = optional(norm_bias_ptr, channel, valid, 0.0)
                shift += (centre - norm_mean) * scale
            else:
                inverse_std = tl.full([BLOCK_C], 1.0, tl.float32)
                scale, shift = inverse_std, centre
            pilot = tl.zeros([BLOCK_C], tl.float32)
            rest = tl.zeros([BLOCK_C], tl.float32)
            if not SHIFTED:
                rounded = centre.to(folded_ptr.dtype.element_ty).to(tl.float32)
                pilot = tl.where(centre * centre > _FAR * variance, rounded, 0.0)
                rest = centre - pilot
            if tl.program_id(0) == 0:
                target = pre_ptr + channel
                tl.store(target, scale, mask=valid)
                tl.store(target + channels, shift, mask=valid)
                tl.store(target + 2 * channels, centre, mask=valid)
                tl.store(target + 3 * channels, inverse_std, mask=valid)
                tl.store(target + 4 * channels, norm_variance, mask=valid)
                tl.store(target + 5 * channels, pilot, mask=valid)
                tl.store(target + 6 * channels, rest, mask=valid)
                if not FROZEN and running_mean_ptr is not None:
                    update_running(
                        running_mean_ptr, running_var_ptr, channel, valid, centre,
                        variance * correction, momentum,
                    )  # fmt: skip
        mask = valid_column[:, None] & valid[None, :]
        offset = column.to(tl.int64)[:, None] * channels + channel[None, :]
        weight = tl.load(weight_ptr + offset, mask=mask, other=0.0).to(tl.float32)
        folded = (weight * scale[None, :]).to(folded_ptr.dtype.element_ty)
        tl.store(folded_ptr + offset, folded, mask=mask)
        rounded_weight = folded.to(tl.float32)
        bias -= tl.sum(rounded_weight * (pilot + rest)[None, :], 1)
        rest_product += tl.sum(rounded_weight * rest[None, :], 1)
        constant += tl.sum(weight * shift[None, :], 1)
    tl.store(vectors_ptr + column, bias, mask=valid_column)
    tl.store(vectors_ptr + wide + column, constant, mask=valid_column)
    tl.store(vectors_ptr + 2 * wide + column, rest_product, mask=valid_column)
    _ready_weights(
        taps_ptr, taps_out_ptr, 1.0, column, wide,
        project_ptr, project_out_ptr, shortcut_ptr, shortcut_out_ptr, shortcut_bias_ptr,
        shortcut_bias_out_ptr, channels, out_channels, folding, 2 * BLOCK_WIDE * BLOCK_C,
    )  # fmt: skip
    if tl.program_id(0) == 0:
        count_batch(tracked_ptr)


class Weights(NamedTuple):
    """Those of an inverted bottleneck, contiguous, in dtypes of the user's."""

    expand: Tensor  # [E, C]
    expand_bias: Tensor | None  # [E]
    depthwise: Tensor  # [E, 9]
    project: Tensor  # [C_out, E]
    shortcut: Tensor | None  # [C_out, C]
    shortcut_bias: Tensor | None  # [C_out]


class Ready(NamedTuple):
    """The weights that nothing is folded into, in the dtype of the products."""

    project: Tensor  # [C_out, E]
    shortcut: Tensor | None  # [C_out, C]
    shortcut_bias: Tensor | None  # [C_out]


class Folded(NamedTuple):
    """Weights as the kernels take them, in the dtype of the products but where it is said."""

    pre: Tensor  # [7, C] float32
    expand: Tensor  # [E, C]
    vectors: Tensor  # [3, E] float32: `bias`, `constant`, and `expand` times rest
    taps: Tensor  # [9, E] float32
    ready: Ready

    @property
    def bias(self) -> Tensor:
        """What is added to rows times `expand`: [E]."""
        return self.vectors[0]

    @property
    def constant(self) -> Tensor:
        """What z1 lacks of the expand convolution: [E]."""
        return self.vectors[1]


class _Casts(NamedTuple):
    """Where the kernels write weights in another dtype, and what they read for that."""

    ready: Ready
    sources: tuple[Tensor | None, ...]
    targets: tuple[Tensor | None, ...]

    @staticmethod
    def of(weights: Weights, dtype: torch.dtype) -> _Casts:
        kept = (weights.project, weights.shortcut, weights.shortcut_bias)
        casts = [one is not None and one.dtype != dtype for one in kept]
        ready = [
            torch.empty_like(one, dtype=dtype) if one is not None and cast else one
            for one, cast in zip(kept, casts, strict=True)
        ]
        sources, targets = (
            tuple(one if cast else None for one, cast in zip(side, casts, strict=True))
            for side in (kept, ready)
        )
        return _Casts(Ready(*ready), sources, targets)  # type: ignore[arg-type]


def _sizes(moments: Moments) -> tuple[int, int, int]:
    """Rows, rows of a chunk, and chunks."""
    return moments.total, moments.tiles.band, moments.values.shape[0]


def fold(
    weights: Weights,
    dtype: torch.dtype,
    norm: Norm | None,
    parameters: NormParameters,
    moments: Moments | None,
    shifted: bool,
    update: RunningUpdate | None,
    pre: Tensor | None,
    pooling: Pooling,
) -> Folded:
    """Weights for products in `dtype`, and pre_norm folded.

    norm, parameters: pre_norm. moments: of x, None where no batch is measured. shifted: rows have
    lost their centre. update: of running statistics, made here. pre: what an earlier call gave.
    pooling: of the shortcut, made beside it.
    """
    wide, channels = weights.expand.shape
    casts, folding = _Casts.of(weights, dtype), -(-wide // _BLOCK_WIDE)
    expand = torch.empty_like(weights.expand, dtype=dtype)
    taps = expand.new_empty((9, wide), dtype=torch.float32)
    vectors = taps.new_empty((3, wide))
    given = pre is not None
    if pre is None:
        pre = taps.new_empty((PRE_ROWS, channels))
    frozen = not given and norm is not None and norm.frozen
    running = running_tensors(parameters, frozen, update)
    affine = (None, None) if given else (parameters.weight, parameters.bias)
    values = None if moments is None or given else moments.values
    sources = (weights.depthwise, *casts.sources, pooling.rows)
    reads = (weights.expand, weights.expand_bias, *sources, values, *affine)
    launch(
        fold_weights_kernel,
        (folding + pooling.programs,),
        *(weights.expand, values, *affine, *running, pre, weights.expand_bias),
        *(*sources, expand, vectors, taps, *casts.targets, pooling.pooled),
        *((1, 1, 1) if moments is None else _sizes(moments)),
        *(wide, channels, weights.project.shape[0], folding, pooling.count, pooling.width),
        1.0 if norm is None else norm.eps,
        *((0.0, 1.0) if update is None else (update.momentum, update.correction)),
        NORMED=norm is not None,
        FROZEN=frozen,
        GIVEN=given,
        SHIFTED=shifted,
        BLOCK_WIDE=_BLOCK_WIDE,
        BLOCK_C=_BLOCK_C,
        BLOCK_POOLED=BLOCK_POOLED,
        BLOCK_POOLED_C=BLOCK_POOLED_C,
        num_warps=8,
        num_stages=3,
        reads=(*reads, *running, pre if given else None),
        writes=(
            *(expand, vectors, taps, *casts.targets, pooling.pooled),
            *(() if frozen else running),
            pre,
        ),
    )
    return Folded(pre, expand, vectors, taps, casts.ready)


class FoldedNorm(NamedTuple):
    """A norm that uses running statistics, or none."""

    norm: Norm | None
    parameters: NormParameters

    @property
    def arguments(self) -> tuple[Tensor | None, ...]:
        """Weight, bias, running mean and variance as the kernel takes them."""
        return self.parameters[:4] if self.norm is not None else (None,) * 4

    @property
    def eps(self) -> float:
        return 1.0 if self.norm is None else self.norm.eps


@triton.jit
def _frozen_affine(
    weight_ptr, bias_ptr, mean_ptr, variance_ptr, channel, valid, eps, NORMED: tl.constexpr
):  # fmt: skip
    """(factor, value at the mean, mean) of a norm with running statistics; (1, 0, 0) of none."""
    scale = tl.full(channel.shape, 1.0, tl.float32)
    if NORMED:
        scale = optional(weight_ptr, channel, valid, 1.0)
        scale *= tl.rsqrt(optional(variance_ptr, channel, valid, 1.0) + eps)
    shift = optional(bias_ptr, channel, valid, 0.0)
    return scale, shift, optional(mean_ptr, channel, valid, 0.0)


@triton.jit
def fold_evaluation_kernel(
    weight_ptr,  # [E, C]
    pre_weight_ptr, pre_bias_ptr, pre_mean_ptr, pre_variance_ptr,  # [C] each, or None
    bias_ptr,  # [E], or None
    expand_weight_ptr, expand_bias_ptr, expand_mean_ptr, expand_variance_ptr,  # [E] each, or None
    taps_ptr,  # [E, 9]
    taps_bias_ptr,  # [E], or None
    norm_weight_ptr, norm_bias_ptr, norm_mean_ptr, norm_variance_ptr,  # [E] each, or None
    project_ptr, shortcut_ptr, shortcut_bias_ptr,  # [C_out, E], [C_out, C], [C_out], or None
    pool_ptr,  # [N, C] of any dtype, or None
    folded_ptr,  # [E, C]
    vectors_ptr,  # [2, E] float32: biases of the expand and the depthwise convolution
    taps_out_ptr,  # [9, E] float32
    project_out_ptr, shortcut_out_ptr, shortcut_bias_out_ptr,  # the same
    pooled_ptr,  # [N / 4, C], or None
    wide, channels, out_channels, folding, pooled_count, pooled_width,
    pre_eps, expand_eps, norm_eps,
    PRE: tl.constexpr, EXPAND: tl.constexpr, DEPTHWISE: tl.constexpr, SHIFTED: tl.constexpr,
    BLOCK_WIDE: tl.constexpr, BLOCK_C: tl.constexpr,
    BLOCK_POOLED: tl.constexpr, BLOCK_POOLED_C: tl.constexpr,
):  # fmt: skip
    """All three norms folded into the convolutions before or behind them; the shortcut's pool.

    Rows go through folded and the first bias; SHIFTED: they have lost pre_norm's mean.
    """
    if pooled_ptr is not None:  # noqa: SIM102  decided at compile time
        if tl.program_id(0) >= folding:
            pool_tile(
                tl.program_id(0) - folding, pool_ptr, pooled_ptr, pooled_count, pooled_width,
                channels, BLOCK_POOLED, BLOCK_POOLED_C,
            )  # fmt: skip
            return
    column = tl.program_id(0) * BLOCK_WIDE + tl.arange(0, BLOCK_WIDE)
    valid_column = column < wide
    scale, bias, mean = _frozen_affine(
        expand_weight_ptr, expand_bias_ptr, expand_mean_ptr, expand_variance_ptr, column,
        valid_column, expand_eps, EXPAND,
    )  # fmt: skip
    constant = optional(bias_ptr, column, valid_column, 0.0) - mean
    for start in tl.range(0, channels, BLOCK_C):
        channel = start + tl.arange(0, BLOCK_C)
        valid = channel < channels
        pre_scale, pre_shift, centre = _frozen_affine(
            pre_weight_ptr, pre_bias_ptr, pre_mean_ptr, pre_variance_ptr, channel, valid, pre_eps,
            PRE,
        )  # fmt: skip
        mask = valid_column[:, None] & valid[None, :]
        offset = column.to(tl.int64)[:, None] * channels + channel[None, :]
        weight = tl.load(weight_ptr + offset, mask=mask, other=0.0).to(tl.float32)
        constant += tl.sum(weight * pre_shift[None, :], 1)
        folded = weight * pre_scale[None, :] * scale[:, None]
        folded = folded.to(folded_ptr.dtype.element_ty)
        tl.store(folded_ptr + offset, folded, mask=mask)
        if not SHIFTED:
            bias -= tl.sum(folded.to(tl.float32) * centre[None, :], 1)
    tl.store(vectors_ptr + column, bias + constant * scale, mask=valid_column)
    scale, bias, mean = _frozen_affine(
        norm_weight_ptr, norm_bias_ptr, norm_mean_ptr, norm_variance_ptr, column, valid_column,
        norm_eps, DEPTHWISE,
    )  # fmt: skip
    bias += (optional(taps_bias_ptr, column, valid_column, 0.0) - mean) * scale
    tl.store(vectors_ptr + wide + column, bias, mask=valid_column)
    _ready_weights(
        taps_ptr, taps_out_ptr, scale, column, wide,
        project_ptr, project_out_ptr, shortcut_ptr, shortcut_out_ptr, shortcut_bias_ptr,
        shortcut_bias_out_ptr, channels, out_channels, folding, 2 * BLOCK_WIDE * BLOCK_C,
    )  # fmt: skip


class Evaluation(NamedTuple):
    """Weights with every norm folded, as the kernels take them."""

    expand: Tensor  # [E, C]
    bias: Tensor  # [E] float32
    taps: Tensor  # [9, E] float32
    depthwise_bias: Tensor  # [E] float32
    ready: Ready


def fold_evaluation(
    weights: Weights,
    depthwise_bias: Tensor | None,
    dtype: torch.dtype,
    norms: tuple[FoldedNorm, FoldedNorm, FoldedNorm],
    shifted: bool,
    pooling: Pooling,
) -> Evaluation:
    """Weights for products in `dtype` with pre_norm, expand_norm and depthwise_norm folded.

    shifted: rows have lost pre_norm's running mean. pooling: of the shortcut, made beside it.
    """
    wide, channels = weights.expand.shape
    casts, folding = _Casts.of(weights, dtype), -(-wide // _BLOCK_WIDE)
    expand = torch.empty_like(weights.expand, dtype=dtype)
    taps = expand.new_empty((9, wide), dtype=torch.float32)
    vectors = taps.new_empty((2, wide))
    pre, expanded, depthwise = (one.arguments for one in norms)
    reads = (
        *(weights.expand, *pre, weights.expand_bias, *expanded),
        *(weights.depthwise, depthwise_bias, *depthwise, *casts.sources, pooling.rows),
    )
    launch(
        fold_evaluation_kernel,
        (folding + pooling.programs,),
        *(*reads, expand, vectors, taps, *casts.targets, pooling.pooled),
        *(wide, channels, weights.project.shape[0], folding, pooling.count, pooling.width),
        *(one.eps for one in norms),
        PRE=norms[0].norm is not None,
        EXPAND=norms[1].norm is not None,
        DEPTHWISE=norms[2].norm is not None,
        SHIFTED=shifted,
        BLOCK_WIDE=_BLOCK_WIDE,
        BLOCK_C=_BLOCK_C,
        BLOCK_POOLED=BLOCK_POOLED,
        BLOCK_POOLED_C=BLOCK_POOLED_C,
        num_warps=8,
        num_stages=1,
        reads=reads,
        writes=(expand, vectors, taps, *casts.targets, pooling.pooled),
    )
    return Evaluation(expand, vectors[0], taps, vectors[1], casts.ready)
