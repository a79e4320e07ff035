"""The inverted bottleneck in stock PyTorch operations, on any device, saving little for backward.

The block is a chain of stages (stages.py, folding.py) plus a shortcut. Between stages only the
outputs that `recompute` asks for are saved; the backward pass recomputes the rest, segment by
segment. In units of C channels times the map (stride 1, E = 4 C), beside small statistics:

    recompute="none"    x, the expand output, the depthwise output      9 C
    recompute="expand"  x and the depthwise output                      5 C
    recompute="block"   x                                               1 C
    (stock autograd: x and every intermediate                          26 C)
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from moat_kernels.ops.mbconv.algebra.folding import FoldedExpand, joined_pointwise
from moat_kernels.ops.mbconv.algebra.stages import (
    Activation,
    BatchNorm,
    Depthwise,
    Linear,
    PoolStage,
    SqueezeExcite,
    Stage,
)
from moat_kernels.ops.mbconv.algebra.synchronized import SynchronizedBatchNorm, SynchronizedExpand
from moat_kernels.ops.mbconv.description import (
    NORMS,
    MBConvDescription,
    MBConvParameters,
    Norm,
)

# This backend measures norms that name a process group together with the group's other ranks.
SYNCHRONIZES = True

# Batch statistics come from the covariance of x if there are this many rows per channel. With
# fewer, the C x C work (about 2 C / N of the expand GEMM in float64) outweighs the E-wide passes
# that it saves, and the covariance is no longer small beside x.
FOLDING_ROWS_PER_CHANNEL = 16


@dataclass(frozen=True)
class Forward:
    """The output, each norm's moments (Stage.batch_moments), what backward needs beside x."""

    output: Tensor
    moments: Mapping[str, tuple[Tensor, ...]]
    saved: list[Tensor]


class Chain:
    """Stages run one after the other; `checkpoints[i]` is where saved tensor i enters again."""

    def __init__(self, stages: list[Stage], checkpoints: list[int]) -> None:
        self.stages = stages
        self.checkpoints = checkpoints

    def forward(self, x: Tensor) -> tuple[Tensor, list[Tensor]]:
        """(output, the inputs of the stages at `checkpoints`)."""
        saved = []
        for index, stage in enumerate(self.stages):
            if index in self.checkpoints:
                saved.append(x)
            x = stage.forward(x)
        return x, saved

    def backward(
        self, grad: Tensor, x: Tensor, saved: list[Tensor], needs_input: bool
    ) -> Tensor | None:
        """Gradient of x; those of the parameters are left in the stages."""
        bounds = [0, *self.checkpoints, len(self.stages)]
        starts = [x, *saved]
        result: Tensor | None = grad
        while starts:
            end, begin = bounds.pop(), bounds[-1]
            inputs = [starts.pop()]
            for stage in self.stages[begin : end - 1]:
                inputs.append(stage.forward(inputs[-1]))
            for index in range(end - 1, begin - 1, -1):
                assert result is not None
                result = self.stages[index].backward(result, inputs.pop(), needs_input or index > 0)
        return result

    @property
    def statistics(self) -> list[Tensor]:
        return [tensor for stage in self.stages for tensor in stage.statistics]

    def restore_statistics(self, tensors: list[Tensor]) -> list[Tensor]:
        """Hand an earlier forward's statistics to the stages; return the tensors after them."""
        for stage in self.stages:
            count = stage.statistics_count
            stage.statistics, tensors = tuple(tensors[:count]), tensors[count:]
        return tensors


def _activation(kind: str) -> list[Stage]:
    return [] if kind == "identity" else [Activation(kind)]


def _norm(name: str, norm: Norm | None, parameters: MBConvParameters) -> list[Stage]:
    if norm is None:
        return []
    stage = BatchNorm if norm.process_group is None else SynchronizedBatchNorm
    return [stage(name, norm, getattr(parameters, name))]


def _squeeze_excite(
    position: str, parameters: MBConvParameters, description: MBConvDescription
) -> list[Stage]:
    gate = description.squeeze_excite
    if gate is None or gate.position != position:
        return []
    return [SqueezeExcite(parameters, gate.activation)]


def _expand_stages(
    parameters: MBConvParameters, description: MBConvDescription, rows: int, gated: bool
) -> tuple[list[Stage], int]:
    """Pre-norm (if it precedes), expand and expand_norm; and after how many the GEMM is done."""
    channels = parameters.expand_weight.shape[1]
    first = description.order == "expand_first"
    pre = _norm("pre_norm", description.pre_norm, parameters) if first else []
    pre_activation = _activation(description.pre_activation) if first else []
    gate = _squeeze_excite("before_norm", parameters, description) if gated else []
    fold_pre = description.pre_norm if first and not pre_activation else None
    stage = _folded_stage(fold_pre, description.expand_norm, rows, channels)
    if stage is not None and not gate:
        lead = pre + pre_activation if pre_activation else []
        return [*lead, stage(parameters, fold_pre, description.expand_norm)], len(lead) + 1
    lead = pre + pre_activation
    linear = Linear("expand", parameters.expand_weight, parameters.expand_bias)
    norm = _norm("expand_norm", description.expand_norm, parameters)
    return [*lead, linear, *gate, *norm], len(lead) + 1


def _folded_stage(
    pre_norm: Norm | None, expand_norm: Norm | None, rows: int, channels: int
) -> type[FoldedExpand] | None:
    """The stage that folds these norms into the expand convolution; None: they run one by one."""
    groups = {
        norm.process_group
        for norm in (pre_norm, expand_norm)
        if norm is not None and not norm.frozen
    }
    if groups in (set(), {None}):
        return FoldedExpand if rows >= FOLDING_ROWS_PER_CHANNEL * channels else None
    # However few rows: another rank may hold more, and all must reduce the same tensors.
    return SynchronizedExpand if len(groups) == 1 else None


def _depthwise_stages(
    parameters: MBConvParameters, description: MBConvDescription, gated: bool
) -> list[Stage]:
    """The depthwise convolution, a gate before the norm if there is one, and depthwise_norm."""
    weight, bias = parameters.depthwise_weight, parameters.depthwise_bias
    stride, padding, norm = description.stride, description.padding, description.depthwise_norm
    gate = _squeeze_excite("before_norm", parameters, description) if gated else []
    if norm is not None and norm.frozen and not gate:
        return [Depthwise(weight, bias, stride, padding, norm, parameters.depthwise_norm)]
    return [
        Depthwise(weight, bias, stride, padding),
        *gate,
        *_norm("depthwise_norm", norm, parameters),
    ]


def build_bottleneck(
    parameters: MBConvParameters, description: MBConvDescription, rows: int, recompute: str
) -> Chain:
    """The stages between x and the residual, for `rows` = B*H*W at the expand convolution."""
    expand_first = description.order == "expand_first"
    expand, expand_done = _expand_stages(parameters, description, rows, gated=not expand_first)
    expand_activation = _activation(description.expand_activation)
    depthwise = _depthwise_stages(parameters, description, gated=expand_first)
    depthwise_activation = _activation(description.depthwise_activation)
    if expand_first:
        front = expand + expand_activation
        stages = front + depthwise + depthwise_activation
        expand_at, depthwise_at = expand_done, len(front) + 1
    else:
        front = _norm("pre_norm", description.pre_norm, parameters)
        front += _activation(description.pre_activation)
        depthwise_at = len(front) + 1
        front += depthwise + depthwise_activation
        expand_at = len(front) + expand_done
        stages = front + expand + expand_activation
    stages += _squeeze_excite("after_activation", parameters, description)
    stages.append(Linear("project", parameters.project_weight, parameters.project_bias))
    stages += _norm("project_norm", description.project_norm, parameters)
    checkpoints = {
        "none": sorted((expand_at, depthwise_at)),
        "expand": [depthwise_at],
        "block": [],
    }
    return Chain(stages, checkpoints[recompute])


def is_linear_after_depthwise(description: MBConvDescription) -> bool:
    """Whether nothing but a linear map, with fixed statistics, follows the depthwise stage."""
    norms = [getattr(description, name) for name in NORMS]
    return (
        description.order == "depthwise_first"
        and description.expand_activation == "identity"
        and description.squeeze_excite is None
        and description.project_norm is None
        and all(norm is None or norm.frozen for norm in norms)
    )


def joining_pays(rows: int, parameters: MBConvParameters) -> bool:
    """Whether multiplying the two weights, at every call, costs less than it saves on `rows`."""
    wide, channels = parameters.expand_weight.shape[:2]
    out_channels = parameters.project_weight.shape[0]
    return (wide + rows) * channels * out_channels < rows * wide * (channels + out_channels)


def build_joined_bottleneck(parameters: MBConvParameters, description: MBConvDescription) -> Chain:
    """The same function where `is_linear_after_depthwise`, without a tensor of E channels."""
    stages = _norm("pre_norm", description.pre_norm, parameters)
    stages += _activation(description.pre_activation)
    stages += _depthwise_stages(parameters, description, gated=False)
    stages += _activation(description.depthwise_activation)
    stages.append(Linear("joined", *joined_pointwise(parameters, description.expand_norm)))
    return Chain(stages, [])


def build_shortcut(parameters: MBConvParameters, description: MBConvDescription) -> Chain:
    """The stages of the shortcut; none for the identity."""
    stages: list[Stage] = []
    if description.pool is not None:
        stages.append(PoolStage(description.pool))
    if parameters.shortcut_weight is not None:
        stages.append(Linear("shortcut", parameters.shortcut_weight, parameters.shortcut_bias))
    return Chain(stages, [])


def expand_rows(x: Tensor, parameters: MBConvParameters, description: MBConvDescription) -> int:
    """About B*H*W at the expand convolution; it decides how statistics are taken, nothing else."""
    if description.order == "expand_first":
        return x.shape[0] * x.shape[2] * x.shape[3]
    return x.shape[0] * -(-x.shape[2] // description.stride) * -(-x.shape[3] // description.stride)


def unsupported(x: Tensor, parameters: MBConvParameters, description: MBConvDescription) -> str:
    """Why this backend does not cover a call; empty: it does."""
    return ""


def recompute_level(
    recompute: str, x: Tensor, parameters: MBConvParameters, description: MBConvDescription
) -> str:
    """The level that "auto" stands for: saving both wide tensors is fastest in stock operations."""
    return "none" if recompute == "auto" else recompute


def forward(
    x: Tensor,
    parameters: MBConvParameters,
    description: MBConvDescription,
    recompute: str,
    drop_path_scale: Tensor | None,
) -> Forward:
    """Compute the block; norms that do not measure the batch are `frozen` in `description`."""
    x = x.contiguous(memory_format=torch.channels_last)
    rows = expand_rows(x, parameters, description)
    joined = (
        recompute == "block"
        and is_linear_after_depthwise(description)
        and joining_pays(rows, parameters)
    )
    if joined:
        bottleneck = build_joined_bottleneck(parameters, description)
    else:
        bottleneck = build_bottleneck(parameters, description, rows, recompute)
    output, saved = bottleneck.forward(x)
    if description.residual:
        shortcut, _ = build_shortcut(parameters, description).forward(x)
        if drop_path_scale is not None:
            output = output * drop_path_scale.to(output.dtype)[:, None, None, None]
        output = output + shortcut
    moments: dict[str, tuple[Tensor, ...]] = {}
    for stage in bottleneck.stages:
        moments.update(stage.batch_moments())
    # Fixed statistics need not be saved: the backward pass takes the running ones again.
    statistics = [] if joined else bottleneck.statistics
    return Forward(output, moments, [*statistics, *saved])


def backward(
    grad: Tensor,
    x: Tensor,
    parameters: MBConvParameters,
    description: MBConvDescription,
    recompute: str,
    drop_path_scale: Tensor | None,
    saved: list[Tensor],
    needed: frozenset[str],
) -> dict[str, Tensor]:
    """Gradients by name, of "x" and of the parameters in `needed`."""
    x = x.contiguous(memory_format=torch.channels_last)
    grad = grad.contiguous(memory_format=torch.channels_last)
    rows = expand_rows(x, parameters, description)
    bottleneck = build_bottleneck(parameters, description, rows, recompute)
    checkpoints = bottleneck.restore_statistics(saved)
    shortcut = build_shortcut(parameters, description)
    for stage in (*bottleneck.stages, *shortcut.stages):
        stage.needed = needed
    needs_input = "x" in needed

    residual_grad = grad
    if description.residual and drop_path_scale is not None:
        residual_grad = grad * drop_path_scale.to(grad.dtype)[:, None, None, None]
    residual_grad = residual_grad.to(parameters.project_weight.dtype)
    grad_x = bottleneck.backward(residual_grad, x, checkpoints, needs_input)
    if description.residual:
        if parameters.shortcut_weight is not None:
            grad = grad.to(parameters.shortcut_weight.dtype)
        shortcut_grad = shortcut.backward(grad, x, [], needs_input)
        if grad_x is not None and shortcut_grad is not None:
            grad_x = grad_x + shortcut_grad

    gradients: dict[str, Tensor] = {}
    for stage in (*bottleneck.stages, *shortcut.stages):
        gradients.update(stage.gradients)
    if needs_input and grad_x is not None:
        gradients["x"] = grad_x
    return gradients
