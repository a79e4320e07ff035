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


class RunningUpdate(NamedTuple):
    """A blend of a batch's moments into running ones that is due.

    momentum: share of the batch; None: 1 / num_batches_tracked, counted with this batch.
    correction: factor of the biased variance.
    """

    running_mean: Tensor  # [C]
    running_var: Tensor  # [C]
    num_batches_tracked: Tensor | None  # [], int64
    momentum: float | None
    correction: float

    @property
    def tensors(self) -> tuple[Tensor, Tensor, Tensor | None]:
        """What is changed."""
        return self.running_mean, self.running_var, self.num_batches_tracked


def plan_update(norm: Norm, parameters: NormParameters, count: int | None) -> RunningUpdate | None:
    """What a batch of `count` values of each channel does to the running statistics.

    count: None where other ranks' values count; the correction is then 1. To be asked once for
    each forward pass. Nothing is due for a norm that tracks no statistics, for an empty batch, or
    in a recomputation of what was counted.
    """
    running_mean, running_var = parameters.running_mean, parameters.running_var
    if running_mean is None or running_var is None:
        return None
    if _recomputing():
        if _was_counted(running_mean):
            return None
    elif not torch.compiler.is_compiling() and _uncounted:
        _uncounted.pop(running_mean, None)
    if count == 0:
        return None
    if norm.unbiased and count == 1:
        raise ValueError("the unbiased running variance needs at least two values per channel")
    tracked = parameters.num_batches_tracked
    if norm.momentum is None and tracked is None:
        raise ValueError("momentum is None (a cumulative average) without num_batches_tracked")
    correction = 1.0 if count is None or not norm.unbiased else count / (count - 1)
    return RunningUpdate(running_mean, running_var, tracked, norm.momentum, correction)


@torch.no_grad()
def apply_update(update: RunningUpdate, mean: Tensor, variance: Tensor) -> None:
    """Blend a batch's mean and biased variance [C] into the running ones."""
    _blend(update, mean, variance * update.correction if update.correction != 1 else variance, 1)


def _blend(update: RunningUpdate, mean: Tensor, variance: Tensor, share: int | Tensor) -> None:
    """share: multiplies the momentum."""
    running_mean, running_var, tracked, momentum, _ = update
    if tracked is not None:
        tracked.add_(1)
    weight: float | Tensor
    if momentum is not None:
        weight = momentum * share
    else:
        assert tracked is not None
        weight = share / tracked.to(mean.dtype)
    running_mean.lerp_(mean.to(running_mean.dtype), weight)
    running_var.lerp_(variance.to(running_var.dtype), weight)


@torch.no_grad()
def update_norm(
    norm: Norm, parameters: NormParameters, mean: Tensor, variance: Tensor, count: int | Tensor
) -> None:
    """Blend the batch's mean and biased variance [C] over `count` values into the running ones.

    count: a tensor [] where other ranks' values count; its value is then not looked at, and the
        unbiased variance of a single value is 0.
    See `plan_update` for when nothing is done.
    """
    if not isinstance(count, Tensor):
        update = plan_update(norm, parameters, count)
        if update is not None:
            apply_update(update, mean, variance)
        return
    update = plan_update(norm, parameters, None)
    if update is not None:
        if norm.unbiased:
            variance = variance * (count / (count - 1).clamp(min=1))
        _blend(update, mean, variance, (count > 0).to(update.running_mean.dtype))


def _recomputing() -> bool:
    """Whether autograd's backward pass is running: activation checkpointing calls forward again.

    That batch was counted in the forward pass. torch.compile traces a checkpointed region once.
    """
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1
