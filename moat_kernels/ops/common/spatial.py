"""Padding of stencils and pools: TensorFlow's SAME rule and explicit four-sided padding.

Sizes may be symbols to compilers and exporters: see symbols.py.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from moat_kernels.ops.common.symbols import is_certain

# (top, bottom, left, right) in pixels, or TensorFlow's rule, which depends on the map's size.
Padding = Literal["tf_same"] | tuple[int, int, int, int]


def ceil_divide(size: int, divisor: int) -> int:
    """size / divisor, rounded up; size is at least 0.

    Of no negative number: ONNX, which divides towards zero, would round it the other way.
    """
    return (size - 1) // divisor + 1


def same_padding(size: int, kernel_size: int, stride: int) -> tuple[int, int]:
    """TensorFlow's SAME padding of one axis: (before, after); the odd pixel goes after.

    Decided per axis: at stride 2 and kernel 3 an even size gives (0, 1), an odd size (1, 1).
    """
    total = (ceil_divide(size, stride) - 1) * stride + kernel_size - size
    if kernel_size < stride:  # else it is none less, and symbols stay simple
        total = max(total, 0)
    return total // 2, total - total // 2


def resolve_padding(
    padding: Padding, height: int, width: int, kernel_size: tuple[int, int], stride: int
) -> tuple[int, int, int, int]:
    """The (top, bottom, left, right) padding of a map of `height` x `width`."""
    if padding == "tf_same":
        return (
            *same_padding(height, kernel_size[0], stride),
            *same_padding(width, kernel_size[1], stride),
        )
    return padding


def may_pad(padding: tuple[int, int, int, int]) -> bool:
    """Whether there is padding, or may be where it is a symbol."""
    return not all([is_certain(side == 0) for side in padding])


def pad_map(x: Tensor, padding: tuple[int, int, int, int], value: float | None = None) -> Tensor:
    """Pad [B, C, H, W] by (top, bottom, left, right), with 0 where no value is given.

    The memory format is kept.
    """
    top, bottom, left, right = padding
    if not may_pad(padding):
        return x
    return F.pad(x, (left, right, top, bottom), value=value)


def crop_map(x: Tensor, padding: tuple[int, int, int, int]) -> Tensor:
    """Undo `pad_map`: the view of [B, C, H, W] without its border."""
    top, bottom, left, right = padding
    return x[:, :, top : x.shape[2] - bottom, left : x.shape[3] - right]


def split_padding(
    padding: tuple[int, int, int, int],
) -> tuple[tuple[int, int, int, int], tuple[int, int]]:
    """Split into what must be padded beforehand and what a convolution can do by itself.

    Convolutions take the same padding on both sides of an axis; an uneven axis is padded first.
    """
    top, bottom, left, right = padding
    vertical, horizontal = is_certain(top == bottom), is_certain(left == right)
    border = (0, 0) if vertical else (top, bottom), (0, 0) if horizontal else (left, right)
    return (*border[0], *border[1]), (top if vertical else 0, left if horizontal else 0)


def output_size(size: int, before: int, after: int, kernel_size: int, stride: int) -> int:
    """Length of one axis after a stencil of `kernel_size` at `stride`."""
    return (size + before + after - kernel_size) // stride + 1


def valid_counts(
    height: int,
    width: int,
    kernel_size: int,
    stride: int,
    padding: tuple[int, int, int, int],
    like: Tensor,
) -> Tensor:
    """How many real (not padding) pixels each pooling window holds: [1, 1, H_out, W_out].

    Counted, not pooled: runtimes that read exported programs need not have a pool for one channel
    (OpenVINO has none in bfloat16).
    """
    top, bottom, left, right = padding
    rows = _valid_in_line(height, kernel_size, stride, (top, bottom), like.device)
    columns = _valid_in_line(width, kernel_size, stride, (left, right), like.device)
    return (rows[:, None] * columns).to(like.dtype)[None, None]


def _valid_in_line(
    size: int, kernel_size: int, stride: int, padding: tuple[int, int], device: torch.device
) -> Tensor:
    """The same along one side: [output size]."""
    starts = torch.arange(output_size(size, *padding, kernel_size, stride), device=device)
    starts = starts * stride - padding[0]
    return (starts + kernel_size).clamp(max=size) - starts.clamp(min=0)


def in_format_of(output: Tensor, x: Tensor) -> Tensor:
    """`output` in channels_last if x is, else contiguous."""
    channels_last = x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    return output.contiguous(memory_format=memory_format)
