"""Geometry of the depthwise convolution."""

from __future__ import annotations

import functools
from dataclasses import dataclass

from moat_kernels.ops.common.spatial import Padding, output_size, resolve_padding
from moat_kernels.ops.mbconv.algebra.coverage import KERNEL_SIZE
from moat_kernels.ops.mbconv.description import MBConvDescription


@dataclass(frozen=True)
class Stencil:
    """Maps before and after a 3x3 convolution, its stride (1 or 2) and padding (top, left)."""

    batch: int
    height: int
    width: int
    out_height: int
    out_width: int
    stride: int
    top: int
    left: int

    @staticmethod
    def of(batch: int, height: int, width: int, description: MBConvDescription) -> Stencil:
        """Of the block's convolution on maps of `height` x `width`."""
        sizes = (batch, height, width)
        known = all(type(size) is int for size in sizes)  # symbols have no hash
        make = _make_stencil if known else _make_stencil.__wrapped__
        return make(*sizes, description.stride, description.padding)

    @property
    def out_pixels(self) -> int:
        """Of one image."""
        return self.out_height * self.out_width

    @property
    def sizes(self) -> tuple[int, ...]:
        """What a launch is chosen by, beside the channels."""
        return self.batch, self.height, self.width, self.stride


@functools.lru_cache(maxsize=1024)
def _make_stencil(batch: int, height: int, width: int, stride: int, padding: Padding) -> Stencil:
    top, bottom, left, right = resolve_padding(padding, height, width, KERNEL_SIZE, stride)
    return Stencil(
        batch,
        height,
        width,
        output_size(height, top, bottom, KERNEL_SIZE[0], stride),
        output_size(width, left, right, KERNEL_SIZE[1], stride),
        stride,
        top,
        left,
    )
