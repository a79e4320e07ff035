"""Cutting a map into windows and back, with the padding that windows may need.

By views of a padded map where its sizes are numbers. Compilers and exporters may hold them open;
views would then ask how sizes divide, which has another answer at another size, so each token is
found by its index instead. Windows share an axis with the batch: compilers ask of every axis
whether it is 1, and take a batch for more than that, but not the windows of one map.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from moat_kernels.ops.common.spatial import ceil_divide
from moat_kernels.ops.common.symbols import is_certain


def window_counts(height: int, width: int, window: tuple[int, int]) -> tuple[int, int]:
    """How many windows cover a map, per axis."""
    return ceil_divide(height, window[0]), ceil_divide(width, window[1])


def _is_whole(height: int, width: int, window: tuple[int, int]) -> bool:
    """Whether one window is the map: symbols divided by themselves would stay fractions."""
    return is_certain(height == window[0]) and is_certain(width == window[1])


def _is_open(height: int, width: int, window: tuple[int, int]) -> bool:
    """Whether sizes are symbols that leave it open if the windows divide the map."""
    return not all(
        [
            is_certain(size % side == 0) or is_certain(size % side > 0)
            for size, side in ((height, window[0]), (width, window[1]))
        ]
    )


def _divide(index: Tensor, divisor: int) -> tuple[Tensor, Tensor]:
    """Quotient and remainder; ONNX has no remainder by a divisor that is a symbol."""
    quotient = index // divisor
    return quotient, index - quotient * divisor


def _places(
    shape: tuple[int, int, int], window: tuple[int, int], kind: str, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Where each token is in the maps one after the other, and whether it is no padding.

    shape: (B, H, W). Both are [B*windows, tokens]; padding is where the nearest pixel is.
    """
    batch, height, width = shape
    rows, columns = window_counts(height, width, window)
    index = torch.arange(batch * rows * columns, device=device)[:, None]
    sample, index = _divide(index, rows * columns)
    window_row, window_column = _divide(index, columns)
    token_row, token_column = _divide(torch.arange(window[0] * window[1], device=device), window[1])
    if kind == "window":
        row, column = window_row * window[0] + token_row, window_column * window[1] + token_column
    else:
        row, column = token_row * rows + window_row, token_column * columns + window_column
    place = row.clamp(max=height - 1) * width + column.clamp(max=width - 1)
    return sample * (height * width) + place, (row < height) & (column < width)


def _tokens(
    shape: tuple[int, int, int], window: tuple[int, int], kind: str, device: torch.device
) -> Tensor:
    """Which token of all windows, one after the other, each pixel is: [B, H, W], as `shape`."""
    batch, height, width = shape
    rows, columns = window_counts(height, width, window)
    sample = torch.arange(batch, device=device)[:, None, None]
    row, column = torch.arange(height, device=device)[:, None], torch.arange(width, device=device)
    if kind == "window":
        (window_row, token_row), (window_column, token_column) = (
            _divide(row, window[0]),
            _divide(column, window[1]),
        )
    else:
        (token_row, window_row), (token_column, window_column) = (
            _divide(row, rows),
            _divide(column, columns),
        )
    index = (sample * rows + window_row) * columns + window_column
    return index * (window[0] * window[1]) + token_row * window[1] + token_column


def partition(x: Tensor, window: tuple[int, int], kind: str) -> Tensor:
    """[B, H, W, C] -> [B*windows, tokens, C]; the map is padded with zeros below and right.

    Windows and the tokens in each are in row-major order. kind: "window" or "grid", as in
    WindowAttentionDescription.
    """
    batch, height, width, channels = x.shape
    if _is_whole(height, width, window):
        return x.flatten(1, 2)
    if _is_open(height, width, window):
        place, is_real = _places((batch, height, width), window, kind, x.device)
        return torch.where(is_real[..., None], x.flatten(0, 2)[place], 0)
    rows, columns = window_counts(height, width, window)
    bottom, right = rows * window[0] - height, columns * window[1] - width
    if bottom + right != 0:
        x = F.pad(x, (0, 0, 0, right, 0, bottom))
    if kind == "window":
        x = x.view(batch, rows, window[0], columns, window[1], channels).permute(0, 1, 3, 2, 4, 5)
    else:
        x = x.view(batch, window[0], rows, window[1], columns, channels).permute(0, 2, 4, 1, 3, 5)
    return x.reshape(batch * rows * columns, window[0] * window[1], channels)


def reverse(x: Tensor, shape: tuple[int, int, int], window: tuple[int, int], kind: str) -> Tensor:
    """[B*windows, tokens, C] -> [B, H, W, C]: the inverse of `partition`, padding dropped.

    shape: (B, H, W).
    """
    batch, height, width = shape
    if _is_whole(height, width, window):
        return x.unflatten(1, (height, width)).contiguous()
    if _is_open(height, width, window):
        return x.flatten(0, 1)[_tokens(shape, window, kind, x.device)]
    channels = x.shape[2]
    rows, columns = window_counts(height, width, window)
    if kind == "window":
        x = x.view(batch, rows, columns, *window, channels).permute(0, 1, 3, 2, 4, 5)
    else:
        x = x.view(batch, rows, columns, *window, channels).permute(0, 3, 1, 4, 2, 5)
    x = x.reshape(batch, rows * window[0], columns * window[1], channels)
    return x[:, :height, :width].contiguous()


def padding_mask(
    shape: tuple[int, int, int], window: tuple[int, int], kind: str, like: Tensor
) -> Tensor | None:
    """[B*windows, tokens]: -inf on padding, 0 elsewhere; None if the windows divide the map.

    shape: (B, H, W).
    """
    batch, height, width = shape
    if is_certain(height % window[0] == 0) and is_certain(width % window[1] == 0):
        return None
    if _is_open(height, width, window):
        _, is_real = _places(shape, window, kind, like.device)
        zeros = torch.zeros_like(is_real, dtype=like.dtype)
        return zeros.masked_fill(~is_real, float("-inf"))
    real = torch.ones(1, height, width, 1, dtype=like.dtype, device=like.device)
    cut = partition(real, window, kind)[..., 0]
    mask = torch.zeros_like(cut).masked_fill_(cut == 0, float("-inf"))
    return mask.repeat(batch, 1)
