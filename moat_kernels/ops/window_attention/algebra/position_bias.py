"""Relative position bias: from its table to [heads, tokens, tokens], and the gradient back.

A table [heads, 2*wh-1, 2*ww-1] holds one value per offset: the bias of a query on a key is
table[head, key_row - query_row + wh-1, key_col - query_col + ww-1]. (Swin's order is query - key:
the same table flipped on both axes.)
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from moat_kernels.ops.common.symbols import is_certain


def table_size(window: tuple[int, int]) -> tuple[int, int]:
    """Height and width of the table that a window needs."""
    return 2 * window[0] - 1, 2 * window[1] - 1


def resize_table(table: Tensor, window: tuple[int, int]) -> Tensor:
    """The table [heads, 2*wh-1, 2*ww-1] for a window (wh, ww), as TensorFlow resizes it.

    table: [heads, height, width] of any window, floating point; itself if it fits already. Raises
    ValueError for another number of axes, TypeError unless it is floating point.

    Bilinear, half-pixel centres, no antialiasing. Computed in float32 at least. Differentiable.
    """
    if table.dim() != 3:
        raise ValueError(f"table must be [heads, 2*wh-1, 2*ww-1], got shape {tuple(table.shape)}")
    if not table.is_floating_point():
        raise TypeError(f"table must be floating point, got {table.dtype}")
    size = table_size(window)
    if is_certain(table.shape[1] == size[0]) and is_certain(table.shape[2] == size[1]):
        return table
    wide = table if table.dtype == torch.float64 else table.float()
    resized = F.interpolate(wide[None], size=size, mode="bilinear", align_corners=False)
    # Where sizes are symbols Inductor cannot lower a view that is kept for the backward pass.
    table_alone = resized.sum(0) if torch.compiler.is_dynamo_compiling() else resized[0]
    return table_alone.to(table.dtype)


def crop_table(table: Tensor, window: tuple[int, int]) -> Tensor:
    """The middle of the table: the offsets that occur in a smaller window."""
    top = (table.shape[1] - table_size(window)[0]) // 2
    left = (table.shape[2] - table_size(window)[1]) // 2
    return table[:, top : table.shape[1] - top, left : table.shape[2] - left]


def relative_position_index(window: tuple[int, int], device: torch.device) -> Tensor:
    """[tokens, tokens] flat indices into a table, by query then key."""
    rows = torch.arange(window[0], device=device)
    columns = torch.arange(window[1], device=device)
    row_offset = rows[None, :] - rows[:, None] + window[0] - 1  # [query, key]
    column_offset = columns[None, :] - columns[:, None] + window[1] - 1
    index = row_offset[:, None, :, None] * (2 * window[1] - 1) + column_offset[None, :, None, :]
    return index.reshape(window[0] * window[1], window[0] * window[1])


def gather_bias(table: Tensor, window: tuple[int, int]) -> Tensor:
    """[heads, tokens, tokens] from the table [heads, 2*wh-1, 2*ww-1]."""
    return table.flatten(1)[:, relative_position_index(window, table.device)]


def _sum_diagonals(x: Tensor) -> Tensor:
    """[..., n, n] (query, key) -> [..., 2n-1]: sums over key - query = 1-n .. n-1.

    With queries reversed, entry (row, key) belongs to column row + key: padding each row to 2n and
    dropping the last n values shifts row `row` right by `row` in rows of 2n-1.
    """
    n = x.shape[-1]
    padded = F.pad(x.flip(-2), (0, n)).flatten(-2)
    return padded[..., : n * (2 * n - 1)].unflatten(-1, (n, 2 * n - 1)).sum(-2)


def scatter_bias(grad: Tensor, window: tuple[int, int]) -> Tensor:
    """Gradient of the table from that of the bias [heads, tokens, tokens], in a fixed order."""
    heads = grad.shape[0]
    grad = grad.view(heads, window[0], window[1], window[0], window[1])
    by_column = _sum_diagonals(grad.transpose(2, 3))  # [heads, query row, key row, 2*ww-1]
    return _sum_diagonals(by_column.permute(0, 3, 1, 2)).transpose(1, 2)
