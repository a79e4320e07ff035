"""The plain blocks of this package."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from moat_kernels import reference
from moat_kernels.adapters.base import Adapter, FusedClass
from moat_kernels.block_reading import READ_CHILDREN, read_block
from moat_kernels.modules import FusedAttention, FusedMBConv, FusedMOATBlock
from moat_kernels.tensor_access import child


class _Ours(Adapter):
    """The fused class exists already, with the same parameters: the module becomes one of it."""

    implementation = "moat_kernels.reference"
    children = ()
    stock: type[nn.Module]
    fused: type[nn.Module]
    covers = "everything"

    def is_for(self, kind: type) -> bool:
        return kind is self.stock

    def run(self, module: nn.Module, recompute: str, *inputs: Any, **options: Any) -> Any:
        """For trials: a fused module does not come back here."""
        stock = type(module)
        module.__class__ = self.make_class(recompute)
        try:
            return module(*inputs, **options)
        finally:
            module.__class__ = stock

    def make_class(self, recompute: str) -> type[nn.Module]:
        return type(self.fused.__name__, (self.fused,), {"recompute": recompute})

    def fused_class(self, stock: type[nn.Module], recompute: str) -> FusedClass:
        return FusedClass(self.fused, {"recompute": recompute})


class MBConvBlock(_Ours):
    class_name = "MBConvBlock"
    op = "mbconv"
    stock: type[nn.Module] = reference.MBConvBlock
    fused: type[nn.Module] = FusedMBConv

    def consumed(self, module: nn.Module) -> list[nn.Module]:
        return [found for name in READ_CHILDREN if (found := child(module, name)) is not None]

    def check(self, module: nn.Module) -> None:
        read_block(module)  # type: ignore[arg-type]

    def example(self, module: Any) -> tuple[Tensor, ...]:
        return (torch.randn(2, module.expand_conv.in_channels, 6, 8, dtype=torch.float64),)


class MOATBlock(MBConvBlock):
    class_name = "MOATBlock"
    stock, fused = reference.MOATBlock, FusedMOATBlock


class Attention(_Ours):
    class_name = "Attention"
    op = "window_attention"
    stock, fused = reference.Attention, FusedAttention

    def consumed(self, module: nn.Module) -> list[nn.Module]:
        return []

    def check(self, module: nn.Module) -> None:
        """Its linear layers are called as they are."""

    def example(self, module: Any) -> tuple[Tensor, ...]:
        return (torch.randn(2, 3, 4, module.qkv.in_features, dtype=torch.float64),)


ADAPTERS = (MOATBlock(), MBConvBlock(), Attention())
