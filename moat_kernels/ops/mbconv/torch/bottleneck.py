"""The inverted bottleneck as a chain of stages, and where saved tensors enter it again."""

from __future__ import annotations

from torch import Tensor

from moat_kernels.ops.common.spatial import ceil_divide
from moat_kernels.ops.mbconv.algebra.chain import Chain
from moat_kernels.ops.mbconv.algebra.coverage import all_frozen
from moat_kernels.ops.mbconv.algebra.folding import (
    FOLDING_ROWS_PER_CHANNEL,
    FoldedExpand,
    joined_pointwise,
)
from moat_kernels.ops.mbconv.algebra.stages import (
    Activation,
    BatchNorm,
    Depthwise,
    Linear,
    SqueezeExcite,
    Stage,
)
from moat_kernels.ops.mbconv.algebra.synchronized import SynchronizedBatchNorm, SynchronizedExpand
from moat_kernels.ops.mbconv.description import MBConvDescription, MBConvParameters, Norm


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
    return (
        description.order == "depthwise_first"
        and description.expand_activation == "identity"
        and description.squeeze_excite is None
        and description.project_norm is None
        and all_frozen(description)
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


def expand_rows(x: Tensor, parameters: MBConvParameters, description: MBConvDescription) -> int:
    """About B*H*W at the expand convolution; it decides how statistics are taken, nothing else."""
    if description.order == "expand_first":
        return x.shape[0] * x.shape[2] * x.shape[3]
    batch, _, height, width = x.shape
    stride = description.stride
    return batch * ceil_divide(height, stride) * ceil_divide(width, stride)
