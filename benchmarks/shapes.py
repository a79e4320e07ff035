"""The shapes that benchmarks share: where MOAT's blocks live, and batches that suit the device.

The first of several batches in eval is measured by default, the others with --full.
"""

from __future__ import annotations

from typing import NamedTuple

from device import chosen

from moat_kernels import get_preprocessing, list_models

EXPAND_RATIO = 4
HEAD_DIM = 32

_ON_GPU = chosen() == "cuda"
# Of blocks, attention and the stem.
EVAL_BATCHES = (64, 1) if _ON_GPU else (1, 8)
TRAINING_BATCH = 64 if _ON_GPU else 8
# Of other people's models.
ADAPTER_BATCHES = {"eval": 256, "training": 64} if _ON_GPU else {"eval": 1, "training": 2}


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
    """A variant at the resolution that it was trained for, and its batches."""

    name: str
    resolution: int
    training_batch: int
    eval_batches: tuple[int, ...]

    def __str__(self) -> str:
        return f"{self.name} {self.resolution}"


LARGE_MODELS = ("moat_3", "moat_4")
if _ON_GPU:
    # Stock in float32 fits 80 GB. Predicted by moat_kernels.plan, in GiB: training of moat_2 60, of
    # moat_3 63, of moat_4 50; eval of moat_2 59, of moat_3 33, of moat_4 54.
    _MODEL_TRAINING_BATCH, _MODEL_EVAL_BATCHES = 64, (256, 1)
    _TRAINING_BATCHES = {"moat_2": 32, "moat_3": 8, "moat_4": 4}
    _EVAL_BATCHES = {name: (64, 1) for name in LARGE_MODELS}
else:
    # Training fits 24 GiB. The convolutions of the large models alone take seconds a pass.
    _MODEL_TRAINING_BATCH, _MODEL_EVAL_BATCHES = TRAINING_BATCH, EVAL_BATCHES
    _TRAINING_BATCHES = {"moat_2": 4, "moat_3": 1, "moat_4": 1}
    _EVAL_BATCHES = {name: (1,) for name in LARGE_MODELS}
MODELS = [
    Model(
        name,
        get_preprocessing(name).resolution,
        _TRAINING_BATCHES.get(name, _MODEL_TRAINING_BATCH),
        _EVAL_BATCHES.get(name, _MODEL_EVAL_BATCHES),
    )
    for name in list_models()
]
