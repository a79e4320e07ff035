"""How images are prepared for a model: what travels with its weights, and what timm calls it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

from moat_kernels.ops.common.checks import check_choice, check_positive_integer

CHANNEL_ORDERS = ("rgb", "bgr")
CROP_MODES = ("center", "border")
INTERPOLATIONS = ("bicubic", "bilinear", "lanczos")

Colour = tuple[float, float, float]

# Mean and standard deviation in 0..1 units: of pixels of 0..255 as they are, and of -1..1.
PIXELS: tuple[Colour, Colour] = ((0.0, 0.0, 0.0), (1 / 255, 1 / 255, 1 / 255))
SCALED: tuple[Colour, Colour] = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))


@dataclass(frozen=True)
class Preprocessing:
    """What an image needs before the model: (pixel / 255 - mean) / std, of each channel.

    resolution: height and width in pixels.
    channel_order: "rgb" or "bgr", which the model reads; mean and std are in this order.
    crop_mode: "center": the shorter side is resized to resolution / crop_pct, and the middle is cut
        out; "border": the whole image, padded by white to a square, is resized.
    interpolation: "bicubic", "bilinear" or "lanczos".

    Raises ValueError naming a field that is none of these.
    """

    mean: Colour
    std: Colour
    resolution: int
    channel_order: str = "rgb"
    crop_mode: str = "center"
    crop_pct: float = 0.875
    interpolation: str = "bicubic"

    def __post_init__(self) -> None:
        for name in ("mean", "std"):
            values = getattr(self, name)
            if not _are_three_numbers(values) or (name == "std" and min(values) <= 0):
                raise ValueError(f"{name} must be three numbers, of std above 0, got {values!r}")
            object.__setattr__(self, name, tuple(values))  # of a list, as JSON has it
        check_positive_integer("resolution", self.resolution)
        check_choice("channel_order", self.channel_order, CHANNEL_ORDERS)
        check_choice("crop_mode", self.crop_mode, CROP_MODES)
        if not _is_number(self.crop_pct) or not 0.0 < self.crop_pct <= 1.0:
            raise ValueError(f"crop_pct must be within (0, 1], got {self.crop_pct!r}")
        check_choice("interpolation", self.interpolation, INTERPOLATIONS)

    def for_model(
        self, configuration: Mapping[str, Any], scales_pixels: bool = False
    ) -> Preprocessing:
        """The same for a model of another configuration: of its pixel_scaling and channel_order.

        scales_pixels: whether the model that this is for does.
        """
        mean, std = self.mean, self.std
        if configuration["channel_order"] != self.channel_order:
            mean, std = mean[::-1], std[::-1]
        if configuration["pixel_scaling"] != scales_pixels:
            mean, std = PIXELS if configuration["pixel_scaling"] else SCALED
        return replace(self, mean=mean, std=std, channel_order=configuration["channel_order"])

    def timm_cfg(self) -> dict[str, Any]:
        """The entries that timm's `pretrained_cfg` has for it: none for the order of channels."""
        return {
            "input_size": (3, self.resolution, self.resolution),
            "fixed_input_size": False,
            "interpolation": self.interpolation,
            "crop_pct": self.crop_pct,
            "crop_mode": self.crop_mode,
            "mean": self.mean,
            "std": self.std,
        }


def preprocessing_of(model: Any) -> Preprocessing | None:
    """What the `pretrained_cfg` of a model says, None if it says nothing.

    Raises ValueError for what Preprocessing has no words for, as timm's `crop_mode="squash"`.
    """
    cfg = getattr(model, "pretrained_cfg", None)
    if not isinstance(cfg, Mapping) or not cfg.get("mean") or not cfg.get("input_size"):
        return None
    names = {field.name for field in fields(Preprocessing)} - {"resolution", "channel_order"}
    told = {name: cfg[name] for name in names.intersection(cfg)}
    order = getattr(model, "configuration", {}).get("channel_order", "rgb")
    return Preprocessing(resolution=cfg["input_size"][-1], channel_order=order, **told)


def known_preprocessing_of(model: Any) -> Preprocessing | None:
    """The same, None for what Preprocessing has no words for."""
    try:
        return preprocessing_of(model)
    except (TypeError, ValueError):
        return None


def _are_three_numbers(values: object) -> bool:
    return isinstance(values, tuple | list) and len(values) == 3 and all(map(_is_number, values))


def _is_number(value: object) -> bool:
    return type(value) in (int, float) and math.isfinite(value)  # type: ignore[arg-type]
