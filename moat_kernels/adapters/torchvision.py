"""torchvision's MaxViT (torchvision/models/maxvit.py)."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, nn

from moat_kernels.adapters.base import (
    AttentionAdapter,
    AttentionReading,
    MBConvAdapter,
)
from moat_kernels.adapters.freezing import (
    AttentionHalf,
    Mlp,
    StemPart,
    StemReader,
    refuse_drop_path,
)
from moat_kernels.adapters.outline import Outline, Settings, own_tensors
from moat_kernels.adapters.reading import (
    Bottleneck,
    NotCovered,
    child_names,
    class_name,
    read_bottleneck,
    read_drop_path,
    read_gate,
    read_swin_table,
    refuse_dropout,
)
from moat_kernels.adapters.transformer import TransformerAdapter, TransformerHalf
from moat_kernels.chains import Container
from moat_kernels.linear import apply_linear
from moat_kernels.ops.window_attention import WindowAttentionDescription
from moat_kernels.tensor_access import child, tensor_of


def _attention_settings(attention: Any) -> Hashable:
    sizes = (attention.size, attention.n_heads, attention.head_dim, attention.scale_factor)
    return sizes, own_tensors(attention)


def _nothing(_: nn.Module) -> None:
    return None


# What reading looks at of torchvision's classes.
_CLASSES: Mapping[str, Settings] = {
    "RelativePositionalMultiHeadAttention": _attention_settings,
    "StochasticDepth": attrgetter("p", "mode", "training"),
    **dict.fromkeys(("WindowPartition", "WindowDepartition", "SwapAxes"), _nothing),
    **dict.fromkeys(("Conv2dNormActivation", "SqueezeExcitation"), _nothing),
    "AdaptiveAvgPool2d": _nothing,
}


class MBConv(MBConvAdapter):
    implementation = "torchvision"
    class_name = "MBConv"
    children = ("proj", "stochastic_depth", "layers")
    outline = Outline(_CLASSES)
    covers = "everything that MaxVit builds"
    leaves = "stochastic depth by batch"

    def recognises(self, module: nn.Module) -> bool:
        layers = {"pre_norm", "conv_a", "conv_b", "squeeze_excitation", "conv_c"}
        return super().recognises(module) and child_names(module.layers) == layers  # type: ignore[arg-type]

    def read(self, block: Any) -> Bottleneck:
        layers, gate = block.layers, block.layers.squeeze_excitation
        first, second = layers.conv_a, layers.conv_b
        for part in (first, second):
            if child_names(part) != {"0", "1", "2"}:
                raise NotCovered("a convolution that is not convolution, norm, activation")
        if class_name(gate) != "SqueezeExcitation":
            raise NotCovered(f"channel attention {class_name(gate)}")
        pool = shortcut = None
        if class_name(block.proj) == "Sequential":
            *pools, shortcut = block.proj
            if len(pools) > 1:
                raise NotCovered("a shortcut of unknown structure")
            pool = pools[0] if pools else None
        elif class_name(block.proj) != "Identity":
            raise NotCovered(f"{class_name(block.proj)} as shortcut")
        return read_bottleneck(
            pre_norm=layers.pre_norm,
            expand=first[0],
            expand_norm=first[1],
            expand_activation=first[2],
            depthwise=second[0],
            depthwise_norm=second[1],
            depthwise_activation=second[2],
            gate=read_gate(gate.fc1, gate.activation, gate.fc2, gate.scale_activation),
            project=layers.conv_c,
            pool=pool,
            shortcut=shortcut,
            drop_path=read_drop_path(block.stochastic_depth),
        )


def _read_table(attention: Any) -> Tensor:
    table = tensor_of(attention, "relative_position_bias_table")
    return read_swin_table(table, (attention.size, attention.size))


class RelativePositionalMultiHeadAttention(AttentionAdapter):
    implementation = "torchvision"
    class_name = "RelativePositionalMultiHeadAttention"
    children = ("to_qkv", "merge")
    tensors = ("relative_position_bias_table", "relative_position_index")
    covers = "everything that MaxVit builds"

    def consumed(self, module: nn.Module) -> Iterable[nn.Module]:
        return []

    def read(self, module: Any) -> AttentionReading:
        description = WindowAttentionDescription(
            module.n_heads, module.head_dim, None, float(module.scale_factor)
        )
        return AttentionReading(description, _read_table(module))

    def compute(
        self, module: Any, attention: AttentionReading, *inputs: Any, **options: Any
    ) -> Tensor:
        (x,) = inputs  # [B, windows, tokens, C]
        qkv = apply_linear(module.to_qkv, x).flatten(0, 1).unflatten(1, (module.size, module.size))
        return apply_linear(module.merge, attention.attend(qkv).view(*x.shape[:3], -1))

    def example(self, module: Any) -> tuple[Tensor, ...]:
        channels = module.to_qkv.in_features
        return (torch.randn(1, 2, module.max_seq_len, channels, dtype=torch.float64),)


class PartitionAttentionLayer(TransformerAdapter):
    """The whole layer, without cutting the map into windows and back."""

    implementation = "torchvision"
    class_name = "PartitionAttentionLayer"
    children = (
        *("partition_op", "departition_op", "partition_swap", "departition_swap"),
        *("attn_layer", "mlp_layer", "stochastic_dropout"),
    )
    covers = "window and grid partition, without copies"
    leaves = "dropout in attn_layer or mlp_layer (then only its attention is fused)"
    outline = Outline(_CLASSES, settings=("partition_type", "p", "grid_size"))
    attention = RelativePositionalMultiHeadAttention()

    def consumed(self, module: Any) -> Iterable[nn.Module]:
        partition = (module.partition_op, module.partition_swap)
        reverse = (module.departition_op, module.departition_swap)
        return [*partition, *reverse, module.attn_layer, module.attn_layer[1]]

    def describe(self, module: Any) -> WindowAttentionDescription:
        for layers in (module.attn_layer, module.mlp_layer):
            for dropout in layers:
                if getattr(dropout, "p", 0.0) > 0:
                    raise NotCovered("dropout, drawn window by window")
        inner = module.attn_layer[1]
        if len(module.attn_layer) != 3 or class_name(inner) != self.attention.class_name:
            raise NotCovered("attention of unknown structure")
        self.attention.check_structure(inner)
        return WindowAttentionDescription(
            inner.n_heads,
            inner.head_dim,
            (inner.size, inner.size),
            float(inner.scale_factor),
            partition="grid" if module.partition_type == "grid" else "window",
        )

    def read_table(self, module: Any, known: bool = False) -> Tensor | None:
        return _read_table(child(child(module, "attn_layer"), "1"))

    def compute(
        self, module: Any, attention: AttentionReading, *inputs: Any, **options: Any
    ) -> Tensor:
        (x,) = inputs
        _check_map(module, tuple(x.shape[2:]))
        norm, inner, dropout = module.attn_layer
        x = x.permute(0, 2, 3, 1)
        rows = attention.attend(apply_linear(inner.to_qkv, norm(x)))
        attended = dropout(apply_linear(inner.merge, rows))
        x = x + module.stochastic_dropout(attended)
        x = x + module.stochastic_dropout(module.mlp_layer(x))
        return x.permute(0, 3, 1, 2)

    def read_half(self, module: Any, attention: AttentionReading) -> AttentionHalf:
        size = tuple(module.grid_size)
        _check_map(module, size)
        norm, inner, _ = module.attn_layer
        return AttentionHalf(
            norm,
            inner.to_qkv,
            inner.merge,
            attention,
            drop_path=read_drop_path(module.stochastic_dropout),
            map_size=size,
            branch=("mlp_layer", "stochastic_dropout"),
            branch_rows=True,
        )

    def half_consumed(self, module: Any) -> Iterable[nn.Module]:
        norm, inner, dropout = module.attn_layer
        return (norm, inner.to_qkv, inner.merge, dropout)

    def example(self, module: Any) -> tuple[Tensor, ...]:
        channels = module.attn_layer[1].to_qkv.in_features
        return (torch.randn(1, channels, *module.grid_size, dtype=torch.float64),)


def _check_map(layer: Any, size: tuple[int, ...]) -> None:
    """Raise NotCovered for maps that the layer does not take, or cuts into other windows."""
    height, width = layer.grid_size
    if size != (height, width) or height % layer.p or width % layer.p:
        raise NotCovered(f"a map of {size}, not the layer's {layer.grid_size}")
    tokens = (layer.p, layer.p)
    if layer.partition_type == "grid":
        tokens = (height // layer.p, width // layer.p)
    window = layer.attn_layer[1].size
    if tokens != (window, window):
        raise NotCovered(f"windows of {tokens}, not the {window} of the bias table")


class PartitionHalf(TransformerHalf):
    def read_mlp(self, layer: Any) -> Mlp:
        if len(layer.mlp_layer) != 5:
            raise NotCovered("an MLP of unknown structure")
        norm, fc1, activation, fc2, dropout = layer.mlp_layer
        refuse_dropout(dropout, "the MLP")
        refuse_drop_path(layer.stochastic_dropout)
        return Mlp(norm, fc1, activation, fc2)


ADAPTERS = (MBConv(), PartitionAttentionLayer(), RelativePositionalMultiHeadAttention())

HALVES = (PartitionHalf(PartitionAttentionLayer()),)


class Stem(StemReader):
    """MaxVit's: two of torchvision's convolutions with what follows them."""

    class_name = "Sequential"
    children = ("0", "1")

    def read(self, stem: Any) -> StemPart:
        first, second = stem
        for part, names in ((first, {"0", "1", "2"}), (second, {"0"})):
            if class_name(part) != "Conv2dNormActivation" or child_names(part) != names:
                raise NotCovered("a stem of unknown structure")
        conv, norm, activation = first
        return StemPart(conv, norm, second[0], activation)


STEMS = (Stem(),)

CONTAINERS = (
    Container("MaxVit", ("stem", "blocks", "classifier")),
    Container("MaxVitBlock", ("layers",)),
    Container("MaxVitLayer", ("layers",)),
)
