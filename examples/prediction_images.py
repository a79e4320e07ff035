"""A folder of images, decoded in threads ahead of the model, as the model takes them."""

from __future__ import annotations

import itertools
import math
import os
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from photographs import SUFFIXES, DataError, decode_image, files_below
from PIL import Image
from torch import Tensor

from moat_kernels.variants import Preprocessing

State = tuple[int, int]  # size in bytes and time of the last change: what tells files apart
AHEAD = 2  # batches that are decoded, at least, while the model computes one
# Pillow's own limit for what it opens.
MAXIMUM_PIXELS = 2 * (Image.MAX_IMAGE_PIXELS or 0)


@dataclass(frozen=True)
class Decoded:
    """An image by its path in the folder: pixels [3, H, W] in uint8, or why there are none."""

    name: str
    state: State
    pixels: Tensor | None = None
    error: str = ""


def image_names(folder: Path) -> list[str]:
    """The paths of all images in `folder` and below, relative to it, sorted. DataError if none."""
    try:
        if not folder.is_dir():
            raise DataError(f"--images {folder} is not a folder")
        names = [
            path.relative_to(folder).as_posix()
            for path in files_below(folder)
            if path.suffix.lower() in SUFFIXES
        ]
    except OSError as error:
        raise DataError(f"--images {folder} cannot be read: {error}") from error
    if not names:
        raise DataError(f"--images {folder} has no images (of type {', '.join(SUFFIXES)})")
    return sorted(names)


def state_of(path: Path) -> State:
    """Size and time of change; OSError if there is no such file."""
    status = os.stat(path)
    return status.st_size, status.st_mtime_ns


def decoded_batches(
    folder: Path, batches: Sequence[Sequence[str]], preprocessing: Preprocessing, workers: int
) -> Iterator[list[Decoded]]:
    """The images of each batch, in order.

    As many are decoded ahead as keep all workers busy, no more: memory does not grow with the
    number of images.
    """
    ahead = AHEAD + math.ceil(2 * workers / max(map(len, batches), default=1))
    pool = ThreadPoolExecutor(workers)
    waiting: deque[list[Future[Decoded]]] = deque()
    following = iter(batches)
    try:
        while True:
            for names in itertools.islice(following, ahead - len(waiting)):
                waiting.append([pool.submit(_decode, folder, one, preprocessing) for one in names])
            if not waiting:
                return
            yield [future.result() for future in waiting.popleft()]
    finally:
        pool.shutdown(cancel_futures=True)


def _decode(folder: Path, name: str, preprocessing: Preprocessing) -> Decoded:
    path = folder / name
    state = (0, 0)
    try:
        state = state_of(path)  # before it is read: one that changes meanwhile is read again
        return Decoded(name, state, prepared(decode_image(path), preprocessing))
    except FileNotFoundError:
        return Decoded(name, state, error="it was deleted meanwhile")
    except (DataError, OSError, MemoryError) as error:
        reason = str(error) or type(error).__name__
        return Decoded(name, state, error=reason.removeprefix(f"cannot read the image {path}: "))


def prepared(image: Image.Image, preprocessing: Preprocessing) -> Tensor:
    """[3, resolution, resolution] in uint8: cut and resized, colours in the order of the weights.

    crop_mode "center" takes the middle square, `crop_pct` of the shorter side; "border" the whole
    image, on a white square. DataError where that square would be too large.
    """
    resample = Image.Resampling[preprocessing.interpolation.upper()]
    size = (preprocessing.resolution,) * 2
    if preprocessing.crop_mode == "border":
        resized = _on_white_square(image).resize(size, resample)
    else:
        side = preprocessing.crop_pct * min(image.size)
        left, top = (image.width - side) / 2, (image.height - side) / 2
        resized = image.resize(size, resample, box=(left, top, left + side, top + side))
    pixels = torch.from_numpy(np.array(resized)).permute(2, 0, 1)
    return pixels.flip(0) if preprocessing.channel_order == "bgr" else pixels


def _on_white_square(image: Image.Image) -> Image.Image:
    side = max(image.size)
    if side * side > MAXIMUM_PIXELS:
        raise DataError(
            f"{image.width} x {image.height} pixels on a square of {side} x {side} would be more "
            f"than the {MAXIMUM_PIXELS} pixels that Pillow allows"
        )
    square = Image.new("RGB", (side, side), "white")
    square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return square
