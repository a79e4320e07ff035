"""Images with a class for each pixel: what a segmentation model is trained and tested on."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from microscopy import OUTSIDE, Part, load_microscopy, random_crop
from torch import Tensor

from moat_kernels.variants import Preprocessing

IGNORED = 255  # the class of pixels that are neither learned nor tested


@dataclass(frozen=True)
class Labelled:
    """An image and what is in it.

    image: [3, H, W] float32, 0 to 1.
    labels: [H, W] int64, the index of a class or IGNORED.
    """

    name: str
    image: Tensor
    labels: Tensor


class LabelledImages(Protocol):
    """A source of labelled images.

    name: what they are, in words.
    classes: the names of the classes, in the order of their indices.
    bright: the index of the class that is brighter than the other one, if there are two such.
    """

    name: str
    classes: list[str]
    bright: int | None

    def crop(self, position: int, seed: int, size: int) -> Labelled:
        """The square crop of so many pixels that training sees at a position of the run."""

    def held_out(self) -> Iterator[Labelled]:
        """Whole images that training never sees."""


class Microscopy:
    """Nuclei under a microscope: a part of one image to train on, another to test on."""

    def __init__(self) -> None:
        self.name = "nuclei under a microscope"
        self.classes = ["background", "nucleus"]
        self.bright = 1
        self.training, self.tested = load_microscopy()

    def crop(self, position: int, seed: int, size: int) -> Labelled:
        return _labelled(random_crop(self.training, size, np.random.default_rng((seed, position))))

    def held_out(self) -> Iterator[Labelled]:
        yield _labelled(self.tested)


def _labelled(part: Part) -> Labelled:
    labels = np.where(part.instances == OUTSIDE, IGNORED, part.instances > 0)
    grey = torch.from_numpy(part.image).clamp(0, 1)
    return Labelled("microscopy", grey.expand(3, -1, -1), torch.from_numpy(labels.astype(np.int64)))


def training_batch(
    images: LabelledImages,
    *,
    seed: int,
    step: int,
    batch_size: int,
    size: int,
    preprocessing: Preprocessing,
) -> tuple[Tensor, Tensor]:
    """Images [B, 3, size, size], normalised, and labels [B, size, size] of one step.

    A function of its arguments alone, so that any step can be repeated.
    """
    crops = [
        images.crop(position, seed, size)
        for position in range(step * batch_size, (step + 1) * batch_size)
    ]
    return (
        normalized(torch.stack([crop.image for crop in crops]), preprocessing),
        torch.stack([crop.labels for crop in crops]),
    )


def normalized(images: Tensor, preprocessing: Preprocessing) -> Tensor:
    """[B, 3, H, W] of 0 to 1 as the models take it, in channels_last: the fastest."""
    mean = torch.tensor(preprocessing.mean)[:, None, None]
    std = torch.tensor(preprocessing.std)[:, None, None]
    return ((images - mean) / std).contiguous(memory_format=torch.channels_last)
