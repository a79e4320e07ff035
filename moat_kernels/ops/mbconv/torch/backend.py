"""The inverted bottleneck in stock PyTorch operations, on any device, saving little for backward.

The block is a chain of stages (bottleneck.py, algebra/stages.py) plus a shortcut. Between stages
only the outputs that `recompute` asks for are saved; the backward pass recomputes the rest, segment
by segment. In units of C channels times the map (stride 1, E = 4 C), beside small statistics:

    recompute="none"    x, the expand output, the depthwise output      9 C
    recompute="expand"  x and the depthwise output                      5 C
    recompute="block"   x                                               1 C
    (stock autograd: x and every intermediate                          26 C)
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from moat_kernels.ops.common.batch_norm import RunningUpdate
from moat_kernels.ops.mbconv.algebra.shortcut import scale_samples, shortcut, shortcut_backward
from moat_kernels.ops.mbconv.contract import Forward
from moat_kernels.ops.mbconv.description import (
    MBConvDescription,
    MBConvParameters,
    cast_weights,
)
from moat_kernels.ops.mbconv.torch.bottleneck import (
    build_bottleneck,
    build_joined_bottleneck,
    expand_rows,
    is_linear_after_depthwise,
    joining_pays,
)


def unsupported(x: Tensor, parameters: MBConvParameters, description: MBConvDescription) -> str:
    """Why this backend does not cover a call; empty: it does."""
    return ""


def evaluate(
    x: Tensor,
    parameters: MBConvParameters,
    description: MBConvDescription,
    drop_path_scale: Tensor | None,
    dtype: torch.dtype | None,
) -> Tensor:
    """The block with fixed statistics; the linear part behind the depthwise stage as one product.

    That is where nothing but a linear map follows it, and where the product costs less.
    """
    parameters = cast_weights(parameters, dtype)
    x = x.contiguous(memory_format=torch.channels_last)
    rows = expand_rows(x, parameters, description)
    if is_linear_after_depthwise(description) and joining_pays(rows, parameters):
        bottleneck = build_joined_bottleneck(parameters, description)
    else:
        bottleneck = build_bottleneck(parameters, description, rows, "block")
    return _add_shortcut(bottleneck.forward(x)[0], x, parameters, description, drop_path_scale)


def forward(
    x: Tensor,
    parameters: MBConvParameters,
    description: MBConvDescription,
    recompute: str,
    drop_path_scale: Tensor | None,
    dtype: torch.dtype | None,
    updates: Mapping[str, RunningUpdate],
) -> Forward:
    """The block, keeping the wide tensors that `recompute` says beside all stages' statistics."""
    parameters = cast_weights(parameters, dtype)
    x = x.contiguous(memory_format=torch.channels_last)
    rows = expand_rows(x, parameters, description)
    bottleneck = build_bottleneck(parameters, description, rows, recompute)
    residual, saved = bottleneck.forward(x)
    output = _add_shortcut(residual, x, parameters, description, drop_path_scale)
    moments: dict[str, tuple[Tensor, ...]] = {}
    for stage in bottleneck.stages:
        moments.update(stage.batch_moments())
    return Forward(output, moments, [*bottleneck.statistics, *saved])


def _add_shortcut(
    residual: Tensor,
    x: Tensor,
    parameters: MBConvParameters,
    description: MBConvDescription,
    drop_path_scale: Tensor | None,
) -> Tensor:
    if not description.residual:
        return residual
    return scale_samples(residual, drop_path_scale) + shortcut(x, parameters, description)


def backward(
    grad: Tensor,
    x: Tensor,
    parameters: MBConvParameters,
    description: MBConvDescription,
    recompute: str,
    drop_path_scale: Tensor | None,
    dtype: torch.dtype | None,
    saved: list[Tensor],
    needed: frozenset[str],
) -> dict[str, Tensor]:
    """Gradients by name, of "x" and of the parameters in `needed`."""
    parameters = cast_weights(parameters, dtype)
    x = x.contiguous(memory_format=torch.channels_last)
    grad = grad.contiguous(memory_format=torch.channels_last)
    rows = expand_rows(x, parameters, description)
    bottleneck = build_bottleneck(parameters, description, rows, recompute)
    checkpoints = bottleneck.restore_statistics(saved)
    residual_grad = scale_samples(grad, drop_path_scale if description.residual else None)
    residual_grad = residual_grad.to(parameters.project_weight.dtype)
    grad_x, gradients = bottleneck.backward(residual_grad, x, checkpoints, needed)
    if description.residual:
        shortcut_grad, others = shortcut_backward(grad, x, parameters, description, needed)
        gradients |= others
        if grad_x is not None and shortcut_grad is not None:
            grad_x = grad_x + shortcut_grad
    if grad_x is not None:
        gradients["x"] = grad_x
    return gradients
