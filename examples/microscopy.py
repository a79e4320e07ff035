"""Nuclei under a microscope: one image and the mask of each nucleus, split in two parts.

Both files lie in the stardist package (BSD-3-Clause, Copyright Uwe Schmidt and Martin Weigert),
which is never imported. The image is fluorescence microscopy of the 2018 Data Science Bowl
(Caicedo et al., Nature Methods 16, 2019).
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from photographs import DataError
from PIL import Image

TRAINING_SHARE = 2 / 3  # of the image's width, from its left edge; the rest is held out
BLACK, WHITE = 1, 99.8  # percentiles of the image that become 0 and 1
OUTSIDE = -1  # in masks: not to be learned and not to be tested

SCALE = (0.8, 1.25)  # of random crops
GAIN = (0.9, 1.1)
OFFSET = (-0.01, 0.01)


@dataclass(frozen=True)
class Part:
    """A part of the image.

    image: [H, W] float32, about 0 to 1.
    instances: [H, W] int64: 0 background, 1, 2, .. a nucleus each, OUTSIDE what belongs to a
        nucleus of the other part, or lies beyond the image.
    """

    image: np.ndarray
    instances: np.ndarray


def load_microscopy() -> tuple[Part, Part]:
    """What to train on and what is held out: the left two thirds of the image, and the rest.

    Raises DataError where stardist is not installed, or its files are not what they should be.
    """
    package = importlib.util.find_spec("stardist")
    if package is None or package.origin is None:
        raise DataError(
            "the microscopy image comes with stardist, which is not installed: "
            "pip install --no-deps -r requirements-examples.txt"
        )
    return split(*read_files(Path(package.origin).parent / "data" / "images"))


def read_files(folder: Path) -> tuple[np.ndarray, np.ndarray]:
    """The whole image [H, W] float32, normalised, and its instances [H, W] int64."""
    image, instances = (_read(folder / name) for name in ("img2d.tif", "mask2d.tif"))
    if image.shape != instances.shape:
        raise DataError(
            f"{folder / 'mask2d.tif'} is of {instances.shape} pixels, the image of {image.shape}: "
            "install stardist again"
        )
    black, white = np.percentile(image, (BLACK, WHITE))
    if not (black < white and instances.max() > 0):
        raise DataError(f"{folder} has an image or a mask of one value: install stardist again")
    return ((image - black) / (white - black)).astype(np.float32), instances.astype(np.int64)


def _read(path: Path) -> np.ndarray:
    try:
        with Image.open(path) as image:
            pixels = np.asarray(image)
    except Exception as error:  # Pillow raises whatever its readers of broken files come upon
        raise DataError(f"cannot read {path}, install stardist again: {error}") from error
    if pixels.ndim != 2:
        raise DataError(f"{path} has {pixels.ndim} dimensions instead of 2: install stardist again")
    return pixels


def split(image: np.ndarray, instances: np.ndarray) -> tuple[Part, Part]:
    """Cut at a column. A nucleus on the border belongs to the part where most of it lies.

    In the other part it is OUTSIDE, so that no nucleus is both trained on and tested.
    """
    column = round(TRAINING_SHARE * image.shape[1])
    count = instances.max() + 1
    areas = [
        np.bincount(side.ravel(), minlength=count) for side in np.split(instances, [column], 1)
    ]
    belongs_left = areas[0] >= areas[1]
    parts = []
    for side, belongs in ((slice(column), belongs_left), (slice(column, None), ~belongs_left)):
        belongs[0] = True  # background
        own = np.where(belongs[instances[:, side]], instances[:, side], OUTSIDE)
        parts.append(Part(image[:, side], own))
    return parts[0], parts[1]


def random_crop(part: Part, size: int, random: np.random.Generator) -> Part:
    """A square of `size` pixels: moved, scaled, turned, flipped, brighter or darker.

    Of a part that is smaller the crop shows all, OUTSIDE around it.
    """
    part = _scaled(part, random.uniform(*SCALE)) if random.random() < 0.5 else part
    image, instances = part.image, part.instances
    missing = [max(0, size - side) for side in image.shape]
    before = [int(random.integers(0, gap + 1)) for gap in missing]
    padding = [(start, gap - start) for start, gap in zip(before, missing, strict=True)]
    image = np.pad(image, padding)
    instances = np.pad(instances, padding, constant_values=OUTSIDE)
    top, left = (int(random.integers(0, side - size + 1)) for side in image.shape)
    window = slice(top, top + size), slice(left, left + size)
    turns, flipped = int(random.integers(4)), random.random() < 0.5
    image, instances = (np.rot90(pixels[window], turns) for pixels in (image, instances))
    if flipped:
        image, instances = image[:, ::-1], instances[:, ::-1]
    image = image * np.float32(random.uniform(*GAIN)) + np.float32(random.uniform(*OFFSET))
    return Part(np.ascontiguousarray(image), np.ascontiguousarray(instances))


def _scaled(part: Part, scale: float) -> Part:
    image, instances = (
        torch.from_numpy(pixels.copy())[None, None] for pixels in (part.image, part.instances)
    )
    size = [max(1, round(scale * side)) for side in part.image.shape]
    resized = F.interpolate(image, size, mode="bilinear", align_corners=False)
    # Labels above 2**24 would not survive float32; there are some hundred.
    labels = F.interpolate(instances.float(), size, mode="nearest-exact").long()
    return Part(resized[0, 0].numpy(), labels[0, 0].numpy())
