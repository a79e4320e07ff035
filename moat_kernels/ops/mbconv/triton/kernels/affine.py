"""A norm as the kernels read it: one factor and one addend per channel."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def load_affine(affine_ptr, channel, channels, valid):
    """scale and shift of a tile's channels, from float32 [2 or more, channels] or None: neither."""
    scale = tl.where(valid, 1.0, 0.0)
    shift = tl.zeros(channel.shape, tl.float32)
    if affine_ptr is not None:
        scale = tl.load(affine_ptr + channel, mask=valid, other=0.0)
        shift = tl.load(affine_ptr + channels + channel, mask=valid, other=0.0)
    return scale, shift
