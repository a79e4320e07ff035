"""The attention half of a MOAT block without gradients, by a native CPU kernel.

y + proj(attention(qkv(layer_norm(y)))): one operator instead of a norm, two linear layers, window
attention and a sum, none of whose wide results crosses memory. Everything else is those layers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from moat_kernels.extension import load_extension
from moat_kernels.ops.common.autocast import autocast_dtype
from moat_kernels.ops.common.flops import Shape, linear_flops, register_flops
from moat_kernels.ops.common.registration import register_fake
from moat_kernels.ops.window_attention.description import WindowAttentionDescription
from moat_kernels.ops.window_attention.flops import attention_flops

# Where the CPU multiplies bfloat16 itself, oneDNN's linear layers are faster than the float32
# arithmetic here.
DTYPES = (
    (torch.float32, torch.float16)
    if torch.cpu._is_avx512_bf16_supported()
    else (torch.float32, torch.float16, torch.bfloat16)
)


def unsupported(
    y: Tensor, tensors: Sequence[Tensor | None], description: WindowAttentionDescription
) -> str:
    """Why this backend does not cover a call; empty: it does. tensors: as `attention_half`'s."""
    given = [tensor for tensor in tensors if tensor is not None]
    if y.device.type != "cpu":
        return f"tensors on {y.device}"
    if y.dtype not in DTYPES:
        return f"dtype {y.dtype}"
    if any(t.dtype != y.dtype or t.device != y.device for t in given):
        return "tensors of several dtypes or devices"
    if autocast_dtype(y) is not None:
        return "autocast"
    if torch.is_grad_enabled() and any(t.requires_grad for t in (y, *given)):
        return "gradients"
    if y.dim() != 4 or not fits(y.shape[1], tensors, description):
        return "such an attention"
    return ""


def fits(
    channels: int, tensors: Sequence[Tensor | None], description: WindowAttentionDescription
) -> bool:
    """Whether the native kernel computes such an attention, for maps of that many channels."""
    *layers, table = tensors
    inner = description.heads * description.head_dim
    norm, qkv, proj = (channels,), (3 * inner, channels), (channels, inner)
    shapes = (norm, norm, qkv, qkv[:1], proj, proj[:1])
    return (
        layers[2] is not None
        and layers[4] is not None
        and all(t is None or t.shape == shape for t, shape in zip(layers, shapes, strict=True))
        and (table is None or (table.dim() == 3 and table.shape[0] == description.heads))
        and description.qkv_layout == "qkv_heads"
        and description.partition == "window"
    )


def evaluate(
    y: Tensor,
    tensors: Sequence[Tensor | None],
    eps: float,
    description: WindowAttentionDescription,
) -> Tensor:
    """See api.attention_half."""
    return torch.ops.moat_kernels.cpu_attention_half_eval.default(
        y,
        *tensors,
        *settings(description, y.shape[2], y.shape[3]),
        eps,
    )


class Settings(NamedTuple):
    """The native op's settings but for eps, in its order."""

    heads: int
    head_dim: int
    window_height: int
    window_width: int
    scale: float


def settings(description: WindowAttentionDescription, height: int, width: int) -> Settings:
    """The description as the native op takes it, for a map of `height` x `width`."""
    return Settings(
        description.heads,
        description.head_dim,
        *description.window_for(height, width),
        description.scale_or_default(),
    )


def _fake(y: Tensor, *_: object) -> Tensor:
    return torch.empty_like(y, memory_format=torch.channels_last)


def _flops(y: Shape, *arguments: Any, **_: object) -> int:
    tensors, given = arguments[:7], Settings(*arguments[7:12])
    qkv, proj = tensors[2], tensors[4]
    map_size, window = (y[0], y[2], y[3]), (given.window_height, given.window_width)
    return (
        linear_flops((*map_size, qkv[1]), qkv)
        + attention_flops(map_size, given.heads, given.head_dim, window)
        + linear_flops((*map_size, proj[1]), proj)
    )


if load_extension().usable:
    register_fake("cpu_attention_half_eval", _fake)
    register_flops("cpu_attention_half_eval", _flops)
