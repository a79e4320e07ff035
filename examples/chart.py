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
from validation import best_of

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


def _seconds(value: float) -> str:
    return f"{value:.2f} s" if value >= 1 else f"{value * 1000:.0f} ms"


def _mebibytes(value: float) -> str:
    return f"{value / MEBIBYTE:.0f} MiB"


def _by_blocks(results: Sequence[Measurements], name: str) -> dict[str, float | None]:
    return {one.blocks: getattr(one, name) for one in results}


def draw_chart(path: Path, results: Sequence[ClassifierMeasurements], settings: Settings) -> bool:
    """Write the chart to `path`; returns False, and writes nothing, without matplotlib."""
    if importlib.util.find_spec("matplotlib") is None:
        return False
    import matplotlib
    from matplotlib.figure import Figure  # not pyplot: it looks for a display

    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(10, 5.6), dpi=160, facecolor="white")
        curves, costs = figure.add_gridspec(
            1, 2, width_ratios=(1.6, 1), wspace=0.17, left=0.06, right=0.98, top=0.81, bottom=0.12
        )
        _draw_curves(figure, curves, results)
        draw_costs(figure, costs, results)
        figure.text(0.02, 0.935, _headline(results, settings), size=15, weight="bold")
        figure.text(0.02, 0.885, _description(results, settings), color=MUTED)
        figure.text(0.02, 0.02, machine(settings.device, settings.amp), size=8, color=MUTED)
        with written_whole(path) as new:
            figure.savefig(new, format="png")
    return True


def draw_losses(
    figure: Figure, place: SubplotSpec, results: Sequence[Measurements], notes: Sequence[str]
) -> None:
    """The losses, and of two kinds of blocks their difference.

    notes: what else to say of each of `results`.
    """
    rows = place.subgridspec(len(results), 1, height_ratios=(3, 1)[: len(results)], hspace=0.42)
    axes = figure.add_subplot(rows[0])
    _draw_losses(axes, results, notes)
    axes.set_title("Training loss")
    _finish_steps(axes, results)
    if len(results) == 2:
        axes = figure.add_subplot(rows[1])
        _draw_differences(axes, results)
        _finish_steps(axes, results)
    axes.set_xlabel("step", color=MUTED)


def draw_costs(figure: Figure, place: SubplotSpec, results: Sequence[Measurements]) -> None:
    """Time and memory of a step, of two kinds of blocks side by side."""
    if len(results) == 2:
        time, saved, peak = (
            figure.add_subplot(row) for row in place.subgridspec(3, 1, hspace=0.75)
        )
        _draw_step_times(time, results)
        _draw_bars(saved, "Saved for the backward pass", _by_blocks(results, "saved_bytes"))
        _draw_bars(peak, "Peak memory of a step", _by_blocks(results, "peak_bytes"))
    else:
        time, memory = place.subgridspec(2, 1, height_ratios=(2, 1), hspace=0.45)
        _draw_times_of_all_steps(figure.add_subplot(time), results[0])
        _draw_memory(figure.add_subplot(memory), results[0])


def _draw_curves(
    figure: Figure, place: SubplotSpec, results: Sequence[ClassifierMeasurements]
) -> None:
    """Losses and, as far as there is any, accuracy and what tells the two kinds of blocks apart."""
    draw = {_draw_losses_and_tests: 3.0}
    if any(one.validations for one in results):
        draw[_draw_accuracies] = 1.5
    if len(results) == 2:
        draw[_draw_differences] = 1.0
    rows = place.subgridspec(len(draw), 1, height_ratios=tuple(draw.values()), hspace=0.45)
    for row, panel in zip(rows, draw, strict=True):
        axes = figure.add_subplot(row)
        panel(axes, results)
        _finish_steps(axes, results)
    axes.set_xlabel("step", color=MUTED)


def _draw_losses(axes: Axes, results: Sequence[Measurements], notes: Sequence[str]) -> None:
    """Fused as a thin line over a wide stock line, so that both are seen where they coincide."""
    for one, width in zip(results, _widths(results), strict=True):
        steps = range(1, len(one.losses) + 1)
        color = COLORS[one.blocks]
        axes.plot(steps, one.losses, color=color, linewidth=width, solid_capstyle="round")
    room = 0.4 if any(notes) else 0.26  # of the axes' width, for what is said of one
    for position, (one, note) in enumerate(reversed(list(zip(results, notes, strict=True)))):
        axes.annotate(
            f"{one.blocks} {one.first_loss:.2f} \N{RIGHTWARDS ARROW} {one.last_loss:.2f}{note}",
            (1 - room * position, 1),
            xytext=(0, 6),  # points above the axes: beside their title
            xycoords="axes fraction",
            textcoords="offset points",
            color=COLORS[one.blocks],
            horizontalalignment="right",
        )
    axes.set_ylim(bottom=0)


def _widths(results: Sequence[Measurements]) -> tuple[float, ...]:
    """Of the lines of each of `results`."""
    return (4.5, 1.5)[-len(results) :]


def _draw_losses_and_tests(axes: Axes, results: Sequence[ClassifierMeasurements]) -> None:
    """The losses of training as lines, those of what is held out as dots."""
    _draw_losses(axes, results, [""] * len(results))
    for one, width in zip(results, _widths(results), strict=True):
        tested = [(test.step, test.loss) for test in one.validations]
        axes.plot(
            *_columns(tested),
            "o",
            color=COLORS[one.blocks],
            markeredgecolor=INK,
            markersize=width + 3,
            clip_on=False,
        )
    losses = [loss for one in results for loss in one.losses]
    losses += [test.loss for one in results for test in one.validations]
    axes.set_ylim(0, 1.05 * max(losses))
    tested = any(one.validations for one in results)
    axes.set_title("Loss: training" + (", held out (dots)" if tested else ""))


def _draw_accuracies(axes: Axes, results: Sequence[ClassifierMeasurements]) -> None:
    """Top-1 of what is held out, each time that it was tested, and the best of it."""
    highest = 0.0
    for position, one in enumerate(results):
        if not one.validations:
            continue
        width = _widths(results)[position]
        tested = [(test.step, test.accuracy) for test in one.validations]
        color = COLORS[one.blocks]
        axes.plot(
            *_columns(tested),
            "o-",
            color=color,
            linewidth=width,
            markersize=width + 2,
            clip_on=False,
        )
        best = best_of(one.validations)
        highest = max(highest, best.accuracy)
        # Above what is drawn, the kinds of blocks beside each other.
        axes.annotate(
            f"{one.blocks} {one.validations[-1].accuracy:.0%}, best {best.accuracy:.0%}",
            (1 - 0.34 * (len(results) - 1 - position), 1),
            xytext=(0, 6),
            xycoords="axes fraction",
            textcoords="offset points",
            color=color,
            horizontalalignment="right",
        )
    axes.set_title("Top-1 of what is held out" if len(results) == 1 else "Top-1")
    axes.set_ylim(0, min(1.05, 1.25 * highest or 1))
    axes.locator_params(axis="y", nbins=3)
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")


def _draw_differences(axes: Axes, results: Sequence[Measurements]) -> None:
    differences = loss_differences(results)
    shown = [max(difference, SMALLEST_DIFFERENCE) for difference in differences]
    axes.plot(range(1, len(shown) + 1), shown, color=INK, linewidth=1.2)
    axes.set_yscale("log")
    first, largest = differences[0], max(differences)
    axes.set_title(f"Difference of the two losses: {first:.1g} at first, at most {largest:.1g}")


def _columns(pairs: Sequence[tuple[float, float]]) -> tuple[list[float], list[float]]:
    return [x for x, _ in pairs], [y for _, y in pairs]


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
        _by_blocks(results, "median_seconds"),
        _seconds,
        ends={blocks: high for blocks, (_, _, high) in quartiles.items()},
    )
    for position, (low, _, high) in enumerate(quartiles.values()):
        axes.plot((low, high), (position, position), color=INK, linewidth=1)


def _draw_times_of_all_steps(axes: Axes, one: Measurements) -> None:
    """Slow ones show a busy machine; the first ones build what later steps reuse."""
    steps = range(1, len(one.step_seconds) + 1)
    color = COLORS[one.blocks]
    axes.plot(steps, one.step_seconds, ".", color=color, markersize=4, clip_on=False)
    axes.axhline(one.median_seconds, color=INK, linewidth=1)
    axes.set_title(f"Time of each step, median {_seconds(one.median_seconds)}")
    axes.set_ylim(bottom=0)
    axes.yaxis.set_major_formatter(lambda value, _: _seconds(value))
    axes.locator_params(axis="y", nbins=4)
    axes.set_xlabel("step", color=MUTED)
    _finish_steps(axes, [one])


def _draw_memory(axes: Axes, one: Measurements) -> None:
    values = {"saved": one.saved_bytes, "peak": one.peak_bytes}
    colors = dict.fromkeys(values, COLORS[one.blocks])
    _draw_bars(axes, "Memory of a step (saved: for backward)", values, colors=colors)


def _draw_bars(
    axes: Axes,
    title: str,
    values: Mapping[str, float | None],
    form: Callable[[float], str] = _mebibytes,
    colors: Mapping[str, str] = COLORS,
    ends: Mapping[str, float] | None = None,
) -> None:
    """A bar and its number for each value; `ends`: numbers beyond there, not the bar."""
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
        tick.set_color(colors[tick.get_text()])
        tick.set_weight("bold")
    for position, name in enumerate(values):
        if name not in measured:
            axes.text(0, position, " not measured", verticalalignment="center", color=MUTED)
            continue
        axes.barh(position, measured[name], height=0.62, color=colors[name])
        text = form(measured[name])
        if name == "fused" and measured.get("stock"):
            text += f"  ({measured[name] / measured['stock']:.2f}×)"
        axes.text(ends[name] + largest * 0.03, position, text, verticalalignment="center")


def _headline(results: Sequence[ClassifierMeasurements], settings: Settings) -> str:
    if len(results) == 1:
        (one,) = results
        name = f"{settings.model}, {one.blocks} blocks"
        if one.accuracy is None:
            return f"{name}: loss {one.first_loss:.2f} \N{RIGHTWARDS ARROW} {one.last_loss:.2f}"
        return f"{name}: top-1 {one.accuracy:.0%} of {one.held_out} held out"
    stock, fused = results
    time = fused.median_seconds / stock.median_seconds
    saved = fused.saved_bytes / stock.saved_bytes
    return f"Fused blocks: {time:.2f}× the step time, {saved:.2f}× the bytes saved for backward"


def _description(results: Sequence[Measurements], settings: Settings) -> str:
    batch = (
        f"{settings.batch_size} crops of {settings.resolution} × {settings.resolution} px of "
        f"{len(settings.classes)} classes"
    )
    if len(results) == 2:
        return (
            f"{settings.model}, trained twice from the same weights on the same batches: {batch} "
            "a step"
        )
    start = " from pretrained weights" if settings.checkpoint else ""
    return f"trained{start} for {settings.steps} steps, each of {batch}"


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
