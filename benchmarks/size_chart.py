"""The chart of what a pixel costs at each size of image, from the groups of bench_sizes.py."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from charts import DARK, GREY, LIGHT, save, title
from results import Groups, describe

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_LINES = {
    "stock channels_last": ("stock, channels_last", GREY, "-"),
    "torch.compile": ("stock, torch.compile", GREY, "--"),
    "cpu": ("fused", LIGHT, "-"),
    "cpu auto": ("fused", LIGHT, "-"),
    "cpu frozen": ("frozen", DARK, "-"),
    "cpu frozen bfloat16": ("frozen, bfloat16", DARK, "--"),
}
_GIBIBYTE = 2**30


def charted_sizes(groups: Groups) -> Groups:
    """The groups that `draw_sizes` draws, in its order."""
    return {name: groups[name] for name in sorted(groups) if name.startswith("sizes ")}


def draw_sizes(groups: Groups, facts: dict[str, Any], path: Path) -> None:
    """Time per megapixel over the side of the images; of training its peak memory too."""
    from matplotlib.figure import Figure  # not pyplot: it looks for a display

    variants = sorted({name.split()[2] for name in groups}, reverse=True)
    figure = Figure(figsize=(12, 0.6 + 3.4 * len(variants)))
    axes = figure.subplots(len(variants), 3, squeeze=False)
    for (eval_axis, training_axis, peak_axis), variant in zip(axes, variants, strict=True):
        inference = groups.get(f"sizes eval {variant}", {})
        training = groups.get(f"sizes training {variant}", {})
        _draw_lines(eval_axis, inference, "ms_per_megapixel", 1e-3)
        title(eval_axis, f"{variant}, inference, s per megapixel")
        _draw_lines(training_axis, training, "ms_per_megapixel", 1e-3)
        title(training_axis, f"{variant}, training step, s per megapixel")
        _draw_lines(peak_axis, training, "peak_bytes", 1 / _GIBIBYTE)
        title(peak_axis, f"{variant}, peak of a training step, GiB")
    save(figure, describe(facts), path)


def _draw_lines(axis: Axes, rows: dict[str, dict], key: str, unit: float) -> None:
    """A line for each kind of row called "kind, 641 px", labelled at its end."""
    points: dict[str, list[tuple[int, float]]] = {}
    for name, info in rows.items():
        kind, _, size = name.partition(", ")
        if key in info:
            points.setdefault(kind, []).append((int(size.split()[0]), info[key] * unit))
    for kind, measured in points.items():
        label, colour, style = _LINES[kind]
        sides, values = zip(*sorted(measured), strict=True)
        axis.plot(sides, values, style, color=colour, marker="o", markersize=4, label=label)
        axis.set_xticks(sides, [f"{side} px" for side in sides])
    axis.set_ylim(bottom=0)
    axis.spines[["top", "right"]].set_visible(False)
    if points:
        axis.legend(frameon=False, fontsize=8)
