"""The chart of a training run: losses, step times and memory, as a PNG."""

from __future__ import annotations

import importlib.util
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from classifier_report import ClassifierMeasurements
from files import written_whole
from memory import MEBIBYTE
from report import Measurements, loss_differences
from training import Settings

from moat_kernels import info

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.gridspec import SubplotSpec

COLORS = {"stock": "#8d95a1", "fused": "#d9480f"}
INK, MUTED, FAINT = "#22262b", "#6b727c", "#e3e6ea"
STYLE = {
    "font.size": 10,
    "text.color": INK,
    "axes.edgecolor": FAINT,
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "ytick.minor.size": 0,
}
SMALLEST_DIFFERENCE = 1e-8  # losses that agree to the last bit are drawn here


def draw_chart(path: Path, results: Sequence[ClassifierMeasurements], settings: Settings) -> bool:
    """Write the chart to `path`; returns False, and writes nothing, without matplotlib."""
    if importlib.util.find_spec("matplotlib") is None:
        return False
    import matplotlib
    from matplotlib.figure import Figure  # not pyplot: it looks for a display

    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(10, 5), dpi=160, facecolor="white")
        losses, bars = figure.add_gridspec(
            1, 2, width_ratios=(1.6, 1), wspace=0.13, left=0.06, right=0.98, top=0.79, bottom=0.13
        )
        draw_losses(figure, losses, results, [_accuracy(one) for one in results])
        draw_costs(figure, bars, results)
        figure.text(0.02, 0.93, _headline(results), size=15, weight="bold")
        figure.text(0.02, 0.875, _description(results, settings), color=MUTED)
        figure.text(0.02, 0.025, machine(settings.device, settings.amp), size=8, color=MUTED)
        with written_whole(path) as new:
            figure.savefig(new, format="png")
    return True


def draw_losses(
    figure: Figure, place: SubplotSpec, results: Sequence[Measurements], notes: Sequence[str]
) -> None:
    """The losses, and of two kinds of blocks their difference.

    notes: what else to say of each of `results`.
    """
    if len(results) == 2:
        upper, lower = place.subgridspec(2, 1, height_ratios=(3, 1), hspace=0.42)
        _draw_losses(figure.add_subplot(upper), results, notes)
        _draw_differences(figure.add_subplot(lower), results)
    else:
        _draw_losses(figure.add_subplot(place), results, notes)


def draw_costs(figure: Figure, place: SubplotSpec, results: Sequence[Measurements]) -> None:
    """Time and memory of a step, as bars."""
    time, saved, peak = (figure.add_subplot(row) for row in place.subgridspec(3, 1, hspace=0.75))
    _draw_step_times(time, results)
    _draw_bars(
        saved,
        "Saved for the backward pass",
        {one.blocks: one.saved_bytes for one in results},
        _mebibytes,
    )
    _draw_bars(
        peak,
        "Peak memory of a step",
        {one.blocks: one.peak_bytes for one in results},
        _mebibytes,
    )


def _draw_losses(axes: Axes, results: Sequence[Measurements], notes: Sequence[str]) -> None:
    """Fused as a thin line over a wide stock line, so that both are seen where they coincide."""
    for one, width in zip(results, (4.5, 1.5)[-len(results) :], strict=True):
        steps = range(1, len(one.losses) + 1)
        axes.plot(
            steps, one.losses, color=COLORS[one.blocks], linewidth=width, solid_capstyle="round"
        )
    for position, (one, note) in enumerate(reversed(list(zip(results, notes, strict=True)))):
        axes.annotate(
            f"{one.blocks} {one.first_loss:.2f} \N{RIGHTWARDS ARROW} {one.last_loss:.2f}{note}",
            (1 - 0.4 * position, 1),
            xytext=(0, 6),  # points above the axes: beside their title
            xycoords="axes fraction",
            textcoords="offset points",
            color=COLORS[one.blocks],
            horizontalalignment="right",
        )
    axes.set_title("Training loss")
    axes.set_ylim(bottom=0)
    _finish_steps(axes, results)


def _draw_differences(axes: Axes, results: Sequence[Measurements]) -> None:
    differences = loss_differences(results)
    shown = [max(difference, SMALLEST_DIFFERENCE) for difference in differences]
    axes.plot(range(1, len(shown) + 1), shown, color=INK, linewidth=1.2)
    axes.set_yscale("log")
    first, largest = differences[0], max(differences)
    axes.set_title(f"Difference of the two losses: {first:.1g} at first, at most {largest:.1g}")
    axes.set_xlabel("step", color=MUTED)
    _finish_steps(axes, results)


def _finish_steps(axes: Axes, results: Sequence[Measurements]) -> None:
    axes.set_xlim(1, max(2, len(results[0].losses)))
    axes.grid(axis="y", color=FAINT, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines["left"].set_visible(False)


def _draw_step_times(axes: Axes, results: Sequence[Measurements]) -> None:
    """The medians as bars, with the middle half of the steps as a line across the end."""
    quartiles = {
        one.blocks: statistics.quantiles(one.step_seconds, n=4)
        for one in results
        if len(one.step_seconds) >= 4
    }
    _draw_bars(
        axes,
        "Time of a step, median" + (" (line: middle half)" if quartiles else ""),
        {one.blocks: one.median_seconds for one in results},
        _seconds,
        ends={blocks: high for blocks, (_, _, high) in quartiles.items()},
    )
    for position, (low, _, high) in enumerate(quartiles.values()):
        axes.plot((low, high), (position, position), color=INK, linewidth=1)


def _draw_bars(
    axes: Axes,
    title: str,
    values: Mapping[str, float | None],
    form: Callable[[float], str],
    ends: Mapping[str, float] | None = None,
) -> None:
    """A bar and its number for each kind of blocks; `ends`: numbers beyond there, not the bar."""
    measured = {name: value for name, value in values.items() if value is not None}
    ends = {**measured, **(ends or {})}
    largest = max(ends.values(), default=1.0)
    axes.set_title(title)
    axes.set_yticks(range(len(values)), list(values))
    axes.set_ylim(len(values) - 0.4, -0.6)
    axes.set_xticks([])
    axes.set_xlim(0, largest * 1.5)  # leaves room for the numbers
    axes.spines["bottom"].set_visible(False)
    for tick in axes.get_yticklabels():
        tick.set_color(COLORS[tick.get_text()])
        tick.set_weight("bold")
    for position, name in enumerate(values):
        if name not in measured:
            axes.text(0, position, " not measured", verticalalignment="center", color=MUTED)
            continue
        axes.barh(position, measured[name], height=0.62, color=COLORS[name])
        text = form(measured[name])
        if position and len(measured) == 2:
            text += f"  ({measured[name] / measured['stock']:.2f}×)"
        axes.text(ends[name] + largest * 0.03, position, text, verticalalignment="center")


def _accuracy(one: ClassifierMeasurements) -> str:
    return "" if one.accuracy is None else f", top-1 {one.accuracy:.0%}"


def _headline(results: Sequence[Measurements]) -> str:
    if len(results) == 1:
        return f"A MOAT in training, {results[0].blocks} blocks"
    stock, fused = results
    time = fused.median_seconds / stock.median_seconds
    saved = fused.saved_bytes / stock.saved_bytes
    return f"Fused blocks: {time:.2f}× the step time, {saved:.2f}× the bytes saved for backward"


def _description(results: Sequence[Measurements], settings: Settings) -> str:
    twice = ", trained twice from the same weights on the same batches" if len(results) == 2 else ""
    return (
        f"{settings.model}{twice}: {settings.batch_size} crops of {settings.resolution} × "
        f"{settings.resolution} px of {len(settings.classes)} classes a step"
    )


def machine(device: str, amp: bool = False) -> str:
    """What the numbers were measured on."""
    facts = info.collect()
    versions = (
        f"torch {facts['versions']['torch']}, moat_kernels {facts['versions']['moat_kernels']}"
    )
    precision = "bfloat16 autocast" if amp else "float32"
    if device == "cuda":
        return f"{facts['gpus'][0]['name']}, {precision}, {versions}"
    threads = facts["cpu"]["threads"]
    cpu = f"{facts['cpu']['name']}, {threads} thread{'s' if threads > 1 else ''}"
    return f"{cpu}, {precision}, {versions}"


def _seconds(value: float) -> str:
    return f"{value:.2f} s" if value >= 1 else f"{value * 1000:.0f} ms"


def _mebibytes(value: float) -> str:
    return f"{value / MEBIBYTE:.0f} MiB"
