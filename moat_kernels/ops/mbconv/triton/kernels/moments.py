"""Means and squared deviations of tiles, and how they make up those of the whole.

Deviations are from each tile's own mean, so nothing cancels where |mean| >> std.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from moat_kernels.ops.triton_support.launching import launch


class Tiles(NamedTuple):
    """How maps are cut: `band` x `block_width` of each map of height x width, bands outermost.

    Rows of a matrix are one map of width 1.
    """

    height: int
    width: int
    band: int
    block_width: int

    def of_images(self, images: int) -> int:
        """How many tiles there are."""
        return images * -(-self.height // self.band) * -(-self.width // self.block_width)


class Moments(NamedTuple):
    """Of each tile's channels the mean and the sum of squared deviations: float32 [P, 2, C].

    total: how many values of each channel all tiles hold.
    """

    values: Tensor
    tiles: Tiles
    total: int

    def whole(self) -> tuple[Tensor, Tensor]:
        """Mean and biased variance [C], float64."""
        height, width, band, block_width = self.tiles
        index = torch.arange(len(self.values), device=self.values.device)
        columns, bands = -(-width // block_width), -(-height // band)
        sizes = (width - index % columns * block_width).clamp(max=block_width)
        sizes = sizes * (height - index // columns % bands * band).clamp(max=band)
        means, deviations = self.values.double().unbind(1)
        weights = sizes.double()[:, None] / self.total
        mean = (weights * means).sum(0)
        within = deviations.sum(0) / self.total
        return mean, within + (weights * (means - mean).square()).sum(0)


class Sums(NamedTuple):
    """Sums over parts, which lie along `axis` of the values and are yet to be added up."""

    values: Tensor
    axis: int

    def whole(self) -> Tensor:
        """Added up, float64."""
        return self.values.sum(self.axis, dtype=torch.float64)


@triton.jit
def store_moments(moments_ptr, index, channel, channels, mean, deviation):
    """moments[index] = (mean, sum of squared deviations from it) of a tile's channels."""
    target = moments_ptr + index.to(tl.int64) * 2 * channels + channel
    tl.store(target, mean, mask=channel < channels)
    tl.store(target + channels, deviation, mask=channel < channels)


@triton.jit
def store_tile_moments(moments_ptr, index, channel, channels, value, valid, size):
    """moments[index] of value [rows, channels of this tile], whose `size` valid [rows, 1] count."""
    mean = tl.sum(tl.where(valid, value, 0.0), 0) / size
    difference = tl.where(valid, value - mean[None, :], 0.0)
    store_moments(moments_ptr, index, channel, channels, mean, tl.sum(difference * difference, 0))


@triton.jit
def merge_moments(
    moments_ptr, channel, channels, tiles, count, height, width, band, block_width,
    BLOCK_TILES: tl.constexpr,
):  # fmt: skip
    """(mean, biased variance) of some channels over all tiles, summed in a fixed order.

    Taken around the first tile's mean, whose distance from that of all is at most
    sqrt(tiles) standard deviations: the first tile is part of them.
    """
    valid = channel < channels
    pilot = tl.load(moments_ptr + channel, mask=valid, other=0.0)
    column_blocks = tl.cdiv(width, block_width)
    bands = tl.cdiv(height, band)
    total = tl.zeros([BLOCK_TILES, channel.shape[0]], tl.float32)
    squares = tl.zeros([BLOCK_TILES, channel.shape[0]], tl.float32)
    for start in tl.range(0, tiles, BLOCK_TILES):
        tile = start + tl.arange(0, BLOCK_TILES)
        columns = tl.minimum(block_width, width - (tile % column_blocks) * block_width)
        rows = tl.minimum(band, height - (tile // column_blocks % bands) * band)
        size = (columns * rows).to(tl.float32)[:, None]
        mask = (tile < tiles)[:, None] & valid[None, :]
        source = moments_ptr + tile.to(tl.int64)[:, None] * 2 * channels + channel[None, :]
        mean = tl.load(source, mask=mask, other=0.0)
        deviation = tl.load(source + channels, mask=mask, other=0.0)
        difference = tl.where(mask, mean - pilot[None, :], 0.0)
        total += size * difference
        squares += deviation + size * difference * difference
    offset = tl.sum(total, 0) / count
    variance = tl.sum(squares, 0) / count - offset * offset
    return pilot + offset, tl.where(variance < 0.0, 0.0, variance)


@triton.jit
def row_moments_kernel(
    rows_ptr,  # [N, C]
    moments_ptr,  # [chunks, 2, C] float32
    count,
    channels,
    chunk,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """moments of each chunk of rows, taken around the chunk's first row. Reads rows, C-wide."""
    split = tl.program_id(0)
    channel = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    valid = channel < channels
    first = split.to(tl.int64) * chunk
    pilot = tl.load(rows_ptr + first * channels + channel, mask=valid, other=0.0).to(tl.float32)
    total = tl.zeros([BLOCK_ROWS, BLOCK_C], tl.float32)
    squares = tl.zeros([BLOCK_ROWS, BLOCK_C], tl.float32)
    size = tl.minimum(chunk, count - split * chunk)
    for start in tl.range(0, size, BLOCK_ROWS):
        row = start + tl.arange(0, BLOCK_ROWS)
        mask = (row < size)[:, None] & valid[None, :]
        offset = (first + row)[:, None] * channels + channel[None, :]
        value = tl.load(rows_ptr + offset, mask=mask, other=0.0).to(tl.float32)
        difference = tl.where(mask, value - pilot[None, :], 0.0)
        total += difference
        squares += difference * difference
    sums = tl.sum(total, 0)
    offset = sums / size
    deviation = tl.sum(squares, 0) - sums * offset
    store_moments(
        moments_ptr, split, channel, channels, pilot + offset,
        tl.where(deviation < 0.0, 0.0, deviation),
    )  # fmt: skip


# Means of chunks of rows, over all channels: every program of kernels/fold.py merges them again.
_MEANS = 32768
_BLOCK_ROWS, _BLOCK_C = 32, 64


def row_moments(rows: Tensor) -> Moments:
    """Of rows [N, C], of any dtype that kernels take."""
    count, channels = rows.shape
    chunk = -(-count // (max(1, _MEANS // channels) * _BLOCK_ROWS)) * _BLOCK_ROWS
    tiles = Tiles(count, 1, chunk, 1)
    values = rows.new_empty((tiles.of_images(1), 2, channels), dtype=torch.float32)
    launch(
        row_moments_kernel,
        (values.shape[0], -(-channels // _BLOCK_C)),
        *(rows, values, count, channels, chunk),
        BLOCK_ROWS=_BLOCK_ROWS,
        BLOCK_C=_BLOCK_C,
        num_warps=4,
        num_stages=2,
        reads=(rows,),
        writes=(values,),
    )
    return Moments(values, tiles, count)
