"""Batch norm as official MOAT trains it, as drop-in torch.nn modules."""

from __future__ import annotations

from functools import lru_cache
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from moat_kernels.ops.common.batch_norm import (
    Norm,
    NormParameters,
    leave_uncounted,
    update_norm,
)
from moat_kernels.ops.common.symbols import settled
from moat_kernels.ops.common.synchronization import group_name, world_name
from moat_kernels.ops.mbconv.reference import batch_norm
from moat_kernels.tensor_access import is_parametrized, plain_class, tensor_of

Module = TypeVar("Module", bound=nn.Module)

_cached_norm = lru_cache(maxsize=256)(Norm)


class BatchNorm2d(nn.BatchNorm2d):
    """torch.nn.BatchNorm2d with MOAT's defaults and choice of the running variance.

    unbiased_running_var: PyTorch stores N/(N-1) times the batch variance; official MOAT (Keras
        SyncBatchNormalization) stores the batch variance itself, the default here. The output in
        training is the same.

    A batch whose forward activation checkpointing repeats enters the running statistics once.
    """

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-3,
        momentum: float | None = 0.01,
        affine: bool = True,
        track_running_stats: bool = True,
        unbiased_running_var: bool = False,
    ) -> None:
        super().__init__(num_features, eps, momentum, affine, track_running_stats)
        self.unbiased_running_var = unbiased_running_var

    def description(self) -> Norm:
        """This norm for `functional.mbconv`; frozen if only this module is in eval mode."""
        return describe_norm(self)

    def tensors(self) -> NormParameters:
        """This norm's tensors for `functional.mbconv`."""
        return norm_tensors(self)

    def forward(self, input: Tensor) -> Tensor:
        self._check_input_dim(input)
        norm, tensors = self.description(), self.tensors()
        output, measured = batch_norm(input, norm, tensors)
        if measured is not None and self.training:
            mean, variance, *joined = measured
            count = joined[0] if joined else input.numel() // max(1, input.shape[1])
            update_norm(norm, tensors, mean, variance, count)
        return output


class SyncBatchNorm(BatchNorm2d):
    """BatchNorm2d that measures the batches of all ranks of a process group together.

    As torch.nn.SyncBatchNorm, but on any device, and with MOAT's running variance unless
    `unbiased_running_var`. Ranks may hold different numbers of samples, none included.

    process_group: the torch.distributed group; None is the world. Where there is no other rank,
        and in eval mode, this is BatchNorm2d.
    """

    def __init__(self, num_features: int, *args: Any, process_group: Any = None, **kwargs: Any):
        super().__init__(num_features, *args, **kwargs)
        self.process_group = process_group


class BatchNormAct2d(BatchNorm2d):
    """BatchNorm2d followed by its children `drop` and `act`, as timm's class of this name."""

    drop: nn.Module
    act: nn.Module

    def forward(self, input: Tensor) -> Tensor:
        return self.act(self.drop(super().forward(input)))


class SyncBatchNormAct2d(BatchNormAct2d, SyncBatchNorm):
    """SyncBatchNorm followed by its children `drop` and `act`."""


def convert_sync_batchnorm(module: Module, process_group: Any = None) -> Module:
    """Make the batch norms inside `module` synchronise over `process_group` (None: the world).

    Norms of two-dimensional maps become SyncBatchNorm of this package, which runs on any device,
    also under DistributedDataParallel, and keeps each norm's choice of the running variance:
    PyTorch's for torch.nn.BatchNorm2d. timm's BatchNormAct2d keeps its activation, which
    `torch.nn.SyncBatchNorm.convert_sync_batchnorm` would silently drop. BatchNorm1d and 3d become
    torch.nn.SyncBatchNorm. Fused blocks stay fused, by PyTorch's conversion too.

    Returns `module`, changed in place; a new module if it is itself a norm. Parameters and buffers
    stay the same objects. Call it before wrapping the model in DistributedDataParallel. Raises
    TypeError, before anything is changed, for batch norms of unknown subclasses and parametrized
    ones.
    """
    for path, inner in module.named_modules():
        if _is_batch_norm(inner) and not _is_convertible(inner):
            raise TypeError(
                f"{path or 'module'} is a {type(inner).__name__}, whose own forward, children or "
                "parametrizations a synchronised batch norm would lose"
            )
    return _convert(module, process_group)


def _convert(module: Module, process_group: Any) -> Module:
    if _is_batch_norm(module):
        if isinstance(module, nn.BatchNorm2d):
            return _synchronized(module, process_group)  # type: ignore[return-value]
        if isinstance(module, nn.SyncBatchNorm):
            return module
        return nn.SyncBatchNorm.convert_sync_batchnorm(module, process_group)
    for name, child in module.named_children():
        converted = _convert(child, process_group)
        if converted is not child:
            setattr(module, name, converted)
    return module


def _is_batch_norm(module: nn.Module) -> bool:
    return isinstance(module, nn.modules.batchnorm._BatchNorm)


def has_activation(norm: nn.Module) -> bool:
    """Whether a batch norm drops and activates too: timm's BatchNormAct2d and its like."""
    names = ("BatchNormAct2d", "SyncBatchNormAct", "SyncBatchNormAct2d", "FrozenBatchNormAct2d")
    return plain_class(norm).__name__ in names and {"drop", "act"} == norm._modules.keys() - {
        "parametrizations"
    }


def _is_convertible(norm: nn.Module) -> bool:
    stock = nn.modules.batchnorm._BatchNorm.forward, BatchNorm2d.forward, nn.SyncBatchNorm.forward
    if is_parametrized(norm):
        return False
    return has_activation(norm) or (type(norm).forward in stock and not norm._modules)


def is_unbiased(norm: nn.Module) -> bool:
    """Whether a batch norm module keeps PyTorch's unbiased running variance."""
    return norm.unbiased_running_var if isinstance(norm, BatchNorm2d) else True


def _synchronized(norm: nn.BatchNorm2d, process_group: Any) -> SyncBatchNorm:
    kind = SyncBatchNormAct2d if has_activation(norm) else SyncBatchNorm
    converted = kind(
        norm.num_features,
        norm.eps,
        norm.momentum,
        norm.affine,
        norm.track_running_stats,
        is_unbiased(norm),
        process_group=process_group,
    )
    converted._parameters.update(norm._parameters)
    converted._buffers.update(norm._buffers)
    converted._modules.update(norm._modules)
    converted.training = norm.training
    return converted


def is_frozen_norm(norm: nn.Module) -> bool:
    """Whether a module is torchvision's, timm's or detectron2's batch norm of fixed statistics.

    All of its tensors are buffers, which training never changes. detectron2's also holds
    num_batches_tracked; timm's FrozenBatchNormAct2d activates too.
    """
    kind = plain_class(norm)
    buffers = norm._buffers.keys() - {"num_batches_tracked"}
    return (
        kind.__name__ in ("FrozenBatchNorm2d", "FrozenBatchNormAct2d")
        and kind.__module__.partition(".")[0] in ("torchvision", "timm", "detectron2")
        and {"weight", "bias", "running_mean", "running_var"} == buffers
        and (not norm._modules or has_activation(norm))
    )


def describe_norm(module: nn.Module) -> Norm:
    """A batch norm module for `functional.mbconv`; frozen if it uses its running statistics.

    module: BatchNorm2d or SyncBatchNorm, this package's or torch.nn's, or one that
        `is_frozen_norm`. torch.nn's keep PyTorch's unbiased running variance.

    >>> describe_norm(nn.BatchNorm2d(8)).unbiased, describe_norm(BatchNorm2d(8)).unbiased
    (True, False)
    """
    # torch.compile would only warn about a cache.
    make = Norm if torch.compiler.is_compiling() else _cached_norm
    if not isinstance(module, nn.modules.batchnorm._BatchNorm):
        assert is_frozen_norm(module)
        return make(eps=settled(module.eps), unbiased=True, frozen=True)  # type: ignore[arg-type]
    group = None
    if module.training and isinstance(module, SyncBatchNorm | nn.SyncBatchNorm):
        chosen = module.process_group
        group = world_name() if chosen is None else group_name(chosen)
    return make(
        eps=settled(module.eps),
        momentum=settled(module.momentum),
        unbiased=is_unbiased(module),
        frozen=module._buffers["running_mean"] is not None and not module.training,
        process_group=group,
    )


def norm_tensors(module: nn.Module | None) -> NormParameters:
    """The tensors of a batch norm module for `functional.mbconv`, each [C] or None.

    None and nn.Identity, which are no norm, have none.
    """
    if module is None or plain_class(module) is nn.Identity:
        return NormParameters()
    if isinstance(module, nn.modules.batchnorm._BatchNorm):
        if module.training and not module.track_running_stats:
            leave_uncounted(module._buffers["running_mean"])
            return NormParameters(tensor_of(module, "weight"), tensor_of(module, "bias"))
        return NormParameters(*[tensor_of(module, name) for name in NormParameters._fields])
    assert is_frozen_norm(module)
    return NormParameters(*[tensor_of(module, name) for name in NormParameters._fields[:4]])
