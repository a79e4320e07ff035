"""What tiles of channels have in common: which exist, and a norm as one factor and one addend."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def exist(index, size, WHOLE: tl.constexpr):
    """index < size; WHOLE: that holds for all, so that masks cost no instructions."""
    if WHOLE:
        return tl.full(index.shape, True, tl.int1)
    else:
        return index < size


@triton.jit
def load_affine(affine_ptr, channel, channels, valid):
    """scale and shift of a tile's channels, from float32 [2 or more, channels] or None: neither."""
    scale = tl.where(valid, 1.0, 0.0)
    shift = tl.zeros(channel.shape, tl.float32)
    if affine_ptr is not None:
        scale = tl.load(affine_ptr + channel, mask=valid, other=0.0)
        shift = tl.load(affine_ptr + channels + channel, mask=valid, other=0.0)
    return scale, shift
