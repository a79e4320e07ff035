"""Autocast of CUDA devices for meta tensors, which PyTorch's own autocast does not know."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map_only

# Of the functions that these models call in the forward pass, by name: those that autocast computes
# in the low precision, and those that it computes in float32, on CUDA devices; the others take what
# they get. Source: PyTorch's documentation of torch.amp, "CUDA Op-Specific Behavior".
_LOW = frozenset({"conv2d", "linear", "matmul", "__matmul__", "bmm", "mm", "addmm", "baddbmm"})
_FLOAT32 = frozenset({"layer_norm"})
# In float32 unless the call names another dtype.
_FLOAT32_BY_DEFAULT = frozenset({"softmax", "log_softmax", "sum"})


class CudaAutocast(TorchFunctionMode):
    """`torch.autocast("cuda", dtype)` on a machine that may have no GPU, for meta tensors."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype

    def __enter__(self) -> CudaAutocast:
        self.outer = (torch.is_autocast_enabled("cuda"), torch.get_autocast_dtype("cuda"))
        torch.set_autocast_enabled("cuda", True)
        torch.set_autocast_dtype("cuda", self.dtype)
        return super().__enter__()

    def __exit__(self, *exception: Any) -> None:
        super().__exit__(*exception)
        torch.set_autocast_enabled("cuda", self.outer[0])
        torch.set_autocast_dtype("cuda", self.outer[1])

    def __torch_function__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        dtype = self._dtype_of(getattr(func, "__name__", ""), kwargs)
        if dtype is not None and torch.is_autocast_enabled("cuda"):
            args, kwargs = tree_map_only(Tensor, lambda t: _cast(t, dtype), (args, kwargs))
        return func(*args, **kwargs)

    def _dtype_of(self, name: str, kwargs: dict[str, Any]) -> torch.dtype | None:
        if name in _LOW:
            return self.dtype
        if name in _FLOAT32 or (name in _FLOAT32_BY_DEFAULT and kwargs.get("dtype") is None):
            return torch.float32
        return None


def _cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    eligible = tensor.is_floating_point() and tensor.dtype != torch.float64
    return tensor.to(dtype) if eligible else tensor
