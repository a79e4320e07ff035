"""Batch norm as official MOAT trains it, as a drop-in torch.nn.BatchNorm2d."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor, nn

from moat_kernels.ops.mbconv.description import Norm, NormParameters
from moat_kernels.ops.mbconv.reference import batch_norm
from moat_kernels.ops.mbconv.running import update_norm
from moat_kernels.tensor_access import tensor_of

_cached_norm = lru_cache(maxsize=256)(Norm)


class BatchNorm2d(nn.BatchNorm2d):
    """torch.nn.BatchNorm2d with MOAT's defaults and choice of the running variance.

    unbiased_running_var: PyTorch stores N/(N-1) times the batch variance; official MOAT (Keras
        SyncBatchNormalization) stores the batch variance itself, the default here. The output in
        training is the same.
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
        tracked = self._buffers["running_mean"] is not None
        frozen = tracked and not self.training
        # torch.compile would only warn about a cache.
        norm = Norm if torch.compiler.is_compiling() else _cached_norm
        return norm(self.eps, self.momentum, self.unbiased_running_var, frozen)

    def tensors(self) -> NormParameters:
        """This norm's tensors for `functional.mbconv`."""
        return NormParameters(*[tensor_of(self, name) for name in NormParameters._fields])

    def forward(self, input: Tensor) -> Tensor:
        self._check_input_dim(input)
        norm, tensors = self.description(), self.tensors()
        output, measured = batch_norm(input, norm, tensors)
        if measured is not None and self.training:
            count = input.numel() // max(1, input.shape[1])
            update_norm(norm, tensors, *measured, count)
        return output
