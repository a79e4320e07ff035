"""What window attention computes, as one validated description."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Literal

from moat_kernels.ops.common.checks import check_positive_integer
from moat_kernels.ops.common.encoding import decode_fields, encode

PARTITIONS = ("window", "grid")
QKV_LAYOUTS = ("qkv_heads", "heads_qkv")


@dataclass(frozen=True)
class WindowAttentionDescription:
    """softmax(scale * Q K^T + bias) V inside windows of a map (MOAT paper, section 3.2).

    heads, head_dim: the packed map has 3 * heads * head_dim channels.
    window_size: (height, width) in tokens; None is the whole map. A window that does not divide
        the map is padded at the bottom and right; padding neither gives nor receives attention.
    scale: factor of Q K^T; None is head_dim ** -0.5.
    qkv_layout: order of the packed channels, "qkv_heads" (3, heads, head_dim) or "heads_qkv"
        (heads, 3, head_dim).
    partition: "window" takes neighbouring tokens, "grid" tokens spread evenly over the map
        (MaxViT's grid attention, `window_size` tokens of it).
    """

    heads: int
    head_dim: int = 32
    window_size: tuple[int, int] | None = None
    scale: float | None = None
    qkv_layout: Literal["qkv_heads", "heads_qkv"] = "qkv_heads"
    partition: Literal["window", "grid"] = "window"

    def __post_init__(self) -> None:
        check_positive_integer("heads", self.heads)
        check_positive_integer("head_dim", self.head_dim)
        if self.window_size is not None:
            if not isinstance(self.window_size, tuple) or len(self.window_size) != 2:
                raise ValueError(
                    f"window_size must be None or (height, width), got {self.window_size!r}"
                )
            for side in self.window_size:
                check_positive_integer("window_size", side)
        if self.qkv_layout not in QKV_LAYOUTS:
            raise ValueError(f"qkv_layout must be one of {QKV_LAYOUTS}, got {self.qkv_layout!r}")
        if self.partition not in PARTITIONS:
            raise ValueError(f"partition must be one of {PARTITIONS}, got {self.partition!r}")

    def scale_or_default(self) -> float:
        """The factor of Q K^T."""
        return self.head_dim**-0.5 if self.scale is None else self.scale

    def window_for(self, height: int, width: int) -> tuple[int, int]:
        """The window's (height, width) on a map of `height` x `width`."""
        return (height, width) if self.window_size is None else self.window_size

    def encode(self) -> str:
        """The description as text, for operator schemas; `decode` is its inverse."""
        return encode(self)

    @staticmethod
    def decode(text: str) -> WindowAttentionDescription:
        return _decode(text)


@cache
def _decode(text: str) -> WindowAttentionDescription:
    return WindowAttentionDescription(**decode_fields(text))
