"""The plain blocks of this package."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from moat_kernels import reference
from moat_kernels.adapters.base import Adapter, FusedClass
from moat_kernels.adapters.reading import NotCovered, child_names
from moat_kernels.inspection import obstacle
from moat_kernels.modules import (
    FusedAttention,
    FusedInvertedBottleneck,
    FusedMBConv,
    FusedMOATBlock,
)

_BOTTLENECK = FusedInvertedBottleneck._fused_children


class _Ours(Adapter):
    """The fused class exists already, with the same parameters: the module becomes one of it."""

    implementation = "moat_kernels.reference"
    children = ()
    stock: type[nn.Module]
    fused: type[nn.Module]
    read_children: tuple[str, ...] = ()
    covers = "everything"
    compared = False

    def is_for(self, kind: type) -> bool:
        return kind is self.stock

    def consumed(self, module: nn.Module) -> list[nn.Module]:
        return [module._modules[name] for name in self.read_children if name in child_names(module)]  # type: ignore[misc]

    def check(self, module: nn.Module) -> None:
        reason = obstacle(module, self.read_children)
        if reason:
            raise NotCovered(reason)

    def run(self, module: nn.Module, recompute: str, *inputs: Any, **options: Any) -> Any:
        return getattr(self.fused, self.method)(module, *inputs, **options)

    def example(self, module: nn.Module) -> tuple[Tensor, ...]:
        raise NotImplementedError("nothing to compare: both are of this package")

    def fused_class(self, stock: type[nn.Module], recompute: str) -> FusedClass:
        return FusedClass(self.fused, {"recompute": recompute})


class MBConvBlock(_Ours):
    class_name = "MBConvBlock"
    op = "mbconv"
    stock, fused, read_children = reference.MBConvBlock, FusedMBConv, _BOTTLENECK


class MOATBlock(_Ours):
    class_name = "MOATBlock"
    op = "mbconv"
    stock, fused, read_children = reference.MOATBlock, FusedMOATBlock, _BOTTLENECK


class Attention(_Ours):
    class_name = "Attention"
    op = "window_attention"
    stock, fused = reference.Attention, FusedAttention


ADAPTERS = (MOATBlock(), MBConvBlock(), Attention())
