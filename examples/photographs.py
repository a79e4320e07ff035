"""Photographs as training examples: those bundled with scikit-image, or a folder of one's own."""

from __future__ import annotations

import functools
import importlib.util
import os
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import ExifTags, Image, ImageEnhance, ImageOps
from torch import Tensor

from moat_kernels.variants import Preprocessing

SUFFIXES = (".bmp", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")
# Files inside the scikit-image wheel; nothing is downloaded.
BUNDLED = (
    *("astronaut.png", "brick.png", "camera.png", "chelsea.png", "coffee.png", "coins.png"),
    *("grass.png", "gravel.png", "hubble_deep_field.jpg", "moon.png", "motorcycle_left.png"),
    "rocket.jpg",
)
TRAIN, VAL = "train", "val"  # subfolders of a folder that says itself what to test on
HELD_OUT_SHARE = 0.2  # of a class's files in a folder that does not
TRAINING_WIDTH = 0.7  # of a bundled photograph, from its left edge; the rest is held out
HELD_OUT_ROWS = 4  # pieces of a bundled photograph's held-out strip, from top to bottom

CROP_AREA = (0.2, 1.0)  # of the region
CROP_ASPECT = (3 / 4, 4 / 3)
JITTER = 0.3  # brightness, contrast and saturation are scaled by 1 - JITTER .. 1 + JITTER

# What makes an image upright, by its EXIF orientation; 1 is upright.
UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}

Region = tuple[float, float, float, float]  # left, top, right, bottom as fractions of the image
WHOLE: Region = (0.0, 0.0, 1.0, 1.0)


class DataError(ValueError):
    """The photographs cannot be used; the text says which, why and what helps."""


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
    """A folder with one subfolder of images per class; the last fifth of each class is held out.

    With subfolders `train` and `val` that are folders of classes themselves, `val` is held out
    instead; where there is `val` alone, there is nothing to train on.

    Files and folders whose names begin with a dot are no part of it.
    """
    try:
        if not folder.is_dir():
            raise DataError(f"--data {folder} is not a folder")
        return _in_parts(folder) if _parts(folder) else _in_classes(folder)
    except OSError as error:
        raise DataError(f"--data {folder} cannot be read: {error}") from error


def _in_classes(folder: Path) -> Photographs:
    training: list[Example] = []
    held_out: list[Example] = []
    classes = _classes(folder)
    for label, paths in enumerate(classes.values()):
        if len(paths) == 1:
            raise DataError(
                f"--data: {paths[0]} is the only image of its class, but one of each class is held "
                f"out to test on: add another one, or make {folder / 'train'} and "
                f"{folder / 'val'}, each with one subfolder per class"
            )
        examples = [Example(path, label) for path in paths]
        kept = round(HELD_OUT_SHARE * len(paths)) or 1
        training += examples[:-kept]
        held_out += examples[-kept:]
    return Photographs(list(classes), training, held_out)


def _in_parts(folder: Path) -> Photographs:
    train, val = folder / TRAIN, folder / VAL
    if VAL not in _parts(folder):
        raise DataError(
            f"--data: {train} has classes, {val} has none: make it, with subfolders named alike, "
            f"or give --data {train}, of which a fifth of each class is held out"
        )
    if others := [path.name for path in _subfolders(folder) if path.name not in (TRAIN, VAL)]:
        _warn_once(f"of {folder} only {TRAIN} and {VAL} are used, not {', '.join(others)}")
    held_out = _classes(val)
    training = _classes(train) if TRAIN in _parts(folder) else {}
    names = list(training or held_out)
    if unknown := [name for name in held_out if name not in names]:
        raise DataError(
            f"--data: {val / unknown[0]} is of a class that {train} does not have ({len(unknown)} "
            f"such): add {train / unknown[0]}, or move it away"
        )
    return Photographs(
        names,
        *(
            [Example(path, names.index(name)) for name, paths in part.items() for path in paths]
            for part in (training, held_out)
        ),
    )


def _parts(folder: Path) -> list[str]:
    """Which of `train` and `val` are folders of classes, rather than classes."""
    return [
        name for name in (TRAIN, VAL) if (folder / name).is_dir() and _subfolders(folder / name)
    ]


def _classes(folder: Path) -> dict[str, list[Path]]:
    """The images of each subfolder, by its name."""
    subfolders = _subfolders(folder)
    if len(subfolders) < 2:
        raise DataError(
            f"--data {folder} must have one subfolder per class and at least two classes, "
            f"found {len(subfolders)} subfolders"
        )
    classes = {}
    for subfolder in subfolders:
        paths = sorted(path for path in files_below(subfolder) if path.suffix.lower() in SUFFIXES)
        if not paths:
            raise DataError(f"--data: {subfolder} has no images (of type {', '.join(SUFFIXES)})")
        classes[subfolder.name] = paths
    return classes


def _subfolders(folder: Path) -> list[Path]:
    return sorted(
        path for path in folder.iterdir() if path.is_dir() and not path.name.startswith(".")
    )


def files_below(folder: Path) -> Iterator[Path]:
    """All files below a folder that are not hidden; OSError if a part of it cannot be read."""

    def fail(error: OSError) -> None:
        raise error

    for parent, folders, files in os.walk(folder, onerror=fail):
        folders[:] = [name for name in folders if not name.startswith(".")]
        yield from (Path(parent, name) for name in files if not name.startswith("."))


def unusable(paths: Sequence[Path]) -> list[str]:
    """Why files cannot be used, a line for each of those."""

    def try_out(path: Path) -> str:
        try:
            read_image(path)
        except DataError as error:
            return str(error)
        return ""

    with ThreadPoolExecutor() as pool:
        return [line for line in pool.map(try_out, paths) if line]


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
    """The central square of each example, unchanged: [B, 3, resolution, resolution] and [B].

    What cannot be read any more is left out with a warning: the training is not lost for it.
    """
    images, labels = [torch.empty(0, 3, resolution, resolution)], []
    for example in examples:
        try:
            image = read_image(example.path)
        except DataError as error:
            _warn_once(f"left out of the test: {error}")
            continue
        left, top, right, bottom = _pixels(example.region, image)
        side = min(right - left, bottom - top)
        left, top = (left + right - side) / 2, (top + bottom - side) / 2
        square = _resize(image, (left, top, left + side, top + side), resolution)
        images.append(_to_tensor(square, preprocessing)[None])
        labels.append(example.label)
    return torch.cat(images), torch.tensor(labels)


def _augment(example: Example, random: np.random.Generator, resolution: int) -> Image.Image:
    """A random resized crop, flip and colour jitter."""
    image = read_image(example.path)
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
def read_image(path: Path) -> Image.Image:
    """The image as RGB, upright; the last ones are kept. DataError if it cannot be read."""
    return decode_image(path)


def decode_image(path: Path) -> Image.Image:
    """The same of an image that is needed once: nothing is kept."""
    try:
        if not path.is_file():  # opening a pipe would wait for who writes to it
            raise ValueError("there is no such file")
        with Image.open(path) as image:
            image.load()
            return _upright(image, path, _rgb(image))
    except Exception as error:  # Pillow raises whatever its readers of broken files come upon
        reason = str(error) or type(error).__name__
        raise DataError(f"cannot read the image {path}: {reason}") from error


def _upright(image: Image.Image, path: Path, pixels: Image.Image) -> Image.Image:
    """`pixels` as the EXIF data of `image` say; as they are where those are broken."""
    try:
        orientation = image.getexif().get(ExifTags.Base.Orientation)
        return pixels.transpose(UPRIGHT[orientation]) if orientation in UPRIGHT else pixels
    except Exception as error:
        _warn_once(f"{path} may not be upright, its EXIF data cannot be read: {error}")
        return pixels


@functools.cache
def _warn_once(text: str) -> None:
    print(f"warning: {text}", file=sys.stderr)


def _rgb(image: Image.Image) -> Image.Image:
    """8 bits for each colour, on white where an image is transparent; ValueError for other ranges.

    16 bits (Pillow's I;16 and I) are 0 .. 65535, floating point (F) is 0 .. 1.
    """
    if image.mode.startswith("I"):
        return _scaled(image, 65535)
    if image.mode == "F":
        return _scaled(image, 1)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")


def _scaled(image: Image.Image, white: int) -> Image.Image:
    pixels = np.asarray(image)
    lowest, highest = pixels.min(), pixels.max()
    if not (lowest >= 0 and highest <= white):
        raise ValueError(
            f"pixels of mode {image.mode} must be within 0 .. {white}, got {lowest} .. {highest}"
        )
    return Image.fromarray((pixels * (255 / white)).round().astype(np.uint8)).convert("RGB")


def _pixels(region: Region, image: Image.Image) -> tuple[float, float, float, float]:
    left, top, right, bottom = region
    return left * image.width, top * image.height, right * image.width, bottom * image.height


def _resize(
    image: Image.Image, box: tuple[float, float, float, float], resolution: int
) -> Image.Image:
    return image.resize((resolution, resolution), Image.Resampling.BICUBIC, box=box)


def _to_tensor(image: Image.Image, preprocessing: Preprocessing) -> Tensor:
    """[3, H, W] float32, normalised."""
    return normalised(torch.from_numpy(np.array(image)).permute(2, 0, 1), preprocessing)


def normalised(pixels: Tensor, preprocessing: Preprocessing) -> Tensor:
    """Pixels [..., 3, H, W] of 0 .. 255 in float32, as the model takes them, on their device."""
    mean = torch.tensor(preprocessing.mean, device=pixels.device)[:, None, None]
    std = torch.tensor(preprocessing.std, device=pixels.device)[:, None, None]
    return (pixels.float() / 255 - mean) / std
