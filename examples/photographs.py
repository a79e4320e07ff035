"""Photographs as training examples: those bundled with scikit-image, or a folder of one's own."""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageEnhance, ImageOps, UnidentifiedImageError
from torch import Tensor

from moat_kernels.variants import Preprocessing

SUFFIXES = (".bmp", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")
# Files inside the scikit-image wheel; nothing is downloaded.
BUNDLED = (
    *("astronaut.png", "brick.png", "camera.png", "chelsea.png", "coffee.png", "coins.png"),
    *("grass.png", "gravel.png", "hubble_deep_field.jpg", "moon.png", "motorcycle_left.png"),
    "rocket.jpg",
)
HELD_OUT_SHARE = 0.2  # of a class's files in a folder
TRAINING_WIDTH = 0.7  # of a bundled photograph, from its left edge; the rest is held out
HELD_OUT_ROWS = 4  # pieces of a bundled photograph's held-out strip, from top to bottom

CROP_AREA = (0.2, 1.0)  # of the region
CROP_ASPECT = (3 / 4, 4 / 3)
JITTER = 0.3  # brightness, contrast and saturation are scaled by 1 - JITTER .. 1 + JITTER

Region = tuple[float, float, float, float]  # left, top, right, bottom as fractions of the image
WHOLE: Region = (0.0, 0.0, 1.0, 1.0)


class DataError(ValueError):
    """The photographs cannot be used; the text says which and why."""


@dataclass(frozen=True)
class Example:
    """A part of one image file, and the index of its class."""

    path: Path
    label: int
    region: Region = WHOLE


@dataclass(frozen=True)
class Photographs:
    """What to train on, what to test on, and the names of the classes."""

    classes: list[str]
    training: list[Example]
    held_out: list[Example]


def bundled_photographs() -> Photographs:
    """Twelve photographs from scikit-image, each a class of its own.

    Training sees the left part of each; the strip at its right edge is held out.
    """
    package = importlib.util.find_spec("skimage")
    if package is None or package.origin is None:
        raise DataError(
            "the default photographs come with scikit-image: pip install scikit-image, or give "
            "your own with --data FOLDER"
        )
    folder = Path(package.origin).parent / "data"
    training, held_out = [], []
    for label, name in enumerate(BUNDLED):
        path = folder / name
        if not path.is_file():
            raise DataError(f"this scikit-image has no {name} in {folder}; use --data FOLDER")
        training.append(Example(path, label, (0.0, 0.0, TRAINING_WIDTH, 1.0)))
        for row in range(HELD_OUT_ROWS):
            top, bottom = row / HELD_OUT_ROWS, (row + 1) / HELD_OUT_ROWS
            held_out.append(Example(path, label, (TRAINING_WIDTH, top, 1.0, bottom)))
    return Photographs([Path(name).stem for name in BUNDLED], training, held_out)


def folder_photographs(folder: Path) -> Photographs:
    """A folder with one subfolder of images per class; the last fifth of each class is held out."""
    if not folder.is_dir():
        raise DataError(f"--data {folder} is not a folder")
    subfolders = sorted(
        path for path in folder.iterdir() if path.is_dir() and not path.name.startswith(".")
    )
    if len(subfolders) < 2:
        raise DataError(
            f"--data {folder} must have one subfolder per class and at least two classes, "
            f"found {len(subfolders)} subfolders"
        )
    training: list[Example] = []
    held_out: list[Example] = []
    for label, subfolder in enumerate(subfolders):
        paths = sorted(path for path in subfolder.rglob("*") if path.suffix.lower() in SUFFIXES)
        if not paths:
            raise DataError(f"--data: {subfolder} has no images (of type {', '.join(SUFFIXES)})")
        examples = [Example(path, label) for path in paths]
        kept = min(len(paths) - 1, round(HELD_OUT_SHARE * len(paths)) or 1)
        training += examples[: len(paths) - kept]
        held_out += examples[len(paths) - kept :]
    return Photographs([subfolder.name for subfolder in subfolders], training, held_out)


def training_batch(
    examples: Sequence[Example],
    *,
    seed: int,
    step: int,
    batch_size: int,
    resolution: int,
    preprocessing: Preprocessing,
    share: tuple[int, int] = (0, 1),
) -> tuple[Tensor, Tensor]:
    """Images [B, 3, resolution, resolution] and labels [B] of one step.

    share: (i, n) makes every n-th image from the i-th on only.

    A function of its arguments alone: epochs are shuffled, and crops, flips and jitter drawn,
    from the seed and the position in the run, so any step can be repeated.
    """
    images, labels = [], []
    first, stride = share
    for position in range(step * batch_size + first, (step + 1) * batch_size, stride):
        epoch, index = divmod(position, len(examples))
        order = np.random.default_rng((seed, 0, epoch)).permutation(len(examples))
        example = examples[order[index]]
        image = _augment(example, np.random.default_rng((seed, 1, position)), resolution)
        images.append(_to_tensor(image, preprocessing))
        labels.append(example.label)
    return torch.stack(images), torch.tensor(labels)


def held_out_batch(
    examples: Sequence[Example], resolution: int, preprocessing: Preprocessing
) -> tuple[Tensor, Tensor]:
    """The central square of each example, unchanged: [B, 3, resolution, resolution] and [B]."""
    images = []
    for example in examples:
        image = _read(example.path)
        left, top, right, bottom = _pixels(example.region, image)
        side = min(right - left, bottom - top)
        left, top = (left + right - side) / 2, (top + bottom - side) / 2
        square = _resize(image, (left, top, left + side, top + side), resolution)
        images.append(_to_tensor(square, preprocessing))
    return torch.stack(images), torch.tensor([example.label for example in examples])


def _augment(example: Example, random: np.random.Generator, resolution: int) -> Image.Image:
    """A random resized crop, flip and colour jitter."""
    image = _read(example.path)
    left, top, right, bottom = _pixels(example.region, image)
    width, height = right - left, bottom - top
    area = random.uniform(*CROP_AREA) * width * height
    aspect = np.exp(random.uniform(*np.log(CROP_ASPECT)))
    crop_width = min(width, np.sqrt(area * aspect))
    crop_height = min(height, np.sqrt(area / aspect))
    left += random.uniform(0, width - crop_width)
    top += random.uniform(0, height - crop_height)
    crop = _resize(image, (left, top, left + crop_width, top + crop_height), resolution)
    if random.random() < 0.5:
        crop = ImageOps.mirror(crop)
    for enhancement in (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color):
        crop = enhancement(crop).enhance(random.uniform(1 - JITTER, 1 + JITTER))
    return crop


@functools.lru_cache(maxsize=64)
def _read(path: Path) -> Image.Image:
    """The image as RGB, upright."""
    try:
        with Image.open(path) as image:
            return ImageOps.exif_transpose(image).convert("RGB")
    except (UnidentifiedImageError, OSError) as error:
        raise DataError(f"cannot read the image {path}: {error}") from error


def _pixels(region: Region, image: Image.Image) -> tuple[float, float, float, float]:
    left, top, right, bottom = region
    return left * image.width, top * image.height, right * image.width, bottom * image.height


def _resize(
    image: Image.Image, box: tuple[float, float, float, float], resolution: int
) -> Image.Image:
    return image.resize((resolution, resolution), Image.Resampling.BICUBIC, box=box)


def _to_tensor(image: Image.Image, preprocessing: Preprocessing) -> Tensor:
    """[3, H, W] float32, normalised."""
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255
    mean = torch.tensor(preprocessing.mean)[:, None, None]
    std = torch.tensor(preprocessing.std)[:, None, None]
    return (pixels - mean) / std
