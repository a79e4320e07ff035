"""In-place update of the running statistics of an inverted bottleneck's norms."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from moat_kernels.ops.mbconv.description import (
    MBConvDescription,
    MBConvParameters,
    Norm,
    NormParameters,
)


@torch.no_grad()
def update_norm(
    norm: Norm, parameters: NormParameters, mean: Tensor, variance: Tensor, count: int | Tensor
) -> None:
    """Blend the batch's mean and biased variance [C] over `count` values into the running ones.

    count: a tensor [] where other ranks' values count; its value is then not looked at, and the
        unbiased variance of a single value is 0.
    Does nothing for a norm that tracks no statistics, for an empty batch, or in a recomputation.
    """
    running_mean, running_var = parameters.running_mean, parameters.running_var
    if running_mean is None or running_var is None or _recomputing():
        return
    if not isinstance(count, Tensor):
        if count == 0:
            return
        if norm.unbiased and count == 1:
            raise ValueError("the unbiased running variance needs at least two values per channel")
    momentum: float | Tensor
    if parameters.num_batches_tracked is not None:
        parameters.num_batches_tracked.add_(1)
    if norm.momentum is not None:
        momentum = norm.momentum
    elif parameters.num_batches_tracked is not None:
        momentum = 1.0 / parameters.num_batches_tracked.to(mean.dtype)
    else:
        raise ValueError("momentum is None (a cumulative average) without num_batches_tracked")
    if isinstance(count, Tensor):
        momentum = momentum * (count > 0).to(running_mean.dtype)
    if norm.unbiased and isinstance(count, Tensor):
        variance = variance * (count / (count - 1).clamp(min=1))
    elif norm.unbiased:
        variance = variance * (count / (count - 1))
    running_mean.lerp_(mean.to(running_mean.dtype), momentum)
    running_var.lerp_(variance.to(running_var.dtype), momentum)


def _recomputing() -> bool:
    """Whether autograd's backward pass is running: activation checkpointing calls forward again.

    That batch was counted in the forward pass. torch.compile traces a checkpointed region once.
    """
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


def values_per_channel(
    name: str, description: MBConvDescription, rows_in: int, rows_out: int
) -> int:
    """How many values per channel the norm called `name` sees: B*H*W before or after the stride."""
    before_stride = {"pre_norm"}
    if description.order == "expand_first":
        before_stride.add("expand_norm")
    return rows_in if name in before_stride else rows_out


def update_running_statistics(
    x: Tensor,
    output: Tensor,
    parameters: MBConvParameters,
    description: MBConvDescription,
    moments: Mapping[str, tuple[Tensor, ...]],
) -> None:
    """Update every norm in `moments` (name -> batch mean, biased variance, count over ranks)."""
    rows_in = x.shape[0] * x.shape[2] * x.shape[3]
    rows_out = output.shape[0] * output.shape[2] * output.shape[3]
    for name, (mean, variance, *joined) in moments.items():
        count = joined[0] if joined else values_per_channel(name, description, rows_in, rows_out)
        update_norm(getattr(description, name), getattr(parameters, name), mean, variance, count)
