"""A batch norm: its description, its tensors, and the update of its running statistics."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary


@dataclass(frozen=True)
class Norm:
    """A batch norm over the channels of [B, C, H, W].

    eps: added to the variance (official MOAT: 1e-3; PyTorch: 1e-5).
    momentum: share of the new batch in the running statistics; None averages all batches.
    unbiased: whether the running variance takes N/(N-1) times the batch variance, as PyTorch
        does. Official MOAT (Keras SyncBatchNormalization) stores the biased one.
    frozen: normalise with the running statistics even in training.
    process_group: name of the torch.distributed group whose ranks measure their batches together;
        None: this process alone.
    """

    eps: float = 1e-3
    momentum: float | None = 0.01
    unbiased: bool = False
    frozen: bool = False
    process_group: str | None = None

    def __post_init__(self) -> None:
        if not self.eps > 0:
            raise ValueError(f"eps must be > 0, got {self.eps!r}")
        if self.momentum is not None and not 0 <= self.momentum <= 1:
            raise ValueError(f"momentum must be None or within [0, 1], got {self.momentum!r}")
        if self.process_group is not None and not isinstance(self.process_group, str):
            raise TypeError(
                "process_group must be None or a group's name (group.group_name), "
                f"got {self.process_group!r}"
            )


class NormParameters(NamedTuple):
    """Tensors of one batch norm over C channels; any may be None, as in torch.nn.BatchNorm2d."""

    weight: Tensor | None = None  # [C]
    bias: Tensor | None = None  # [C]
    running_mean: Tensor | None = None  # [C]
    running_var: Tensor | None = None  # [C]
    num_batches_tracked: Tensor | None = None  # [], int64


# By the running mean of a norm: its forward passes that did not count, since one that did.
_uncounted: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def leave_uncounted(running_mean: Tensor | None) -> None:
    """Note that a forward pass in training left its batch out of statistics that the norm has.

    Wrappers of activation checkpointing do that, and let the recomputation count (fairscale's
    patch_batchnorm).
    """
    if running_mean is not None and not torch.compiler.is_compiling() and not _recomputing():
        _uncounted[running_mean] = _uncounted.get(running_mean, 0) + 1


def _was_counted(running_mean: Tensor) -> bool:
    """Whether the forward pass that is now recomputed has counted its batch."""
    passes = _uncounted.pop(running_mean, 0)
    if passes > 1:
        _uncounted[running_mean] = passes - 1
    return passes == 0


@torch.no_grad()
def update_norm(
    norm: Norm, parameters: NormParameters, mean: Tensor, variance: Tensor, count: int | Tensor
) -> None:
    """Blend the batch's mean and biased variance [C] over `count` values into the running ones.

    count: a tensor [] where other ranks' values count; its value is then not looked at, and the
        unbiased variance of a single value is 0.
    Does nothing for a norm that tracks no statistics, for an empty batch, or in a recomputation of
    what was counted.
    """
    running_mean, running_var = parameters.running_mean, parameters.running_var
    if running_mean is None or running_var is None:
        return
    if _recomputing():
        if _was_counted(running_mean):
            return
    elif not torch.compiler.is_compiling() and _uncounted:
        _uncounted.pop(running_mean, None)
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
