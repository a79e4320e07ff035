"""Average pool of the shortcut: 2x2 pixels to one, by programs beside those of another launch.

Its backward pass is in kernels/expand_backward.py, where each pixel of x finds the one it went to.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK_POOLED, BLOCK_POOLED_C = 32, 64


@triton.jit
def pool_tile(
    program,
    rows_ptr,  # [B * H * W, C]
    pooled_ptr,  # [B * H/2 * W/2, C]
    count,
    pooled_width,
    channels,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """pooled = mean of 2x2 pixels, in float32, rounded once. Reads rows and writes pooled once.

    program: which tile of `Pooling.programs` this is.
    """
    channel_blocks = tl.cdiv(channels, BLOCK_C)
    row = program // channel_blocks * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    channel = (program % channel_blocks) * BLOCK_C + tl.arange(0, BLOCK_C)
    mask = (row < count)[:, None] & (channel < channels)[None, :]
    # H and W are even, so that lines of the output follow each other as pairs of lines do. Rows are
    # counted in 32 bits, elements in 64, in which dividing would take most of the time.
    first = row // pooled_width * (4 * pooled_width) + row % pooled_width * 2
    source = rows_ptr + first.to(tl.int64)[:, None] * channels + channel[None, :]
    below = source + 2 * pooled_width * channels
    total = tl.load(source, mask=mask, other=0.0).to(tl.float32)
    total += tl.load(source + channels, mask=mask, other=0.0).to(tl.float32)
    total += tl.load(below, mask=mask, other=0.0).to(tl.float32)
    total += tl.load(below + channels, mask=mask, other=0.0).to(tl.float32)
    tl.store(
        pooled_ptr + row.to(tl.int64)[:, None] * channels + channel[None, :],
        (0.25 * total).to(pooled_ptr.dtype.element_ty),
        mask=mask,
    )


class Pooling(NamedTuple):
    """Of rows [B*H*W, C] of maps of even sizes, and where it goes; nothing of None.

    Its programs are `pool_tile`'s.
    """

    rows: Tensor | None
    pooled: Tensor | None  # [B * H/2 * W/2, C]
    count: int  # rows of pooled
    width: int  # of its maps
    programs: int

    @staticmethod
    def of(rows: Tensor | None, width: int, dtype: torch.dtype) -> Pooling:
        """width: W; dtype: of what comes out."""
        if rows is None:
            return Pooling(None, None, 1, 1, 0)
        count, channels = rows.shape[0] // 4, rows.shape[1]
        programs = -(-count // BLOCK_POOLED) * -(-channels // BLOCK_POOLED_C)
        pooled = rows.new_empty((count, channels), dtype=dtype)
        return Pooling(rows, pooled, count, width // 2, programs)
