"""The shapes that benchmarks share: where MOAT's blocks live."""

from __future__ import annotations

import pytest

from moat_kernels import get_preprocessing, list_models

# Whether --full was given; conftest.py sets it before the benchmarks are collected.
FULL = False

EXPAND_RATIO = 4
HEAD_DIM = 32
TRAINING_BATCH = 8

# (map size, channels) of the stride-1 blocks of tiny_moat_0 at 256 px and moat_0 at 224 px.
BLOCK_SHAPES = [(64, 32), (32, 64), (16, 128), (8, 256), (56, 96), (28, 192), (14, 384), (7, 768)]

# (map size of the output, C_in, C_out, stride, gated by squeeze-excite) of the others: the first
# blocks of the stages, and both blocks of the first two stages with their gates.
OTHER_BLOCKS = [
    (64, 32, 32, 2, True),
    (64, 32, 32, 1, True),
    (32, 32, 64, 2, True),
    (32, 64, 64, 1, True),
    (16, 64, 128, 2, False),
    (8, 128, 256, 2, False),
    (56, 64, 96, 2, True),
    (56, 96, 96, 1, True),
    (28, 96, 192, 2, True),
    (28, 192, 192, 1, True),
    (14, 192, 384, 2, False),
    (7, 384, 768, 2, False),
]

# (map size, window or None, channels): moat_0's two attention stages, and the first of them at
# twice the resolution in windows.
ATTENTION_SHAPES = [(14, None, 384), (28, 14, 384), (7, None, 768)]


def models(quick: tuple[str, ...]) -> list:
    """(variant, resolution) of all variants; those not in `quick` only with --full."""
    return [
        pytest.param(
            name,
            get_preprocessing(name).resolution,
            id=name,
            marks=() if name in quick else pytest.mark.full,
        )
        for name in list_models()
    ]
