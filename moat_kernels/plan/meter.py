"""Counting what a program allocates and which kernels it launches, while it runs."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch._C import DispatchKey
from torch._ops import OpOverload
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from moat_kernels.ops.common.registration import IMPLEMENTATIONS, LIBRARY
from moat_kernels.ops.triton_support.traffic import Pass
from moat_kernels.plan.operators import SEVERAL_PASSES, operator_passes

# CUDA's caching allocator hands out multiples of this.
ROUNDING = 512


class Meter(TorchDispatchMode):
    """Memory of the tensors made inside the `with` block, and the kernels of the operators.

    live, peak: bytes of storages, now and at most, each rounded up to 512 as on CUDA devices. What
    an operator of PyTorch allocates and frees inside itself (workspaces of cuBLAS and cuDNN) is not
    seen; this package's operators are seen through.
    passes: the list that kernels are appended to.
    """

    def __init__(self, passes: list[Pass]) -> None:
        super().__init__()
        self.passes = passes
        self.live = 0
        self.peak = 0
        self._storages: set[int] = set()

    def hold(self, tensors: Iterable[Tensor]) -> None:
        """Count tensors that exist already, until they are freed."""
        for tensor in tensors:
            storage = tensor.untyped_storage()
            if storage._cdata in self._storages:
                continue
            size = -(-storage.nbytes() // ROUNDING) * ROUNDING
            self._storages.add(storage._cdata)
            self.live += size
            weakref.finalize(storage, self._free, storage._cdata, size).atexit = False
        self.peak = max(self.peak, self.live)

    def _free(self, storage: int, size: int) -> None:
        self._storages.remove(storage)
        self.live -= size

    def __torch_dispatch__(
        self,
        func: OpOverload,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if func.namespace == LIBRARY.ns and func._opname in IMPLEMENTATIONS:
            with self:
                return IMPLEMENTATIONS[func._opname](*args, **kwargs)
        if _is_made_of_others(func):
            with self:
                return func.decompose(*args, **kwargs)
        result = func(*args, **kwargs)
        if func._opname == "convolution" and result.is_meta:
            result = _in_format_of_cudnn(result, *args[:2])
        self.hold(leaf for leaf in tree_iter(result) if isinstance(leaf, Tensor))
        self.passes += operator_passes(func, args, kwargs, result)
        return result


def _in_format_of_cudnn(result: Tensor, x: Tensor, weight: Tensor) -> Tensor:
    """A convolution's result in channels_last if either argument is; else contiguous.

    So on CUDA devices. Of meta tensors PyTorch leaves it contiguous.
    """
    if any(tensor.is_contiguous(memory_format=torch.channels_last) for tensor in (x, weight)):
        return result.contiguous(memory_format=torch.channels_last)
    return result


@functools.cache
def _is_made_of_others(operator: OpOverload) -> bool:
    """Whether PyTorch composes it of operators that matter here.

    Most such arrive in pieces already; from inside this package's operators they arrive whole.
    """
    composed = operator.has_kernel_for_dispatch_key(DispatchKey.CompositeImplicitAutograd)
    return composed and operator._opname not in SEVERAL_PASSES
