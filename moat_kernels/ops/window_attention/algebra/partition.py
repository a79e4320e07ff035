"""Cutting a map into windows and back, with the padding that windows may need."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from moat_kernels.ops.common.spatial import is_certain


def window_counts(height: int, width: int, window: tuple[int, int]) -> tuple[int, int]:
    """How many windows cover a map, per axis."""
    return -(-height // window[0]), -(-width // window[1])


def _is_whole(height: int, width: int, window: tuple[int, int]) -> bool:
    """Whether one window is the map: symbols divided by themselves would stay fractions."""
    return is_certain(height == window[0]) and is_certain(width == window[1])


def partition(x: Tensor, window: tuple[int, int], kind: str) -> Tensor:
    """[B, H, W, C] -> [B, windows, tokens, C]; the map is padded with zeros below and right.

    Windows and the tokens in each are in row-major order. kind: "window" or "grid", as in
    WindowAttentionDescription.
    """
    batch, height, width, channels = x.shape
    if _is_whole(height, width, window):
        return x.flatten(1, 2)[:, None]
    rows, columns = window_counts(height, width, window)
    bottom, right = rows * window[0] - height, columns * window[1] - width
    if not is_certain(bottom + right == 0):
        x = F.pad(x, (0, 0, 0, right, 0, bottom))
    if kind == "window":
        x = x.view(batch, rows, window[0], columns, window[1], channels).permute(0, 1, 3, 2, 4, 5)
    else:
        x = x.view(batch, window[0], rows, window[1], columns, channels).permute(0, 2, 4, 1, 3, 5)
    return x.reshape(batch, rows * columns, window[0] * window[1], channels)


def reverse(x: Tensor, height: int, width: int, window: tuple[int, int], kind: str) -> Tensor:
    """[B, windows, tokens, C] -> [B, H, W, C]: the inverse of `partition`, padding dropped."""
    if _is_whole(height, width, window):
        return x.squeeze(1).unflatten(1, (height, width)).contiguous()
    batch, _, _, channels = x.shape
    rows, columns = window_counts(height, width, window)
    if kind == "window":
        x = x.view(batch, rows, columns, *window, channels).permute(0, 1, 3, 2, 4, 5)
    else:
        x = x.view(batch, rows, columns, *window, channels).permute(0, 3, 1, 4, 2, 5)
    x = x.reshape(batch, rows * window[0], columns * window[1], channels)
    return x[:, :height, :width].contiguous()


def padding_mask(
    height: int, width: int, window: tuple[int, int], kind: str, like: Tensor
) -> Tensor | None:
    """[windows, tokens]: -inf on padding, 0 elsewhere; None if the windows divide the map."""
    if is_certain(height % window[0] == 0) and is_certain(width % window[1] == 0):
        return None
    real = torch.ones(1, height, width, 1, dtype=like.dtype, device=like.device)
    cut = partition(real, window, kind)[0, :, :, 0]
    return torch.zeros_like(cut).masked_fill_(cut == 0, float("-inf"))
