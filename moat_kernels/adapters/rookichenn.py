"""RooKichenn's PyTorch MOAT (pytorch-MOAT, classification/moat.py).

Its inverted bottleneck filters before it expands, pools the shortcut by maximum, and has no
activation between the expand norm and the last convolution.
"""

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
    DropPathReading,
    Gate,
    NotCovered,
    child_names,
    class_name,
    read_bottleneck,
    read_gate,
    read_swin_table,
)
from moat_kernels.linear import apply_linear
from moat_kernels.ops.window_attention import WindowAttentionDescription

# Children of timm's DepthwiseSeparableConv that do something, and those that are Identity here.
_CONVOLUTIONS = {"conv_dw", "bn1", "conv_pw", "bn2"}
_IDENTITIES = ("se", "aa")


def _read_se(module: Any) -> Gate | None:
    if class_name(module) == "Identity":
        return None
    if child_names(module) != {"conv_reduce", "act1", "conv_expand", "gate"}:
        raise NotCovered(f"channel attention {class_name(module)}")
    return read_gate(module.conv_reduce, module.act1, module.conv_expand, module.gate)


def _check_separable(conv: Any) -> None:
    if class_name(conv) != "DepthwiseSeparableConv":
        raise NotCovered(f"{class_name(conv)} in the main path")
    # Its drop path belongs to its own residual, which it does not have here.
    if getattr(conv, "has_skip", True) or getattr(conv, "has_residual", False):
        raise NotCovered("DepthwiseSeparableConv with a residual")
    for name in child_names(conv) - _CONVOLUTIONS - {"drop_path"}:
        if name not in _IDENTITIES or class_name(getattr(conv, name)) != "Identity":
            raise NotCovered(f"DepthwiseSeparableConv with {name}")


class MBConvBlock(MBConvAdapter):
    implementation = "RooKichenn MOAT"
    class_name = "MBConvBlock"
    children = ("main_path", "skip_path")
    covers = "depthwise-first bottleneck, SE, max-pooled shortcut, drop path"

    def read(self, block: Any) -> Bottleneck:
        if len(block.main_path) != 4:
            raise NotCovered("a main path of unknown structure")
        pre_norm, separable, gate, project = block.main_path
        _check_separable(separable)
        pool = shortcut = None
        if class_name(block.skip_path) == "Sequential" and len(block.skip_path) == 2:
            pool, shortcut = block.skip_path
        elif class_name(block.skip_path) != "Identity":
            raise NotCovered(f"{class_name(block.skip_path)} as shortcut")
        probability = float(block.drop_path_rate)
        return read_bottleneck(
            order="depthwise_first",
            pre_norm=pre_norm,
            depthwise=separable.conv_dw,
            depthwise_norm=separable.bn1,
            expand=separable.conv_pw,
            expand_norm=separable.bn2,
            gate=_read_se(gate),
            project=project,
            pool=pool,
            shortcut=shortcut,
            drop_path=DropPathReading(probability) if block.training and probability else None,
        )


class RelativeSelfAttention(AttentionAdapter):
    implementation = "RooKichenn MOAT"
    class_name = "RelativeSelfAttention"
    children = ("qkv_mapping", "attn_drop", "proj", "proj_drop", "softmax")
    tensors = ("relative_position_bias_table", "relative_position_index")
    covers = "windowed and whole-map attention (attn_drop is not used there, nor here)"

    def consumed(self, module: Any) -> Iterable[nn.Module]:
        return [module.softmax]

    def read(self, module: Any) -> AttentionReading:
        heads, window = module.num_heads, tuple(module.window_size)
        description = WindowAttentionDescription(
            heads, module.in_channels // heads, None, float(module.scale)
        )
        table = read_swin_table(module.relative_position_bias_table, window)
        return AttentionReading(description, table)

    def compute(
        self, module: Any, attention: AttentionReading, *inputs: Any, **options: Any
    ) -> Tensor:
        (x,) = inputs  # [windows, tokens, C]
        if x.shape[1] != module.attn_area:
            raise NotCovered(f"{x.shape[1]} tokens, not the {module.attn_area} of the bias table")
        qkv = apply_linear(module.qkv_mapping, x).unflatten(1, tuple(module.window_size))
        return module.proj_drop(apply_linear(module.proj, attention.attend(qkv).flatten(1, 2)))

    def example(self, module: Any) -> tuple[Tensor, ...]:
        return (torch.randn(2, module.attn_area, module.in_channels, dtype=torch.float64),)


ADAPTERS = (MBConvBlock(), RelativeSelfAttention())
