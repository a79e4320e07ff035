"""The nine MOAT variants: widths, depths, drop path, and the preprocessing they were trained with.

Source: the paper's tables 1 and 2 (arXiv 2210.01820) and the official code.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

# Mean and standard deviation of RGB in 0..1 units; ImageNet's for the small models, and
# a plain [-1, 1] range for those pre-trained on ImageNet-22k at high resolution.
_IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
_SYMMETRIC = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))


@dataclass(frozen=True)
class Preprocessing:
    """What an image needs before the model: (rgb in 0..1 - mean) / std, at `resolution` pixels."""

    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    resolution: int


@dataclass(frozen=True)
class Variant:
    """One MOAT: stem width, width and depth of the four stages, drop path of the deepest block."""

    stem_width: int
    widths: tuple[int, int, int, int]
    depths: tuple[int, int, int, int]
    drop_path_rate: float
    preprocessing: Preprocessing


def _variant(
    stem_width: int,
    widths: tuple[int, int, int, int],
    depths: tuple[int, int, int, int],
    drop_path_rate: float,
    normalization: tuple[tuple[float, float, float], tuple[float, float, float]],
    resolution: int,
) -> Variant:
    preprocessing = Preprocessing(*normalization, resolution)
    return Variant(stem_width, widths, depths, drop_path_rate, preprocessing)


VARIANTS = {
    "moat_0": _variant(64, (96, 192, 384, 768), (2, 3, 7, 2), 0.2, _IMAGENET, 224),
    "moat_1": _variant(64, (96, 192, 384, 768), (2, 6, 14, 2), 0.3, _IMAGENET, 224),
    "moat_2": _variant(128, (128, 256, 512, 1024), (2, 6, 14, 2), 0.3, _SYMMETRIC, 384),
    "moat_3": _variant(160, (160, 320, 640, 1280), (2, 12, 28, 2), 0.6, _SYMMETRIC, 512),
    "moat_4": _variant(256, (256, 512, 1024, 2048), (2, 12, 28, 2), 0.7, _SYMMETRIC, 512),
    "tiny_moat_0": _variant(32, (32, 64, 128, 256), (2, 3, 7, 2), 0.0, _IMAGENET, 256),
    "tiny_moat_1": _variant(40, (40, 80, 160, 320), (2, 3, 7, 2), 0.0, _IMAGENET, 256),
    "tiny_moat_2": _variant(56, (56, 112, 224, 448), (2, 3, 7, 2), 0.0, _IMAGENET, 256),
    "tiny_moat_3": _variant(80, (80, 160, 320, 640), (2, 3, 7, 2), 0.1, _IMAGENET, 256),
}


def list_models() -> list[str]:
    """The names that `create_model` knows.

    >>> list_models()[:2]
    ['moat_0', 'moat_1']
    """
    return list(VARIANTS)


def get_variant(name: str) -> Variant:
    """The variant called `name`; ValueError with the known names otherwise."""
    if name not in VARIANTS:
        raise ValueError(f"name must be one of {', '.join(VARIANTS)}, got {name!r}")
    return VARIANTS[name]


def get_preprocessing(name: str) -> Preprocessing:
    """Normalisation and resolution of the official ImageNet training of variant `name`.

    >>> get_preprocessing("moat_2").resolution
    384

    Raises ValueError with the known names for another name.
    """
    return get_variant(name).preprocessing


def get_pretrained_cfg(name: str) -> dict[str, Any]:
    """What timm's `pretrained_cfg` says of variant `name`: how its images are prepared, above all.

    crop_pct and interpolation are timm's defaults: the official code does not publish how images
    are cropped and resized in evaluation.
    """
    preprocessing = get_preprocessing(name)
    resolution = preprocessing.resolution
    return {
        "architecture": name,
        "input_size": (3, resolution, resolution),
        "fixed_input_size": False,
        "pool_size": (math.ceil(resolution / 32),) * 2,
        "interpolation": "bicubic",
        "crop_pct": 0.875,
        "mean": preprocessing.mean,
        "std": preprocessing.std,
        "num_classes": 1000,
        "first_conv": "stem.conv_0",
        "classifier": "logits_head",
        "paper_ids": "arXiv:2210.01820",
        "origin_url": "https://github.com/google-research/deeplab2",
    }
