"""Geometry of the depthwise convolution."""

from __future__ import annotations

from dataclasses import dataclass


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

    @property
    def sizes(self) -> tuple[int, ...]:
        """What a launch is chosen by, beside the channels."""
        return self.batch, self.height, self.width, self.stride
