"""A folder of one's own images with a mask for each.

    FOLDER/images/      the image files
    FOLDER/masks/       for each image a PNG of its name and size: a pixel's value is its class,
                        from 0 on, and 255 is ignored
    FOLDER/classes.txt  if there is one: the names of the classes, a line each

The last fifth of the images, in the order of their names, is held out.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from labelled_images import IGNORED, Labelled
from photographs import SUFFIXES, DataError, read_image
from PIL import Image
from torch import Tensor

HELD_OUT_SHARE = 0.2  # of the images
SCALE = (0.5, 2.0)  # of random crops
NAMED = 20  # files that cannot be used, at most; the others are counted
MODES = ("L", "P", "1")  # of masks: what has one value of up to 8 bits for a pixel


@dataclass(frozen=True)
class Pair:
    """An image file and the file of its mask."""

    image: Path
    mask: Path


class MaskFolder:
    """The labelled images of a folder. DataError if anything in it cannot be used."""

    bright = None

    def __init__(self, folder: Path) -> None:
        try:
            pairs = _pairs(folder)
            names = _class_names(folder / "classes.txt")
        except OSError as error:
            raise DataError(f"--data {folder} cannot be read: {error}") from error
        used = dict(zip(pairs, _used_classes(pairs), strict=True))
        kept = round(HELD_OUT_SHARE * len(pairs)) or 1
        self.training, self.tested = pairs[:-kept], pairs[-kept:]
        learned = {pair: used[pair] for pair in self.training}
        _check_varied(learned)
        self.classes = names or _numbered(learned, folder)
        _check_known(used, self.classes, folder)
        self.name = f"{len(pairs)} images of {len(self.classes)} classes"

    def crop(self, position: int, seed: int, size: int) -> Labelled:
        """A square of `size` pixels: scaled, moved, flipped; IGNORED beyond the image."""
        epoch, index = divmod(position, len(self.training))
        order = np.random.default_rng((seed, 0, epoch)).permutation(len(self.training))
        random = np.random.default_rng((seed, 1, position))
        whole = _read(self.training[order[index]])
        side = max(1, round(size / np.exp(random.uniform(*np.log(SCALE)))))
        height, width = whole.labels.shape
        top, left = (int(random.integers(max(0, each - side) + 1)) for each in (height, width))
        missing = (0, max(0, side - width), 0, max(0, side - height))
        flipped = random.random() < 0.5

        def cut(maps: Tensor, beyond: int) -> Tensor:
            maps = maps[..., top : top + side, left : left + side]
            maps = F.pad(maps, missing, value=beyond)
            return maps.flip(-1) if flipped else maps

        image = F.interpolate(
            cut(whole.image, 0)[None], (size, size), mode="bilinear", antialias=True
        )
        labels = cut(whole.labels, IGNORED)[None, None].float()
        labels = F.interpolate(labels, (size, size), mode="nearest-exact").long()
        return Labelled(whole.name, image[0], labels[0, 0])

    def held_out(self) -> Iterator[Labelled]:
        """What cannot be read any more is left out with a warning: training is not lost for it."""
        for pair in self.tested:
            try:
                yield _read(pair)
            except DataError as error:
                print(f"warning: left out of the test: {error}", file=sys.stderr)


def _pairs(folder: Path) -> list[Pair]:
    """Every image with its mask, in the order of their names."""
    images, masks = folder / "images", folder / "masks"
    for subfolder in (images, masks):
        if not subfolder.is_dir():
            raise DataError(f"--data: there is no folder {subfolder}; it needs images/ and masks/")
    by_stem: dict[str, Path] = {}
    for path in sorted(images.iterdir()):
        if path.suffix.lower() not in SUFFIXES or path.name.startswith("."):
            continue
        if path.stem in by_stem:
            raise DataError(
                f"--data: {by_stem[path.stem]} and {path} have one mask: rename one of them"
            )
        by_stem[path.stem] = path
    pairs = [Pair(path, masks / f"{stem}.png") for stem, path in by_stem.items()]
    if without := [pair for pair in pairs if not pair.mask.is_file()]:
        raise DataError(
            f"--data: {without[0].image} has no mask {without[0].mask} ({len(without)} such): "
            "add it, or move the image away"
        )
    if len(pairs) < 2:
        raise DataError(
            f"--data: {images} has {len(pairs)} image{'s' * (len(pairs) != 1)} (of type "
            f"{', '.join(SUFFIXES)}), two at least are needed: one is held out to test on"
        )
    return pairs


def _class_names(path: Path) -> list[str]:
    """The lines of `path`; none if there is no such file."""
    if not path.exists():
        return []
    try:
        names = [line.strip() for line in path.read_text("utf-8").splitlines()]
    except UnicodeDecodeError as error:
        raise DataError(f"--data: {path} is no text in UTF-8: {error}") from error
    while names and not names[-1]:
        names.pop()
    if not (2 <= len(names) <= IGNORED and all(names)):
        raise DataError(
            f"--data: {path} must have a name in each line, for 2 to {IGNORED} classes, "
            f"got {len(names)} lines"
        )
    return names


def _used_classes(pairs: Sequence[Pair]) -> list[set[int]]:
    """The classes in each mask; DataError that names all pairs that cannot be used."""

    def try_out(pair: Pair) -> set[int] | str:
        try:
            return set(_read(pair).labels.unique().tolist()) - {IGNORED}
        except DataError as error:
            return str(error)

    with ThreadPoolExecutor() as pool:
        found = list(pool.map(try_out, pairs))
    reasons = [one for one in found if isinstance(one, str)]
    if reasons:
        more = [f"and {len(reasons) - NAMED} more"] if len(reasons) > NAMED else []
        lines = "\n  ".join([*reasons[:NAMED], *more])
        raise DataError(
            f"{len(reasons)} of {len(pairs)} images cannot be used, mend them or move them and "
            f"their masks away:\n  {lines}"
        )
    return [one for one in found if isinstance(one, set)]


def _numbered(learned: dict[Pair, set[int]], folder: Path) -> list[str]:
    """Names for the classes of the masks that are trained on, which must be 0, 1, 2, .."""
    used = set().union(*learned.values())
    count = max(used) + 1
    if missing := sorted(set(range(count)) - used):
        pair = next(pair for pair, classes in learned.items() if count - 1 in classes)
        raise DataError(
            f"--data: {pair.mask} has class {count - 1}, but no mask that is trained on has class "
            f"{missing[0]} ({len(missing)} such): count classes from 0 on, with {IGNORED} for what "
            f"is ignored, or name all of them in {folder / 'classes.txt'}"
        )
    return [f"class {index}" for index in range(count)]


def _check_known(used: dict[Pair, set[int]], classes: Sequence[str], folder: Path) -> None:
    for pair, found in used.items():
        if unknown := sorted(index for index in found if index >= len(classes)):
            raise DataError(
                f"--data: {pair.mask} has class {unknown[0]}, known are 0 .. {len(classes) - 1}, "
                f"from {folder / 'classes.txt'} or else from the masks that are trained on: mend "
                f"the mask ({IGNORED} is ignored), or name all classes there"
            )


def _check_varied(learned: dict[Pair, set[int]]) -> None:
    used = set().union(*learned.values())
    if len(used) < 2:
        found = f"class {min(used)} alone" if used else "no class"
        raise DataError(
            f"--data: {next(iter(learned)).mask} and all other masks that are trained on have "
            f"{found}, so there is nothing to tell apart: add images with other classes"
        )


def _read(pair: Pair) -> Labelled:
    """The image as RGB, upright, and its mask. DataError if one cannot be used."""
    image = torch.from_numpy(np.array(read_image(pair.image))).permute(2, 0, 1).float() / 255
    labels = _read_mask(pair.mask)
    if image.shape[1:] != labels.shape:
        (height, width), (image_height, image_width) = labels.shape, image.shape[1:]
        raise DataError(
            f"the mask {pair.mask} is of {width} x {height} pixels, its image {pair.image} of "
            f"{image_width} x {image_height}"
        )
    return Labelled(pair.image.stem, image, torch.from_numpy(labels).long())


@functools.lru_cache(maxsize=64)
def _read_mask(path: Path) -> np.ndarray:
    """[H, W] uint8."""
    try:
        with Image.open(path) as image:
            image.load()
    except Exception as error:  # Pillow raises whatever its readers of broken files come upon
        raise DataError(f"cannot read the mask {path}: {error or type(error).__name__}") from error
    if image.mode not in MODES:
        raise DataError(
            f"the mask {path} has pixels of mode {image.mode}, not one index of a class each: "
            "save it as a grey or palette PNG of 8 bits"
        )
    return np.array(image, np.uint8)
