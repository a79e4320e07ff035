"""FLOPs of window attention: its two products, and the two gradients of each.

The scores that every backward pass computes again count once.
"""

from __future__ import annotations

from typing import Any

from moat_kernels.ops.common.flops import Shape
from moat_kernels.ops.window_attention.algebra.partition import window_counts
from moat_kernels.ops.window_attention.description import WindowAttentionDescription

_BACKWARD = 2  # times forward


def attention_flops(map_size: Shape, heads: int, head_dim: int, window: tuple[int, int]) -> int:
    """Forward, of maps (B, H, W); padding counts."""
    batch, height, width = map_size
    rows, columns = window_counts(height, width, window)
    tokens = window[0] * window[1]
    return 2 * 2 * batch * rows * columns * heads * tokens * tokens * head_dim


def _described(qkv: Shape, text: str) -> int:
    description = WindowAttentionDescription.decode(text)
    window = description.window_for(qkv[1], qkv[2])
    return attention_flops(qkv[:3], description.heads, description.head_dim, window)


def described_forward(qkv: Shape, bias_table: Any, description: str, *_: Any, **__: Any) -> int:
    return _described(qkv, description)


def described_backward(
    grad: Shape,
    qkv: Shape,
    bias_table: Any,
    output: Any,
    saved: Any,
    description: str,
    *_: Any,
    **__: Any,
) -> int:
    return _BACKWARD * _described(qkv, description)


def native_forward(
    qkv: Shape,
    bias_table: Any,
    heads: int,
    head_dim: int,
    window_height: int,
    window_width: int,
    *_: Any,
    **__: Any,
) -> int:
    return attention_flops(qkv[:3], heads, head_dim, (window_height, window_width))


def native_backward(
    grad: Shape,
    qkv: Shape,
    bias_table: Any,
    output: Any,
    log_sum_exp: Any,
    *settings: Any,
    **_: Any,
) -> int:
    return _BACKWARD * native_forward(qkv, bias_table, *settings)
