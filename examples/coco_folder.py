"""A folder of one's own images with objects annotated in COCO's format.

    FOLDER/images/           the image files
    FOLDER/annotations.json  images, categories and annotations, as in COCO's instances_*.json

The last fifth of the images, in the order of their names, is held out.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from coco_annotations import ANNOTATIONS, Picture, read_annotations
from photographs import DataError, read_image
from PIL import Image
from pycocotools import mask as run_lengths
from scenes import Scene
from torch import Tensor

HELD_OUT_SHARE = 0.2  # of the images
SCALE = (0.8, 1.25)  # of random crops


class CocoFolder:
    """The scenes of a folder. Raises DataError if there is anything in it that cannot be used."""

    def __init__(self, folder: Path) -> None:
        self.classes, pictures = read_annotations(folder)
        self.name = f"{len(pictures)} images with objects of {len(self.classes)} classes"
        if len(pictures) < 2:
            raise DataError(
                f"--data: {folder / ANNOTATIONS} lists {len(pictures)} image"
                f"{'s' * (len(pictures) != 1)}, two at least are needed: one is held out to test on"
            )
        kept = round(HELD_OUT_SHARE * len(pictures)) or 1
        self.training, self.tested = pictures[:-kept], pictures[-kept:]
        for use, part in (("trained", self.training), ("tested", self.tested)):
            if all(each.crowd for picture in part for each in picture.objects):
                raise DataError(
                    f"--data: {folder / ANNOTATIONS} has no object in any image that is {use} on, "
                    f"{part[0].path.name} .. {part[-1].path.name} in the order of their names: "
                    "annotate some, or rename images"
                )

    def crop(self, position: int, seed: int, size: int) -> Scene:
        """A square of `size` pixels: scaled, moved, flipped; black beyond the image."""
        epoch, index = divmod(position, len(self.training))
        order = np.random.default_rng((seed, 0, epoch)).permutation(len(self.training))
        random = np.random.default_rng((seed, 1, position))
        scene = scene_of(self.training[order[index]], random.uniform(*SCALE))
        height, width = scene.image.shape[1:]
        top, left = (int(random.integers(max(0, side - size) + 1)) for side in (height, width))
        missing = (0, max(0, size - width), 0, max(0, size - height))
        flipped = random.random() < 0.5

        def cut(maps: Tensor) -> Tensor:
            maps = F.pad(maps, missing)[:, top : top + size, left : left + size]
            return maps.flip(2) if flipped else maps

        return Scene(cut(scene.image), cut(scene.masks), scene.labels, scene.ignored)

    def held_out(self) -> Iterator[Scene]:
        """What cannot be read any more is left out with a warning: training is not lost for it."""
        for picture in self.tested:
            try:
                yield scene_of(picture)
            except DataError as error:
                print(f"warning: left out of the test: {error}", file=sys.stderr)


def scene_of(picture: Picture, scale: float = 1.0) -> Scene:
    """The image and its objects, scaled."""
    size = (max(1, round(scale * picture.width)), max(1, round(scale * picture.height)))
    image = read_image(picture.path).resize(size, Image.Resampling.BICUBIC)
    masks = np.zeros((len(picture.objects), *reversed(size)), bool)
    for mask, each in zip(masks, picture.objects, strict=True):
        whole = Image.fromarray(run_lengths.decode(each.mask))
        mask[:] = np.asarray(whole.resize(size, Image.Resampling.NEAREST))
    return Scene(
        torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255,
        torch.from_numpy(masks),
        torch.tensor([each.label for each in picture.objects], dtype=torch.int64),
        torch.tensor([each.crowd for each in picture.objects], dtype=torch.bool),
    )
