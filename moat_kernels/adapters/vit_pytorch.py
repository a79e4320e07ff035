"""lucidrains' MaxViT (vit_pytorch/max_vit.py)."""

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
from moat_kernels.adapters.freezing import AttentionHalf, HalfReader, Mlp, MlpReader
from moat_kernels.adapters.reading import (
    Bottleneck,
    Gate,
    NotCovered,
    child_names,
    class_name,
    read_bottleneck,
    read_gate,
    read_swin_table,
    refuse_dropout,
)
from moat_kernels.linear import apply_linear
from moat_kernels.ops.window_attention import WindowAttentionDescription

_CONVOLUTIONS = ("Conv2d", "BatchNorm2d", "GELU") * 2
_PATTERN = (*_CONVOLUTIONS, "SqueezeExcitation", "Conv2d", "BatchNorm2d")


def _follows_pattern(module: nn.Module) -> bool:
    if not isinstance(module, nn.Sequential):
        return False
    names = tuple(
        "BatchNorm2d" if class_name(m) == "SyncBatchNorm" else class_name(m) for m in module
    )
    return names == _PATTERN


def _read_se(module: Any) -> Gate:
    if child_names(module) != {"gate"} or len(module.gate) != 6:
        raise NotCovered("squeeze-and-excitation of unknown structure")
    _, reduce, activation, expand, gate, _ = module.gate
    return read_gate(reduce, activation, expand, gate)


def _read_sequential(block: Any, residual: bool) -> Bottleneck:
    return read_bottleneck(
        expand=block[0],
        expand_norm=block[1],
        expand_activation=block[2],
        depthwise=block[3],
        depthwise_norm=block[4],
        depthwise_activation=block[5],
        gate=_read_se(block[6]),
        project=block[7],
        project_norm=block[8],
        residual=residual,
    )


class MBConvSequential(MBConvAdapter):
    """What the function MBConv returns where the block has no residual."""

    implementation = "vit-pytorch"
    class_name = "Sequential"
    children = tuple(str(index) for index in range(len(_PATTERN)))
    covers = "blocks without a residual, found by the pattern of their nine modules"

    def recognises(self, module: nn.Module) -> bool:
        return super().recognises(module) and _follows_pattern(module)

    def read(self, block: Any) -> Bottleneck:
        return _read_sequential(block, residual=False)


class MBConvResidual(MBConvAdapter):
    implementation = "vit-pytorch"
    class_name = "MBConvResidual"
    children = ("fn", "dropsample")
    covers = "blocks with a residual"
    leaves = "Dropsample, which then follows the fused rest"

    def recognises(self, module: nn.Module) -> bool:
        return super().recognises(module) and _follows_pattern(module.fn)  # type: ignore[arg-type]

    def read(self, block: Any) -> Bottleneck:
        if class_name(block.dropsample) != "Dropsample" or block.dropsample.prob != 0:
            raise NotCovered("Dropsample")
        return _read_sequential(block.fn, residual=True)


class Attention(AttentionAdapter):
    implementation = "vit-pytorch"
    class_name = "Attention"
    children = ("norm", "to_qkv", "attend", "to_out", "rel_pos_bias")
    tensors = ("rel_pos_indices",)
    covers = "windows and grids of MaxViT"
    leaves = "in training: attention dropout"

    def consumed(self, module: Any) -> Iterable[nn.Module]:
        return [*module.attend.modules(), module.rel_pos_bias]

    def read(self, module: Any) -> AttentionReading:
        if tuple(map(class_name, module.attend)) != ("Softmax", "Dropout"):
            raise NotCovered("attention weights of unknown structure")
        refuse_dropout(module.attend[1], "the attention weights")
        embedding = module.rel_pos_bias
        if not isinstance(embedding, nn.Embedding) or class_name(embedding) != "Embedding":
            raise NotCovered(f"relative position bias {class_name(embedding)}")
        if embedding.padding_idx is not None or embedding.max_norm is not None:
            raise NotCovered("an embedding with padding_idx or max_norm")
        if embedding.scale_grad_by_freq or embedding.sparse:
            raise NotCovered("an embedding with scale_grad_by_freq or sparse")
        window = _window(module)
        heads = module.heads
        description = WindowAttentionDescription(
            heads, module.to_qkv.out_features // (3 * heads), None, module.scale
        )
        return AttentionReading(description, read_swin_table(embedding.weight, window))

    def compute(
        self, module: Any, attention: AttentionReading, *inputs: Any, **options: Any
    ) -> Tensor:
        (x,) = inputs  # [B, rows, columns, window, window, C]
        if tuple(x.shape[3:5]) != _window(module):
            raise NotCovered(f"windows of {tuple(x.shape[3:5])}")
        qkv = apply_linear(module.to_qkv, module.norm(x)).flatten(0, 2)
        return module.to_out(attention.attend(qkv)).unflatten(0, x.shape[:3])

    def example(self, module: Any) -> tuple[Tensor, ...]:
        channels = module.to_qkv.in_features
        return (torch.randn(1, 1, 2, *_window(module), channels, dtype=torch.float64),)


def _window(module: Any) -> tuple[int, int]:
    """The square window that the module's table is for."""
    size = (round(module.rel_pos_bias.num_embeddings**0.5) + 1) // 2
    return size, size


class ResidualHalf(HalfReader):
    """The sum around the attention, whose norm is inside; its windows are maps of their own."""

    class_name = "Residual"
    children = ("fn",)
    adapter_key = Attention().key
    attention = "fn"
    leading = (1, 1, 2)

    def read(self, block: Any) -> AttentionHalf:
        inner = block.fn
        if tuple(map(class_name, inner.to_out)) != ("Linear", "Dropout"):
            raise NotCovered("a projection of unknown structure")
        refuse_dropout(inner.to_out[1], "the projection")
        return AttentionHalf(
            inner.norm,
            inner.to_qkv,
            inner.to_out[0],
            Attention().read(inner),
            map_size=_window(inner),
            rows=True,
        )


class ResidualMlp(MlpReader):
    """The sum around the MLP that follows an attention."""

    class_name = "Residual"
    children = ("fn",)
    leading = (1, 1, 2)

    def read(self, block: Any) -> Mlp:
        if class_name(block.fn) != "FeedForward" or child_names(block.fn) != {"net"}:
            raise NotCovered(f"a sum around {class_name(block.fn)}")
        if len(block.fn.net) != 6:
            raise NotCovered("an MLP of unknown structure")
        norm, fc1, activation, first, fc2, second = block.fn.net
        for dropout in (first, second):
            refuse_dropout(dropout, "the MLP")
        return Mlp(norm, fc1, activation, fc2, rows=True)


ADAPTERS = (MBConvResidual(), MBConvSequential(), Attention())

HALVES = (ResidualHalf(),)

MLPS = (ResidualMlp(),)
