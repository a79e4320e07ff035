"""A picture of what detectors found, beside what is there, and of how they were trained."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from average_precision import MASK_THRESHOLD
from chart import COLORS, MUTED, STYLE, draw_costs, draw_losses, machine
from detection_report import DetectorMeasurements
from detector_training import Settings
from files import written_whole
from scenes import Scene
from torch import Tensor

if TYPE_CHECKING:
    from matplotlib.axes import Axes

SHOWN = 3  # scenes at most
SCORE = 0.5  # of a detection that is drawn
SAME = 0.5  # IoU of two masks that show the same object
OPACITY = 0.45
# Of the objects: told apart side by side, on black and on white.
PALETTE = ("#ff7f0e", "#2ca7ff", "#3ecf5e", "#e754b5", "#ffd21f", "#22d3d3", "#a07bff")
MISTAKE = "#ffffff"


def draw_picture(
    path: Path,
    results: Sequence[DetectorMeasurements],
    scenes: Sequence[Scene],
    found: Sequence[Sequence[dict[str, Tensor]]],
    settings: Settings,
) -> bool:
    """Write the picture to `path`, whole or not at all; returns False without matplotlib.

    found: for each of `results`, what it found in each of `scenes`.
    """
    if importlib.util.find_spec("matplotlib") is None:
        return False
    import matplotlib
    from matplotlib.figure import Figure  # not pyplot: it looks for a display

    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(13, 7.2), dpi=160, facecolor="white")
        pictures, numbers = figure.add_gridspec(
            1, 2, width_ratios=(1.25, 1), wspace=0.1, left=0.02, right=0.98, top=0.82, bottom=0.08
        )
        grid = pictures.subgridspec(len(scenes), 1 + len(results), wspace=0.04, hspace=0.06)
        for row, scene in enumerate(scenes):
            axes = [figure.add_subplot(grid[row, column]) for column in range(1 + len(results))]
            _draw_truth(axes[0], scene)
            for one, one_axes in zip(found, axes[1:], strict=True):
                _draw_found(one_axes, scene, one[row])
            if row == 0:
                axes[0].set_title(f"What is there\n{_count(scenes)}")
                for one, one_axes in zip(results, axes[1:], strict=True):
                    precision = f"box AP {one.last.box:.2f}, mask AP {one.last.mask:.2f}"
                    title = f"Found, {one.blocks} blocks\n{precision}"
                    one_axes.set_title(title, color=COLORS[one.blocks])
        losses, costs = numbers.subgridspec(2, 1, height_ratios=(1.1, 1), hspace=0.3)
        draw_losses(figure, losses, results, [""] * len(results))
        draw_costs(figure, costs, results)
        figure.text(0.02, 0.945, _headline(results), size=15, weight="bold")
        figure.text(0.02, 0.9, _description(results, settings), color=MUTED)
        figure.text(0.02, 0.025, machine(settings.device), size=8, color=MUTED)
        with written_whole(path) as new:
            figure.savefig(new, format="png")
    return True


def _draw_truth(axes: Axes, scene: Scene) -> None:
    colors = [PALETTE[index % len(PALETTE)] for index in range(len(scene.masks))]
    kept = [index for index, ignored in enumerate(scene.ignored) if not ignored]
    boxes = scene.boxes()
    _draw(
        axes,
        scene.image,
        [(scene.masks[index].numpy(), boxes[index].tolist(), colors[index]) for index in kept],
    )


def _draw_found(axes: Axes, scene: Scene, found: dict[str, Tensor]) -> None:
    """An object in the colour that it has in the truth; what is none, in white."""
    objects = []
    for mask, box, score in zip(found["masks"], found["boxes"], found["scores"], strict=True):
        if score < SCORE:
            continue
        shown = mask[0] > MASK_THRESHOLD
        both = (scene.masks & shown).flatten(1).sum(1)
        overlaps = both / (scene.masks | shown).flatten(1).sum(1).clamp(min=1)
        best = int(overlaps.argmax()) if len(overlaps) else 0
        same = len(overlaps) and overlaps[best] >= SAME
        color = PALETTE[best % len(PALETTE)] if same else MISTAKE
        objects.append((shown.numpy(), box.tolist(), color))
    _draw(axes, scene.image, objects)


def _draw(
    axes: Axes, image: Tensor, objects: Sequence[tuple[np.ndarray, list[float], str]]
) -> None:
    """The image, and over it masks and boxes in their colours."""
    from matplotlib.colors import to_rgb
    from matplotlib.patches import Rectangle

    pixels = image.permute(1, 2, 0).numpy().copy()
    for mask, (left, top, right, bottom), color in objects:
        pixels[mask] = (1 - OPACITY) * pixels[mask] + OPACITY * np.array(to_rgb(color))
        corner = (left - 0.5, top - 0.5)  # pixel 0 is drawn from -0.5 to 0.5
        size = (right - left, bottom - top)
        axes.add_patch(Rectangle(corner, *size, fill=False, edgecolor=color, linewidth=1))
    axes.imshow(pixels, interpolation="nearest", vmin=0, vmax=1)
    axes.set_axis_off()
    axes.set_anchor("N")


def _count(scenes: Sequence[Scene]) -> str:
    count = sum(int((~scene.ignored).sum()) for scene in scenes)
    return f"{count} object{'s' * (count != 1)}"


def _headline(results: Sequence[DetectorMeasurements]) -> str:
    if len(results) == 1:
        return f"Objects found by Cascade Mask R-CNN on a MOAT, {results[0].blocks} blocks"
    stock, fused = results
    time = fused.median_seconds / stock.median_seconds
    saved = fused.saved_bytes / stock.saved_bytes
    return (
        f"Cascade Mask R-CNN on a MOAT, fused blocks: {time:.2f}× the step time, "
        f"{saved:.2f}× the bytes saved for backward"
    )


def _description(results: Sequence[DetectorMeasurements], settings: Settings) -> str:
    start = "random weights" if settings.checkpoint is None else Path(settings.checkpoint).name
    twice = ", trained twice, on the same batches" if len(results) == 2 else ""
    return (
        f"{settings.model} from {start}{twice}: {settings.steps} steps of {settings.batch_size} "
        f"crops of {settings.resolution} × {settings.resolution} px; held-out images, detections "
        f"of a score of {SCORE} and more"
    )
