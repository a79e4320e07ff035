"""The shapes that benchmarks share: where MOAT's blocks live."""

from __future__ import annotations

from typing import NamedTuple

from moat_kernels import get_preprocessing, list_models

EXPAND_RATIO = 4
HEAD_DIM = 32
TRAINING_BATCH = 8


class Block(NamedTuple):
    """An inverted bottleneck; size: of its output's side. gated: by squeeze-excite."""

    size: int
    in_channels: int
    out_channels: int
    stride: int = 1
    gated: bool = False

    def __str__(self) -> str:
        plain = self.stride == 1 and not self.gated
        kind = f" stride {self.stride}{', squeeze-excite' if self.gated else ''}"
        return f"{self.size}x{self.size}x{self.out_channels}{'' if plain else kind}"


# The stride-1 blocks of tiny_moat_0 at 256 px and moat_0 at 224 px.
PLAIN_BLOCKS = [
    Block(size, channels, channels)
    for size, channels in (
        *((64, 32), (32, 64), (16, 128), (8, 256)),
        *((56, 96), (28, 192), (14, 384), (7, 768)),
    )
]

# The others: the first blocks of the stages, and both blocks of the first two with their gates.
OTHER_BLOCKS = [
    Block(64, 32, 32, 2, gated=True),
    Block(64, 32, 32, 1, gated=True),
    Block(32, 32, 64, 2, gated=True),
    Block(32, 64, 64, 1, gated=True),
    Block(16, 64, 128, 2),
    Block(8, 128, 256, 2),
    Block(56, 64, 96, 2, gated=True),
    Block(56, 96, 96, 1, gated=True),
    Block(28, 96, 192, 2, gated=True),
    Block(28, 192, 192, 1, gated=True),
    Block(14, 192, 384, 2),
    Block(7, 384, 768, 2),
]


class AttentionMap(NamedTuple):
    """A square map for attention over all of it, or in square windows."""

    size: int
    window: int | None
    channels: int

    def __str__(self) -> str:
        kind = "whole map" if self.window is None else f"{self.window}x{self.window} windows"
        return f"{self.size}x{self.size}x{self.channels} {kind}"


# moat_0's two attention stages, and the first of them at twice the resolution in windows.
ATTENTION_MAPS = [
    AttentionMap(14, None, 384),
    AttentionMap(28, 14, 384),
    AttentionMap(7, None, 768),
]


class Model(NamedTuple):
    """A variant at the resolution that it was trained for; training_batch: fits 24 GiB."""

    name: str
    resolution: int
    training_batch: int

    def __str__(self) -> str:
        return f"{self.name} {self.resolution}"


_TRAINING_BATCHES = {"moat_2": 4, "moat_3": 1, "moat_4": 1}
# Their convolutions alone take seconds a pass, so eval is measured at batch 1 only.
LARGE_MODELS = ("moat_3", "moat_4")
MODELS = [
    Model(name, get_preprocessing(name).resolution, _TRAINING_BATCHES.get(name, TRAINING_BATCH))
    for name in list_models()
]
