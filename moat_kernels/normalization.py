"""Batch norm as official MOAT trains it, as drop-in torch.nn modules."""

from __future__ import annotations

from functools import lru_cache
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from moat_kernels.ops.mbconv.description import Norm, NormParameters
from moat_kernels.ops.mbconv.reference import batch_norm
from moat_kernels.ops.mbconv.running import update_norm
from moat_kernels.ops.synchronization import group_name, world_name
from moat_kernels.tensor_access import tensor_of

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


def convert_sync_batchnorm(module: Module, process_group: Any = None) -> Module:
    """Make the batch norms inside `module` synchronise over `process_group` (None: the world).

    This package's BatchNorm2d becomes SyncBatchNorm, which keeps its choice of the running
    variance and runs on CPUs too. Others become torch.nn.SyncBatchNorm, as
    `torch.nn.SyncBatchNorm.convert_sync_batchnorm` would make *all* of them: with PyTorch's
    unbiased running variance, on GPUs only. Fused blocks stay fused either way.

    Returns `module`, changed in place; a new module if it is itself a norm. Parameters and buffers
    stay the same objects. Call it before wrapping the model in DistributedDataParallel.
    """
    if isinstance(module, BatchNorm2d):
        return _synchronized(module, process_group)  # type: ignore[return-value]
    if isinstance(module, nn.modules.batchnorm._BatchNorm):
        return nn.SyncBatchNorm.convert_sync_batchnorm(module, process_group)
    for name, child in module.named_children():
        converted = convert_sync_batchnorm(child, process_group)
        if converted is not child:
            setattr(module, name, converted)
    return module


def _synchronized(norm: BatchNorm2d, process_group: Any) -> SyncBatchNorm:
    converted = SyncBatchNorm(
        norm.num_features,
        norm.eps,
        norm.momentum,
        norm.affine,
        norm.track_running_stats,
        norm.unbiased_running_var,
        process_group=process_group,
    )
    converted._parameters.update(norm._parameters)
    converted._buffers.update(norm._buffers)
    return converted.train(norm.training)


def describe_norm(module: nn.Module) -> Norm:
    """A batch norm module for `functional.mbconv`; frozen if it uses its running statistics.

    module: BatchNorm2d or SyncBatchNorm, this package's or torch.nn's. The latter keep PyTorch's
        unbiased running variance.
    """
    assert isinstance(module, nn.modules.batchnorm._BatchNorm)
    group = None
    if module.training and isinstance(module, SyncBatchNorm | nn.SyncBatchNorm):
        chosen = module.process_group
        group = world_name() if chosen is None else group_name(chosen)
    # torch.compile would only warn about a cache.
    make = Norm if torch.compiler.is_compiling() else _cached_norm
    return make(
        eps=module.eps,
        momentum=module.momentum,
        unbiased=module.unbiased_running_var if isinstance(module, BatchNorm2d) else True,
        frozen=module._buffers["running_mean"] is not None and not module.training,
        process_group=group,
    )


def norm_tensors(module: nn.Module) -> NormParameters:
    """The tensors of a batch norm module for `functional.mbconv`."""
    assert isinstance(module, nn.modules.batchnorm._BatchNorm)
    if module.training and not module.track_running_stats:
        return NormParameters(module.weight, module.bias)
    return NormParameters(*[tensor_of(module, name) for name in NormParameters._fields])
