"""The nine MOAT variants: widths, depths, drop path, and the preprocessing they were trained with.

Source: the paper's tables 1 and 2 (arXiv 2210.01820) and the official code.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from moat_kernels.preprocessing import SCALED, Colour, Preprocessing, preprocessing_of

# Mean and standard deviation of RGB in 0..1 units, for the small models; those pre-trained on
# ImageNet-22k at high resolution have a plain [-1, 1] range.
_IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


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
    normalization: tuple[Colour, Colour],
    resolution: int,
) -> Variant:
    preprocessing = Preprocessing(*normalization, resolution)
    return Variant(stem_width, widths, depths, drop_path_rate, preprocessing)


VARIANTS = {
    "moat_0": _variant(64, (96, 192, 384, 768), (2, 3, 7, 2), 0.2, _IMAGENET, 224),
    "moat_1": _variant(64, (96, 192, 384, 768), (2, 6, 14, 2), 0.3, _IMAGENET, 224),
    "moat_2": _variant(128, (128, 256, 512, 1024), (2, 6, 14, 2), 0.3, SCALED, 384),
    "moat_3": _variant(160, (160, 320, 640, 1280), (2, 12, 28, 2), 0.6, SCALED, 512),
    "moat_4": _variant(256, (256, 512, 1024, 2048), (2, 12, 28, 2), 0.7, SCALED, 512),
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


def find_variant(sizes: Mapping[str, Any]) -> str | None:
    """The name of the variant of this stem_width, widths and depths, if there is one."""
    wanted = (sizes["stem_width"], tuple(sizes["widths"]), tuple(sizes["depths"]))
    for name, variant in VARIANTS.items():
        if (variant.stem_width, variant.widths, variant.depths) == wanted:
            return name
    return None


def get_preprocessing(model: str | Any) -> Preprocessing:
    """How images are prepared for a model, or were in the official ImageNet training of a variant.

    model: the name of a variant, or a MOAT or FrozenMOAT, whose checkpoint may have told it, or
        another model with a `pretrained_cfg` as timm has it.

    >>> get_preprocessing("moat_2").resolution
    384

    crop_pct and interpolation of variants are timm's defaults: the official code does not publish
    how images are cropped and resized in evaluation.

    Raises ValueError with the known names for another name, and for a model of which it is not
    known.
    """
    if isinstance(model, str):
        return get_variant(model).preprocessing
    preprocessing = preprocessing_of(model)
    if preprocessing is None:
        raise ValueError(
            f"model must be the name of a variant, or a MOAT that was made by one or whose "
            f"checkpoint tells how images are prepared; this {type(model).__name__} was not"
        )
    return preprocessing


def get_pretrained_cfg(name: str, preprocessing: Preprocessing) -> dict[str, Any]:
    """What timm's `pretrained_cfg` says of variant `name`, whose images are prepared so."""
    return {
        "architecture": name,
        **preprocessing.timm_cfg(),
        "pool_size": (math.ceil(preprocessing.resolution / 32),) * 2,
        "num_classes": 1000,
        "first_conv": "stem.conv_0",
        "classifier": "logits_head",
        "paper_ids": "arXiv:2210.01820",
        "origin_url": "https://github.com/google-research/deeplab2",
    }
