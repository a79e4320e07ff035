"""The inverted bottleneck in plain PyTorch: the specification in code of `mbconv`."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from moat_kernels.ops.common.activations import activate
from moat_kernels.ops.common.spatial import (
    may_pad,
    pad_map,
    resolve_padding,
    split_padding,
    valid_counts,
)
from moat_kernels.ops.common.synchronization import all_reduce, differentiable_all_reduce
from moat_kernels.ops.mbconv.description import (
    MBConvDescription,
    MBConvParameters,
    Norm,
    NormParameters,
    Pool,
)

Moments = dict[str, tuple[Tensor, ...]]


def batch_norm(
    x: Tensor, norm: Norm, parameters: NormParameters
) -> tuple[Tensor, tuple[Tensor, ...] | None]:
    """Normalised [B, C, H, W], and the batch's (mean, biased variance) [C] if it was measured.

    A norm that names a process group adds the count of values per channel over its ranks.
    """
    weight, bias, running_mean, running_var, _ = parameters
    # Dense: PyTorch's backward pass in channels_last reads beyond an expanded weight.
    weight = None if weight is None else weight.contiguous()
    bias = None if bias is None else bias.contiguous()
    if norm.frozen:
        y = F.batch_norm(x, running_mean, running_var, weight, bias, False, 0.0, norm.eps)
        return y, None
    for name, tensor in (("weight", weight), ("bias", bias)):  # native_batch_norm does not look
        if tensor is not None and tensor.shape != x.shape[1:2]:
            raise ValueError(
                f"{name} of a batch norm must be [{x.shape[1]}], got {tuple(tensor.shape)}"
            )
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    weight = None if weight is None else weight.to(dtype)
    bias = None if bias is None else bias.to(dtype)
    if norm.process_group is not None:
        return _synchronized_batch_norm(x, norm, weight, bias, dtype)
    # Momentum 1 makes these the batch's own mean and unbiased variance.
    mean = torch.zeros(x.shape[1], dtype=dtype, device=x.device)
    variance = torch.zeros_like(mean)
    if x.numel() == 0:
        return x.clone(), (mean, variance)
    count = x.shape[0] * x.shape[2] * x.shape[3]
    y, *_ = torch.native_batch_norm(x, weight, bias, mean, variance, True, 1.0, norm.eps)
    biased = variance * ((count - 1) / count) if count > 1 else torch.zeros_like(variance)
    return y, (mean, biased)


def _synchronized_batch_norm(
    x: Tensor, norm: Norm, weight: Tensor | None, bias: Tensor | None, dtype: torch.dtype
) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor]]:
    """Mean and variance over the ranks of norm.process_group, in two passes and two all-reduces."""
    assert norm.process_group is not None

    def sum_over_ranks(values: Tensor) -> Tensor:
        return differentiable_all_reduce(values.sum((0, 2, 3)), norm.process_group or "")

    wide = x.to(dtype)
    own_count = wide.new_full((), x.shape[0] * x.shape[2] * x.shape[3])
    count = all_reduce(own_count, norm.process_group)
    mean = sum_over_ranks(wide) / count.clamp(min=1)
    centred = wide - mean[:, None, None]
    variance = sum_over_ranks(centred.square()) / count.clamp(min=1)
    y = centred * torch.rsqrt(variance + norm.eps)[:, None, None]
    if weight is not None:
        y = y * weight[:, None, None]
    if bias is not None:
        y = y + bias[:, None, None]
    return y.to(x.dtype), (mean.detach(), variance.detach(), count)


def squeeze_excite(x: Tensor, parameters: MBConvParameters, activation: str) -> Tensor:
    """x * sigmoid(expand(act(reduce(mean of the map))))."""
    assert parameters.se_reduce_weight is not None and parameters.se_expand_weight is not None
    mean = x.mean((2, 3))
    reduced = F.linear(mean, parameters.se_reduce_weight.flatten(1), parameters.se_reduce_bias)
    gate = F.linear(
        activate(activation, reduced),
        parameters.se_expand_weight.flatten(1),
        parameters.se_expand_bias,
    )
    return x * torch.sigmoid(gate)[:, :, None, None]


def pool_map(x: Tensor, pool: Pool) -> Tensor:
    """Average or maximum pool with any padding; padding never enters a maximum."""
    size, stride = pool.kernel_size, pool.stride
    padding = resolve_padding(pool.padding, x.shape[2], x.shape[3], (size, size), stride)
    if pool.kind == "max":
        return F.max_pool2d(pad_map(x, padding, value=float("-inf")), size, stride)
    mean = F.avg_pool2d(pad_map(x, padding), size, stride)
    if pool.count_include_pad or not may_pad(padding):
        return mean
    counts = valid_counts(x.shape[2], x.shape[3], size, stride, padding, like=x)
    return mean * (size * size / counts)


def depthwise_conv(
    x: Tensor, parameters: MBConvParameters, description: MBConvDescription
) -> Tensor:
    """Depthwise convolution with four-sided zero padding."""
    weight = parameters.depthwise_weight
    kernel_size = (weight.shape[2], weight.shape[3])
    border, padding = split_padding(
        resolve_padding(
            description.padding, x.shape[2], x.shape[3], kernel_size, description.stride
        )
    )
    return F.conv2d(
        pad_map(x, border),
        weight,
        parameters.depthwise_bias,
        description.stride,
        padding,
        groups=weight.shape[0],
    )


def pointwise_conv(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """1x1 convolution with a weight [out, in] or [out, in, 1, 1]."""
    return F.conv2d(x, weight.flatten(1)[:, :, None, None], bias)


def mbconv(
    x: Tensor,
    parameters: MBConvParameters,
    description: MBConvDescription,
    drop_path_scale: Tensor | None,
) -> tuple[Tensor, Moments]:
    """The block's output, and the batch moments of each norm that measured them."""
    moments: Moments = {}

    def norm(name: str, value: Tensor) -> Tensor:
        settings = getattr(description, name)
        if settings is None:
            return value
        value, measured = batch_norm(value, settings, getattr(parameters, name))
        if measured is not None:
            moments[name] = measured
        return value

    def expand(value: Tensor) -> Tensor:
        return pointwise_conv(value, parameters.expand_weight, parameters.expand_bias)

    def depthwise(value: Tensor) -> Tensor:
        return depthwise_conv(value, parameters, description)

    stages = [("expand", expand), ("depthwise", depthwise)]
    if description.order == "depthwise_first":
        stages.reverse()
    gate = description.squeeze_excite

    y = activate(description.pre_activation, norm("pre_norm", x))
    for index, (name, convolution) in enumerate(stages):
        y = convolution(y)
        if index == 1 and gate is not None and gate.position == "before_norm":
            y = squeeze_excite(y, parameters, gate.activation)
        y = norm(f"{name}_norm", y)
        y = activate(getattr(description, f"{name}_activation"), y)
    if gate is not None and gate.position == "after_activation":
        y = squeeze_excite(y, parameters, gate.activation)
    y = norm("project_norm", pointwise_conv(y, parameters.project_weight, parameters.project_bias))

    if description.residual:
        if drop_path_scale is not None:
            y = y * drop_path_scale.to(y.dtype)[:, None, None, None]
        y = y + shortcut(x, parameters, description)
    return y, moments


def shortcut(x: Tensor, parameters: MBConvParameters, description: MBConvDescription) -> Tensor:
    """The raw input, pooled and projected where the block asks for it."""
    if description.pool is not None:
        x = pool_map(x, description.pool)
    if parameters.shortcut_weight is not None:
        x = pointwise_conv(x, parameters.shortcut_weight, parameters.shortcut_bias)
    return x
