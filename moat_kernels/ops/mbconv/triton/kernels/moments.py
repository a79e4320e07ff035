"""Means and squared deviations of tiles, and how they make up those of the whole."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor


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


def merge_moments(moments: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
    """(mean, biased variance) [E] in float64 from tiles' moments [P, 2, E] and counts [P].

    Deviations are from each tile's own mean, so nothing cancels where |mean| >> std.
    """
    means, deviations = moments.double().unbind(1)
    weights = counts.double()[:, None] / counts.sum()
    mean = (weights * means).sum(0)
    within = deviations.sum(0) / counts.sum()
    return mean, within + (weights * (means - mean).square()).sum(0)
