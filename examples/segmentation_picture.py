"""A picture of what a model sees in held-out images, where it errs, and how it was trained."""

from __future__ import annotations

import importlib.util
import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from chart import MUTED, STYLE, draw_costs, draw_losses, machine
from files import written_whole
from labelled_images import IGNORED, Labelled, LabelledImages
from segmentation_scores import Scores, SegmentationMeasurements
from segmentation_training import Trainer
from torch import Tensor
from training import Settings

if TYPE_CHECKING:
    from matplotlib.axes import Axes

SHOWN = 2  # images at most
OPACITY = 0.5
# Of class 1, 2, ..; class 0 is left as it is.
PALETTE = ("#2ca7ff", "#ff7f0e", "#3ecf5e", "#e754b5", "#ffd21f", "#22d3d3", "#a07bff")
OUTLINE = "#ffd21f"
MISSED, MISTAKEN = "#ff4b3a", "#35c8ff"  # class 0 in place of another, and all other errors


def draw_picture(
    path: Path,
    results: Sequence[SegmentationMeasurements],
    trainers: Sequence[Trainer],
    images: LabelledImages,
) -> bool:
    """Write the picture to `path`, whole or not at all; returns False without matplotlib.

    Shows what the last of `trainers` makes of the first held-out images.
    """
    if importlib.util.find_spec("matplotlib") is None:
        return False
    import matplotlib
    from matplotlib.figure import Figure  # not pyplot: it looks for a display

    trainer, settings = trainers[-1], trainers[-1].settings
    shown = list(itertools.islice(images.held_out(), SHOWN))
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(13, 7.4), dpi=160, facecolor="white")
        pictures, numbers = figure.add_gridspec(
            1, 2, width_ratios=(1.25, 1), wspace=0.12, left=0.02, right=0.98, top=0.8, bottom=0.08
        )
        grid = pictures.subgridspec(max(1, len(shown)), 3, wspace=0.04, hspace=0.06)
        for row, one in enumerate(shown):
            found = trainer.segment(one.image).numpy()
            axes = [figure.add_subplot(grid[row, column]) for column in range(3)]
            _draw_truth(axes[0], one)
            _draw_found(axes[1], one, found)
            _draw_errors(axes[2], one, found)
            if row == 0:
                axes[0].set_title("What is there\n(outlines)")
                axes[1].set_title(f"Found, {trainer.blocks} blocks\n{_quality(results[-1])}")
                _title_errors(axes[2])
        losses, costs = numbers.subgridspec(2, 1, height_ratios=(1.1, 1), hspace=0.3)
        draw_losses(figure, losses, results, [""] * len(results))
        draw_costs(figure, costs, results)
        figure.text(0.02, 0.95, _headline(results), size=15, weight="bold")
        figure.text(0.02, 0.915, _description(results, settings, images), color=MUTED)
        figure.text(0.02, 0.885, _quality_in_words(results[-1], settings.classes), color=MUTED)
        figure.text(0.02, 0.025, machine(settings.device, settings.amp), size=8, color=MUTED)
        with written_whole(path) as new:
            figure.savefig(new, format="png")
    return True


def _draw_truth(axes: Axes, one: Labelled) -> None:
    _draw(axes, _pixels(one.image))
    labels = one.labels.numpy()
    for index in np.unique(labels):
        if index not in (0, IGNORED):
            axes.contour(labels == index, levels=[0.5], colors=_color(index), linewidths=0.9)


def _draw_found(axes: Axes, one: Labelled, found: np.ndarray) -> None:
    from matplotlib.colors import to_rgb

    pixels = _pixels(one.image)
    for index in np.unique(found[found > 0]):
        here = found == index
        pixels[here] = (1 - OPACITY) * pixels[here] + OPACITY * np.array(to_rgb(_color(index)))
    _draw(axes, pixels)


def _draw_errors(axes: Axes, one: Labelled, found: np.ndarray) -> None:
    """The image in grey, and over it what is wrong."""
    from matplotlib.colors import to_rgb

    labels = one.labels.numpy()
    pixels = _pixels(one.image).mean(2, keepdims=True).repeat(3, 2)
    wrong = (found != labels) & (labels != IGNORED)
    pixels[wrong & (found == 0)] = to_rgb(MISSED)
    pixels[wrong & (found != 0)] = to_rgb(MISTAKEN)
    _draw(axes, pixels)


def _title_errors(axes: Axes) -> None:
    """A title of two lines, the second in the colours of the errors."""
    axes.set_title("Errors\n")
    place, before, offset = (0, 1), "axes fraction", (0, 6)
    for text, color in (("missed ", MISSED), ("mistaken", MISTAKEN)):
        before = axes.annotate(
            text,
            place,
            xycoords=before,
            xytext=offset,
            textcoords="offset points",
            verticalalignment="bottom",
            weight="bold",
            color=color,
        )
        place, offset = (1, 0), (0, 0)


def _draw(axes: Axes, pixels: np.ndarray) -> None:
    axes.imshow(pixels, interpolation="nearest", vmin=0, vmax=1)
    axes.set_axis_off()
    axes.set_anchor("N")


def _pixels(image: Tensor) -> np.ndarray:
    """[H, W, 3]"""
    return image.permute(1, 2, 0).numpy().copy()


def _color(index: int) -> str:
    return PALETTE[(index - 1) % len(PALETTE)]


def _headline(results: Sequence[SegmentationMeasurements]) -> str:
    if len(results) == 1:
        return f"Each pixel's class by DeepLabv3+ on a MOAT, {results[0].blocks} blocks"
    stock, fused = results
    time = fused.median_seconds / stock.median_seconds
    saved = fused.saved_bytes / stock.saved_bytes
    return (
        f"DeepLabv3+ on a MOAT, fused blocks: {time:.2f}× the step time, "
        f"{saved:.2f}× the bytes saved for backward"
    )


def _quality(one: SegmentationMeasurements) -> str:
    return f"mean IoU {one.last.mean_iou:.3f}" if one.last else ""


def _quality_in_words(one: SegmentationMeasurements, classes: Sequence[str]) -> str:
    """Of the model, and of brightness alone where that was tested."""
    if one.last is None:
        return ""
    text = f"held out: {_in_words(one.last, classes)}"
    if one.baseline:
        text += f"; by Otsu's threshold {_in_words(one.baseline, classes)}"
    return text


def _in_words(scores: Scores, classes: Sequence[str]) -> str:
    text = f"mean IoU {scores.mean_iou:.3f}"
    if len(classes) > 2 or scores.iou[1] is None:
        return text
    return f"{text} ({classes[1]} {scores.iou[1]:.3f})"


def _description(
    results: Sequence[SegmentationMeasurements], settings: Settings, images: LabelledImages
) -> str:
    start = "random weights" if settings.checkpoint is None else Path(settings.checkpoint).name
    twice = ", trained twice, on the same batches" if len(results) == 2 else ""
    return (
        f"{settings.model} from {start}{twice}: {settings.steps} steps of {settings.batch_size} "
        f"crops of {settings.resolution} × {settings.resolution} px; {images.name}"
    )
