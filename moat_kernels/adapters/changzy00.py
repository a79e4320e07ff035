"""changzy00's MOAT (pytorch-attention, vision_transformers/moat.py)."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from moat_kernels.adapters.base import (
    AttentionAdapter,
    AttentionReading,
    MBConvAdapter,
)
from moat_kernels.adapters.reading import (
    Bottleneck,
    Gate,
    NotCovered,
    child_names,
    read_bottleneck,
    read_gate,
    refuse_dropout,
)
from moat_kernels.linear import apply_linear
from moat_kernels.ops.window_attention import WindowAttentionDescription


def _read_se(module: Any) -> Gate:
    if child_names(module) != {"avg_pool", "fc"} or len(module.fc) != 4:
        raise NotCovered("squeeze-and-excitation of unknown structure")
    return read_gate(*module.fc)


class MBConv(MBConvAdapter):
    implementation = "changzy00 MOAT"
    class_name = "MBConv"
    children = ("bn", "conv1", "bn1", "act", "conv2", "bn2", "conv3")
    optional = ("se",)
    covers = "everything that it builds; no shortcut where the shape changes, as there"

    def read(self, block: Any) -> Bottleneck:
        return read_bottleneck(
            pre_norm=block.bn,
            expand=block.conv1,
            expand_norm=block.bn1,
            expand_activation=block.act,
            depthwise=block.conv2,
            depthwise_norm=block.bn2,
            depthwise_activation=block.act,
            gate=_read_se(block.se) if block.use_se else None,
            project=block.conv3,
            residual=bool(block.shortcut),
        )


class Attention(AttentionAdapter):
    """Of this structure are also the attentions of older vision transformers (DeiT, timm 0.6)."""

    implementation = "changzy00 MOAT"
    class_name = "Attention"
    children = ("qkv", "attn_drop", "proj", "proj_drop")
    covers = "tokens [B, N, C] without position bias"
    leaves = "in training: attention dropout"

    def consumed(self, module: Any) -> Iterable[nn.Module]:
        return [module.attn_drop]

    def read(self, module: Any) -> AttentionReading:
        refuse_dropout(module.attn_drop, "the attention weights")
        heads = module.num_heads
        head_dim = module.qkv.out_features // (3 * heads)
        description = WindowAttentionDescription(heads, head_dim, None, float(module.scale))
        return AttentionReading(description, None)

    def compute(
        self, module: Any, attention: AttentionReading, *inputs: Any, **options: Any
    ) -> Tensor:
        (x,) = inputs  # [B, tokens, C]
        if x.dim() != 3:
            raise NotCovered(f"an input of {x.dim()} dimensions")
        rows = attention.attend(apply_linear(module.qkv, x)[:, None])
        return module.proj_drop(apply_linear(module.proj, rows[:, 0]))

    def example(self, module: Any) -> tuple[Tensor, ...]:
        return (torch.randn(2, 6, module.qkv.in_features, dtype=torch.float64),)


ADAPTERS = (MBConv(), Attention())
