"""Images with the objects in them: what a detector is trained and tested on."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from microscopy import OUTSIDE, Part, load_microscopy, random_crop
from torch import Tensor

SMALLEST = 12  # pixels of an object's mask in a crop; what shows less of it cannot be learned


@dataclass(frozen=True)
class Scene:
    """An image and its objects.

    image: [3, H, W] float32, 0 to 1.
    masks: [N, H, W] bool, one for each object.
    labels: [N] int64, from 1; 0 is the background.
    ignored: [N] bool: not to be learned, and no mistake whether found or not.
    """

    image: Tensor
    masks: Tensor
    labels: Tensor
    ignored: Tensor

    def boxes(self) -> Tensor:
        """[N, 4] float32: left, top, right and bottom edges of the objects, in pixels."""
        return torch.stack([_box(mask) for mask in self.masks]) if len(self.masks) else _NO_BOXES

    def target(self) -> dict[str, Tensor]:
        """The objects as torchvision's detectors take them."""
        return {"boxes": self.boxes(), "labels": self.labels, "masks": self.masks.byte()}

    def learnable(self) -> Scene:
        """Without ignored objects, and without those of which too little is seen."""
        kept = ~self.ignored & (self.masks.flatten(1).sum(1) >= SMALLEST)
        return Scene(self.image, self.masks[kept], self.labels[kept], self.ignored[kept])


class Scenes(Protocol):
    """A source of scenes, each of its objects of one of `classes`; that of label 1 is the first.

    name: what they show, for people.
    """

    name: str
    classes: list[str]

    def crop(self, position: int, seed: int, size: int) -> Scene:
        """The square crop of so many pixels that training sees at a position of the run."""

    def held_out(self) -> Iterator[Scene]:
        """Whole scenes that training never sees."""


class Microscopy:
    """Nuclei under a microscope: a part of one image to train on, another to test on."""

    def __init__(self) -> None:
        self.name, self.classes = "nuclei under a microscope", ["nucleus"]
        self.training, self.tested = load_microscopy()

    def crop(self, position: int, seed: int, size: int) -> Scene:
        return scene_of(random_crop(self.training, size, np.random.default_rng((seed, position))))

    def held_out(self) -> Iterator[Scene]:
        yield scene_of(self.tested)


def scene_of(part: Part) -> Scene:
    """Every nucleus an object; what belongs to another part's nuclei is one that is ignored."""
    numbers = [number for number in np.unique(part.instances) if number]
    masks = [torch.from_numpy(part.instances == number) for number in numbers]
    return Scene(
        torch.from_numpy(part.image).clamp(0, 1).expand(3, -1, -1),
        torch.stack(masks) if masks else torch.zeros(0, *part.instances.shape, dtype=torch.bool),
        torch.ones(len(numbers), dtype=torch.int64),
        torch.tensor([number == OUTSIDE for number in numbers], dtype=torch.bool),
    )


def training_batch(
    scenes: Scenes, *, seed: int, step: int, batch_size: int, size: int
) -> tuple[list[Tensor], list[dict[str, Tensor]]]:
    """Images and targets of one step: a function of its arguments alone."""
    positions = range(step * batch_size, (step + 1) * batch_size)
    crops = [scenes.crop(position, seed, size).learnable() for position in positions]
    return [crop.image for crop in crops], [crop.target() for crop in crops]


_NO_BOXES = torch.zeros(0, 4)


def _box(mask: Tensor) -> Tensor:
    rows, columns = mask.any(1).nonzero(), mask.any(0).nonzero()
    edges = (columns[0], rows[0], columns[-1] + 1, rows[-1] + 1)
    return torch.cat(edges).float()
