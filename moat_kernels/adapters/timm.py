"""timm's CoAtNet and MaxViT family (timm/models/maxxvit.py)."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Hashable, Iterable, Mapping
from dataclasses import replace
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
    Gate,
    NotCovered,
    child_names,
    class_name,
    read_bottleneck,
    read_drop_path,
    read_gate,
    read_pool,
    read_swin_table,
    refuse_dropout,
    tensor_names,
)
from moat_kernels.adapters.transformer import TransformerAdapter, TransformerHalf
from moat_kernels.chains import Container
from moat_kernels.linear import apply_linear
from moat_kernels.ops.common.backends import warn_once
from moat_kernels.ops.mbconv.description import Pool
from moat_kernels.ops.window_attention import WindowAttentionDescription
from moat_kernels.tensor_access import child, tensor_of

_TABLE = "relative_position_bias_table"
# Of a transformer block's children, those behind its attention half.
_MLP_BRANCH = ("norm2", "mlp", "ls2", "drop_path2")
# Those, and the classes whose children are called where they are read.
_CALLED = (*_MLP_BRANCH, "RelPosMlp")


def _attention_settings(attention: Any) -> Hashable:
    # None in place of a bias is no child.
    sizes = (attention.num_heads, attention.dim_head, attention.scale)
    flags = (attention.fused_attn, attention.head_first, attention.__dict__.get("rel_pos"))
    return sizes, flags, own_tensors(attention)


def _bias_settings(bias: Any) -> Hashable:
    return tuple(bias.window_size), getattr(bias, "prefix_tokens", 0), own_tensors(bias)


# What reading looks at of timm's classes.
_CLASSES: Mapping[str, Settings] = {
    **dict.fromkeys(("Attention2d", "AttentionCl"), _attention_settings),
    **dict.fromkeys(("RelPosBias", "RelPosBiasTf", "RelPosMlp"), _bias_settings),
    "DropPath": attrgetter("drop_prob", "scale_by_keep", "training"),
    "SEModule": attrgetter("add_maxpool"),
    **dict.fromkeys(("Downsample2d", "LayerScale", "LayerScale2d"), lambda _: None),
}


def _read_se(module: nn.Module) -> Gate:
    if class_name(module) != "SEModule":
        raise NotCovered(f"channel attention {class_name(module)}")
    if module.add_maxpool or class_name(module.bn) != "Identity":  # type: ignore[arg-type]
        raise NotCovered("squeeze-and-excitation with a maximum or a norm")
    return read_gate(module.fc1, module.act, module.fc2, module.gate)  # type: ignore[arg-type]


class MbConvBlock(MBConvAdapter):
    implementation = "timm"
    class_name = "MbConvBlock"
    children = (
        *("shortcut", "pre_norm", "down", "conv1_1x1", "norm1", "conv2_kxk", "norm2"),
        *("conv3_1x1", "drop_path"),
    )
    optional = ("se", "se_early")
    outline = Outline(_CLASSES, optional=optional)
    covers = "stride in the depthwise convolution, SE early or late, every pool and padding"
    leaves = "stride_mode 'pool' and '1x1', group_size > 1, channel attention other than SE"

    def read(self, block: Any) -> Bottleneck:
        if class_name(block.down) != "Identity":
            raise NotCovered("stride_mode 'pool'")
        pool = shortcut = None
        if class_name(block.shortcut) == "Downsample2d":
            if child_names(block.shortcut) != {"pool", "expand"}:
                raise NotCovered("a shortcut of unknown structure")
            pool, shortcut = block.shortcut.pool, block.shortcut.expand
            shortcut = None if class_name(shortcut) == "Identity" else shortcut
        elif class_name(block.shortcut) != "Identity":
            raise NotCovered(f"{class_name(block.shortcut)} as shortcut")
        early, late = block.se_early, block.se
        if early is not None and late is not None:
            raise NotCovered("two channel attentions")
        gate = early if early is not None else late
        return read_bottleneck(
            pre_norm=block.pre_norm,
            expand=block.conv1_1x1,
            expand_norm=block.norm1,
            depthwise=block.conv2_kxk,
            depthwise_norm=block.norm2,
            gate=None if gate is None else _read_se(gate),
            gate_position="after_activation" if early is None else "before_norm",
            project=block.conv3_1x1,
            pool=pool,
            shortcut=shortcut,
            drop_path=read_drop_path(block.drop_path),
        )


def _read_downsampling(module: Any) -> tuple[Pool, nn.Module | None]:
    """The pool of a Downsample2d, and its convolution if it has one."""
    if class_name(module) != "Downsample2d" or child_names(module) != {"pool", "expand"}:
        raise NotCovered(f"{class_name(module)} of unknown structure as shortcut")
    expand = None if class_name(module.expand) == "Identity" else module.expand
    return read_pool(module.pool), expand


def _swin_table(bias: Any) -> Tensor:
    return read_swin_table(tensor_of(bias, _TABLE), bias.window_size)


def _mlp_table(bias: Any) -> Tensor:
    table = bias.bias_act(bias.mlp(bias.rel_coords_log).view(-1, bias.num_heads))
    table = table if bias.bias_gain is None else bias.bias_gain * table
    return read_swin_table(table, bias.window_size)


# By the class of the bias: the tensors that it holds, and its table in the op's order.
_BIASES: Mapping[str, tuple[set[str], Callable[[Any], Tensor]]] = {
    "RelPosBias": ({_TABLE, "relative_position_index"}, _swin_table),
    "RelPosBiasTf": (
        {_TABLE, "height_lookup", "width_lookup"},
        lambda bias: tensor_of(bias, _TABLE),
    ),
    "RelPosMlp": ({"rel_coords_log", "relative_position_index"}, _mlp_table),
}


def _read_table(bias: Any, known: bool = False) -> Tensor | None:
    """The bias table in the op's order; known: whether class and tensors were checked."""
    if bias is None:
        return None
    if known:
        return _BIASES[type(bias).__name__][1](bias)
    name = class_name(bias)
    if getattr(bias, "prefix_tokens", 0):
        raise NotCovered("relative position bias with prefix tokens")
    own, read = _BIASES.get(name, (None, None))
    if read is None or tensor_names(bias) != own:
        raise NotCovered(f"relative position bias {name}")
    return read(bias)


def _describe_attention(
    attention: Any, window: tuple[int, int] | None = None, partition: Any = "window"
) -> WindowAttentionDescription:
    refuse_dropout(attention.attn_drop, "the attention weights")
    return WindowAttentionDescription(
        attention.num_heads,
        attention.dim_head,
        window,
        None if attention.fused_attn else attention.scale,
        "heads_qkv" if attention.head_first else "qkv_heads",
        partition,
    )


def _check_bias(attention: Any, size: tuple[int, int], shared: Tensor | None) -> None:
    """The cases in which timm adds another bias, or the same one to another arrangement."""
    if shared is not None:
        raise NotCovered("shared_rel_pos")
    if attention.rel_pos is not None and tuple(attention.rel_pos.window_size) != tuple(size):
        raise NotCovered(f"a map of {tuple(size)}: another one than the bias table is for")


class _Attention(AttentionAdapter):
    implementation = "timm"
    children = ("qkv", "attn_drop", "proj", "proj_drop")
    optional = ("rel_pos",)
    leaves = "shared_rel_pos; in training: attention dropout"

    def consumed(self, module: Any) -> Iterable[nn.Module]:
        return [child for child in (module.attn_drop, module.rel_pos) if child is not None]

    def read(self, module: Any) -> AttentionReading:
        return AttentionReading(_describe_attention(module), _read_table(module.rel_pos))

    def example_size(self, module: Any) -> tuple[int, int]:
        return (3, 4) if module.rel_pos is None else tuple(module.rel_pos.window_size)


class Attention2d(_Attention):
    class_name = "Attention2d"
    covers = "maps [B, C, H, W]; RelPosBias, RelPosBiasTf, RelPosMlp or no bias"

    def compute(
        self,
        module: Any,
        attention: AttentionReading,
        *inputs: Any,
        shared_rel_pos: Tensor | None = None,
    ) -> Tensor:
        x, *rest = inputs
        _check_bias(module, x.shape[2:], rest[0] if rest else shared_rel_pos)
        rows = attention.attend(module.qkv(x).permute(0, 2, 3, 1))
        return module.proj_drop(module.proj(rows.permute(0, 3, 1, 2)))

    def example(self, module: Any) -> tuple[Tensor, ...]:
        height, width = self.example_size(module)
        return (torch.randn(2, module.qkv.in_channels, height, width, dtype=torch.float64),)


class AttentionCl(_Attention):
    class_name = "AttentionCl"
    covers = "windows [B, H, W, C]; RelPosBias, RelPosBiasTf, RelPosMlp or no bias"

    def compute(
        self,
        module: Any,
        attention: AttentionReading,
        *inputs: Any,
        shared_rel_pos: Tensor | None = None,
    ) -> Tensor:
        x, *rest = inputs
        if x.dim() != 4:
            raise NotCovered(f"an input of {x.dim()} dimensions")
        _check_bias(module, x.shape[1:3], rest[0] if rest else shared_rel_pos)
        rows = attention.attend(apply_linear(module.qkv, x))
        return module.proj_drop(apply_linear(module.proj, rows))

    def example(self, module: Any) -> tuple[Tensor, ...]:
        height, width = self.example_size(module)
        return (torch.randn(2, height, width, module.qkv.in_features, dtype=torch.float64),)


# Classes by whether they compute along the last axis, which rows have channels on.
_OF_LAYOUT = {
    True: ("LayerNorm", "LayerScale", "Linear"),
    False: ("LayerNorm2d", "LayerScale2d", "Conv2d", "Conv2dSame"),
}


class _Transformer(TransformerAdapter):
    """What the blocks share: their children, and how they add the branches.

    rows: whether a block reads [B, H, W, C]; else it reads [B, C, H, W].
    """

    implementation = "timm"
    children: tuple[str, ...] = ("norm1", "attn", "ls1", "drop_path1", *_MLP_BRANCH)
    attention: _Attention
    rows: bool

    def consumed(self, module: Any) -> Iterable[nn.Module]:
        return [module.attn, *self.attention.consumed(module.attn)]

    def half_consumed(self, module: Any) -> Iterable[nn.Module]:
        inner = module.attn
        return (
            *(module.norm1, inner.qkv, inner.proj, inner.proj_drop),
            *(module.ls1, module.drop_path1),
        )

    def _check_attention(self, module: Any) -> None:
        if class_name(module.attn) != self.attention.class_name:
            raise NotCovered(f"attention {class_name(module.attn)}")
        self.attention.check_structure(module.attn)

    def read_table(self, module: Any, known: bool = False) -> Tensor | None:
        bias = child(child(module, "attn"), "rel_pos")
        return _read_table(bias, known)

    def _half(
        self,
        block: Any,
        attention: AttentionReading,
        norm: nn.Module,
        map_size: tuple[int, int] | None = None,
    ) -> AttentionHalf:
        inner, layer_scale = block.attn, block.ls1
        refuse_dropout(inner.proj_drop, "the projection")
        for module in (norm, inner.qkv, inner.proj, layer_scale):
            if class_name(module) in _OF_LAYOUT[not self.rows]:
                raise NotCovered(f"{class_name(module)}, which is for another layout")
        return AttentionHalf(
            norm,
            inner.qkv,
            inner.proj,
            attention,
            layer_scale,
            read_drop_path(block.drop_path1),
            map_size,
            rows=self.rows,
            branch=_MLP_BRANCH,
            branch_rows=self.rows,
        )

    @staticmethod
    def _add_branches(module: Any, x: Tensor, attended: Tensor) -> Tensor:
        """x: what the first one is added to."""
        x = x + module.drop_path1(module.ls1(attended))
        return x + module.drop_path2(module.ls2(module.mlp(module.norm2(x))))


class TransformerBlock2d(_Transformer):
    """CoAtNet's."""

    class_name = "TransformerBlock2d"
    children: tuple[str, ...] = ("shortcut", *_Transformer.children)
    outline = Outline(_CLASSES, called=_CALLED)
    attention = Attention2d()
    rows = False
    covers = "with and without a pool, for the biases of its attention"
    leaves = "as its attention"

    def describe(self, module: Any) -> WindowAttentionDescription:
        self._check_attention(module)
        return _describe_attention(module.attn)

    def half_consumed(self, module: Any) -> Iterable[nn.Module]:
        return (*super().half_consumed(module), module.shortcut)

    def compute(
        self,
        module: Any,
        attention: AttentionReading,
        *inputs: Any,
        shared_rel_pos: Tensor | None = None,
    ) -> Tensor:
        x, *rest = inputs
        shared = rest[0] if rest else shared_rel_pos
        if class_name(module.norm1) != "Sequential":  # with a pool, whose map is known later
            _check_bias(module.attn, x.shape[2:], shared)
        normalized = module.norm1(x)
        try:
            attended = self.attention.compute(module.attn, attention, normalized, shared)
        except NotCovered as obstacle:
            warn_once(f"{class_name(module.attn)}: {obstacle}; running unfused")
            attended = module.attn(normalized, shared_rel_pos=shared)
        return self._add_branches(module, module.shortcut(x), attended)

    def read_half(self, module: Any, attention: AttentionReading) -> AttentionHalf:
        bias, norm = module.attn.rel_pos, module.norm1
        map_size = None if bias is None else tuple(bias.window_size)
        if class_name(module.shortcut) == "Identity":
            return self._half(module, attention, norm, map_size)
        pool, expand = _read_downsampling(module.shortcut)
        if class_name(norm) != "Sequential" or child_names(norm) != {"norm", "down"}:
            raise NotCovered("a pool of its shortcut alone")
        if _read_downsampling(norm.down) != (pool, None):
            raise NotCovered("another pool than its shortcut's before its attention")
        half = self._half(module, attention, norm.norm, map_size)
        return replace(half, pool=pool, expand=expand)

    def example(self, module: Any) -> tuple[Tensor, ...]:
        height, width = self.attention.example_size(module.attn)
        stride = 1 if class_name(module.shortcut) == "Identity" else 2
        size = (stride * height, stride * width)
        channels = module.attn.qkv.in_channels
        return (torch.randn(2, channels, *size, dtype=torch.float64),)


class _PartitionAttention(_Transformer):
    """MaxViT's, without cutting the map into windows and back."""

    outline = Outline(
        _CLASSES,
        settings=("partition_block", "partition_size"),
        called=_CALLED,
        methods=("_partition_attn",),
    )
    covers = "window and grid partition, without copies"
    leaves = "as its attention; projection dropout (then only its attention is fused)"

    def describe(self, module: Any) -> WindowAttentionDescription:
        self._check_attention(module)
        if "_partition_attn" in module.__dict__:
            raise NotCovered("its _partition_attn was replaced")
        if getattr(module.attn.proj_drop, "p", 0.0) > 0:
            raise NotCovered("projection dropout, drawn window by window")
        window = tuple(module.partition_size)
        _check_bias(module.attn, window, None)
        partition = "window" if module.partition_block else "grid"
        return _describe_attention(module.attn, window, partition)

    def compute(
        self, module: Any, attention: AttentionReading, *inputs: Any, **options: Any
    ) -> Tensor:
        (x,) = inputs
        self._check_map(attention, *(x.shape[1:3] if self.rows else x.shape[2:]))
        attended = self._attend(module.attn, attention, module.norm1(x))
        return self._add_branches(module, x, attended)

    def _check_map(self, attention: AttentionReading, height: int, width: int) -> None:
        window = attention.description.window_size
        assert window is not None
        if height % window[0] or width % window[1]:
            raise NotCovered(f"a map of {height} x {width}, which windows {window} do not divide")

    @abstractmethod
    def _attend(self, inner: Any, attention: AttentionReading, x: Tensor) -> Tensor:
        """inner, the attention module, of the normalised map."""

    def read_half(self, module: Any, attention: AttentionReading) -> AttentionHalf:
        return self._half(module, attention, module.norm1)


class PartitionAttentionCl(_PartitionAttention):
    class_name = "PartitionAttentionCl"
    attention = AttentionCl()
    rows = True

    def _attend(self, inner: Any, attention: AttentionReading, x: Tensor) -> Tensor:
        rows = attention.attend(apply_linear(inner.qkv, x))
        return inner.proj_drop(apply_linear(inner.proj, rows))

    def example(self, module: Any) -> tuple[Tensor, ...]:
        height, width = module.partition_size
        channels = module.attn.qkv.in_features
        return (torch.randn(1, 2 * height, 3 * width, channels, dtype=torch.float64),)


class PartitionAttention2d(_PartitionAttention):
    class_name = "PartitionAttention2d"
    attention = Attention2d()
    rows = False

    def _attend(self, inner: Any, attention: AttentionReading, x: Tensor) -> Tensor:
        rows = attention.attend(inner.qkv(x).permute(0, 2, 3, 1))
        return inner.proj_drop(inner.proj(rows.permute(0, 3, 1, 2)))

    def example(self, module: Any) -> tuple[Tensor, ...]:
        height, width = module.partition_size
        channels = module.attn.qkv.in_channels
        return (torch.randn(1, channels, 2 * height, 3 * width, dtype=torch.float64),)


# Of their MLPs: the children, of which the dropouts are named so.
_MLPS = {
    "Mlp": ("fc1", "act", "drop1", "norm", "fc2", "drop2"),
    "ConvMlp": ("fc1", "norm", "act", "drop", "fc2"),
}


class _Half(TransformerHalf):
    def read_mlp(self, block: Any) -> Mlp:
        mlp = block.mlp
        if child_names(mlp) != set(_MLPS.get(class_name(mlp), ())):
            raise NotCovered(f"MLP {class_name(mlp)} of unknown structure")
        if class_name(mlp.norm) != "Identity":
            raise NotCovered("an MLP with a norm inside")
        for name in child_names(mlp):
            if name.startswith("drop"):
                refuse_dropout(getattr(mlp, name), "the MLP")
        refuse_drop_path(block.drop_path2)
        return Mlp(block.norm2, mlp.fc1, mlp.act, mlp.fc2, block.ls2)


# Blocks of the same models that no op computes.
UNFUSED = {"ConvNeXtBlock": "its norm is a layer norm, after the depthwise convolution"}

_BLOCKS = (TransformerBlock2d(), PartitionAttentionCl(), PartitionAttention2d())

ADAPTERS = (MbConvBlock(), *_BLOCKS, Attention2d(), AttentionCl())

HALVES = tuple(map(_Half, _BLOCKS))


class Stem(StemReader):
    class_name = "Stem"
    children = ("conv1", "norm1", "conv2")

    def read(self, stem: Any) -> StemPart:
        return StemPart(stem.conv1, stem.norm1, stem.conv2)


STEMS = (Stem(),)

CONTAINERS = (
    Container("MaxxVit", ("stem", "stages", "norm"), method="forward_features"),
    Container("MaxxVitStage", ("blocks",)),
    # With other layouts between.
    Container("MaxxVitBlock", ("conv", "attn_block", "attn_grid"), maps=False),
)
