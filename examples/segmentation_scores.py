"""How well pixels are told apart: intersection over union (IoU) of each class, and accuracy."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from labelled_images import IGNORED
from report import Measurements, Values
from torch import Tensor


@dataclass(frozen=True)
class Scores:
    """iou: of each class, None of those that are neither there nor found; all are 0 to 1."""

    iou: list[float | None]
    accuracy: float  # the share of pixels of the right class

    @property
    def mean_iou(self) -> float:
        known = [one for one in self.iou if one is not None]
        return sum(known) / len(known)


class Confusion:
    """Counts pixels by what they are and what they are taken for."""

    def __init__(self, classes: int) -> None:
        self.counts = torch.zeros(classes, classes, dtype=torch.int64)  # [truth, found]

    def add(self, found: Tensor, labels: Tensor) -> None:
        """Both [H, W] int64; pixels whose label is IGNORED do not count."""
        classes, counted = len(self.counts), labels != IGNORED
        index = labels[counted] * classes + found[counted]
        self.counts += torch.bincount(index, minlength=classes**2).view(classes, classes)

    def scores(self) -> Scores | None:
        """None if no pixel was counted."""
        if not (total := int(self.counts.sum())):
            return None
        right = self.counts.diag()
        either = self.counts.sum(0) + self.counts.sum(1) - right
        iou = [
            one / all_of_it if all_of_it else None
            for one, all_of_it in zip(right.tolist(), either.tolist(), strict=True)
        ]
        return Scores(iou, int(right.sum()) / total)


@dataclass(frozen=True, kw_only=True)
class SegmentationMeasurements(Measurements):
    """scores: of what was held out, by the number of steps done, the end included.

    baseline: scores of Otsu's threshold, if brightness can tell the classes apart.
    """

    scores: dict[int, Scores]
    baseline: Scores | None

    @property
    def last(self) -> Scores | None:
        return self.scores.get(len(self.losses))


def best_step(scores: dict[int, Scores]) -> int:
    """After how many steps the mean IoU was highest."""
    return max(scores, key=lambda step: scores[step].mean_iou)


def score_rows(classes: Sequence[str], shown: int = 20) -> list[Values]:
    """For report.format_table: of the first `shown` classes each has a row."""

    def of(value):
        return lambda one: None if one.last is None else value(one.last)

    def best(one: SegmentationMeasurements) -> str | None:
        if not one.scores:
            return None
        step = best_step(one.scores)
        return f"{one.scores[step].mean_iou:.3f} ({step})"

    return [
        ("mean IoU, held out", of(lambda one: one.mean_iou), "{:.3f}".format),
        *(
            (f"IoU of {name}"[:27], of(lambda one, index=index: one.iou[index]), "{:.3f}".format)
            for index, name in enumerate(classes[:shown])
        ),
        ("pixel accuracy", of(lambda one: one.accuracy), "{:.1%}".format),
        ("best mean IoU (after step)", best, str),
    ]


def otsu(image: Tensor, bright: int) -> Tensor | None:
    """Classes by brightness alone, [3, H, W] -> [H, W]: what Otsu's threshold makes of an image.

    bright: the index of the class that is brighter than the other; None without scikit-image.
    """
    try:
        from skimage.filters import threshold_otsu
    except ImportError:
        return None
    grey = image.mean(0).numpy()
    return torch.from_numpy(np.where(grey > threshold_otsu(grey), bright, 1 - bright))
