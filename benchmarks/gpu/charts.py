"""The charts beside docs/gpu_results.md."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.charts import DARK, GREY, LIGHT, draw_bars, save, title, title_beside
from benchmarks.gpu import losses
from benchmarks.gpu.comparison import expected, measured
from benchmarks.gpu.findings import Card
from benchmarks.gpu.headline import FUSED
from benchmarks.gpu.journal import Row
from benchmarks.gpu.kernels import PROFILED

if TYPE_CHECKING:
    from matplotlib.axes import Axes

OWN_KERNELS = 16  # that a chart shows
KIND_COLOURS = {
    losses.OURS: DARK,
    "attention": "#f0a67f",
    "layer norm": "#f6cfb8",
    "batch norm": "#5c7cad",
    "depthwise convolutions": "#7f9bc4",
    "products, convolutions": "#a9bedb",
    "elementwise": "#6f9e8a",
    "copies, casts": "#9cc0b0",
    "reductions": "#c8ddd3",
    "optimiser": "#c9b458",
    "others": "#8b929e",
    losses.UNLISTED: "#c3c8d0",
}
# {"workload": rows by contender, None: without a number}, of a card.
Bars = dict[str, dict[str, Row | None]]


def draw(cards: Sequence[Card], folder: Path) -> dict[str, Path | None]:
    """The path of each chart by what it shows; None where nothing of it was measured."""
    return {
        "training": _draw_training(cards, folder / "gpu_training.png"),
        "inference": _draw_inference(cards, folder / "gpu_inference.png"),
        "kernels of a training step": _draw_kernels(cards, folder / "gpu_kernels.png"),
    }


def _bars(cards: Sequence[Card], mode: str) -> Bars:
    """The workloads of a mode that were measured, with the card's name where there are several."""
    found: Bars = {}
    for card in cards:
        for workload, contenders in expected(card.is_rehearsal).items():
            rows = {
                row["contender"]: row for row in measured(card, workload, contenders, "headline")
            }
            if workload.endswith(mode) and rows:
                name = workload.removesuffix(f", {mode}")
                name = f"{name}\n{card.name}" if len(cards) > 1 else name
                found[name] = {contender: rows.get(contender) for contender in contenders}
    return found


def _draw_training(cards: Sequence[Card], path: Path) -> Path | None:
    """Time and peak memory of a step, for each workload."""
    groups = _bars(cards, "training")
    if not groups:
        return None
    from matplotlib.figure import Figure  # not pyplot: it looks for a display

    count = sum(map(len, groups.values()))
    figure = Figure(figsize=(11, 0.5 + 1.1 * len(groups) + 0.3 * count))
    heights = [len(contenders) + 1 for contenders in groups.values()]
    axes = figure.subplots(len(groups), 2, squeeze=False, height_ratios=heights)
    for (times, peaks), (name, contenders) in zip(axes, groups.items(), strict=True):
        _draw_contenders(times, contenders, "ms", "{:.1f} ms")
        _draw_contenders(peaks, contenders, "peak, GiB", "{:.1f} GiB")
        peaks.set_yticklabels([])
        title(times, "time of a training step")
        title(peaks, "peak of a step")
        title_beside(times, name)
    save(figure, _note(cards), path)
    return path


def _draw_inference(cards: Sequence[Card], path: Path) -> Path | None:
    groups = _bars(cards, "inference")
    if not groups:
        return None
    from matplotlib.figure import Figure

    columns = min(2, len(groups))
    lines = -(-len(groups) // columns)
    most = max(map(len, groups.values()))
    # One column alone would be narrower than the note at its foot.
    figure = Figure(figsize=(max(11, 1 + 6 * columns), 0.5 + lines * (1.1 + 0.3 * most)))
    axes = figure.subplots(lines, columns, squeeze=False).flat
    for axis in axes[len(groups) :]:
        axis.set_axis_off()
    for axis, (name, contenders) in zip(axes[: len(groups)], groups.items(), strict=True):
        _draw_contenders(axis, contenders, "ms", "{:.1f} ms")
        title(axis, name)
    save(figure, _note(cards), path)
    return path


def _draw_contenders(axis: Axes, contenders: dict[str, Row | None], key: str, text: str) -> None:
    rows = {name: row or {} for name, row in contenders.items()}
    labels = [f"{name} (run {row['run']})" if "run" in row else name for name, row in rows.items()]
    colours = [DARK if name.startswith("fused") else GREY for name in rows]
    draw_bars(axis, labels, colours, [row.get(key) or 0 for row in rows.values()], text)


def _draw_kernels(cards: Sequence[Card], path: Path) -> Path | None:
    """For each card: steps by kind of kernel, and below it ours with their floors."""
    found = [
        (card, steps, *ours)
        for card in cards
        for steps, ours in [(_steps(card), _own(card))]
        if steps or ours[1]
    ]
    if not found:
        return None
    from matplotlib.figure import Figure

    heights = [height for _, steps, _, ours in found for height in (len(steps) + 3, len(ours) + 1)]
    figure = Figure(figsize=(11, 1.0 + 0.36 * sum(heights)))
    axes = figure.subplots(2 * len(found), 1, height_ratios=heights)
    for index, (card, steps, how, ours) in enumerate(found):
        where = f", {card.name}" if len(cards) > 1 else ""
        _draw_kinds(axes[2 * index], steps, f"a training step by kind of kernel{where}")
        _draw_floors(axes[2 * index + 1], ours, f"our kernels in a fused step{how}{where}")
    save(figure, _note(cards), path)
    return path


def _steps(card: Card) -> dict[str, dict[str, float]]:
    rows = {each.name: losses.profile(card, each.name) for each in PROFILED}
    return {
        f"{step} (run {mine[0]['run']})" if "run" in mine[0] else step: losses.by_kind(mine)
        for step, mine in rows.items()
        if mine
    }


def _own(card: Card) -> tuple[str, dict[str, tuple[float, float | None]]]:
    """(how, (milliseconds, those of the floor) of our kernels), the longest first.

    Those inside the step, or where they were not measured, alone.
    """
    inside = {
        row["kernel"]: (row["ms"], row["floor ms"])
        for row in losses.profile(card, FUSED.name)
        if losses.kind_of(row) == losses.OURS
    }
    alone = losses.sum_launches(card.rows("kernels", "alone"))
    found = inside or {name: (row["ms"], row["floor ms"]) for name, row in alone.items()}
    longest = sorted(found.items(), key=lambda item: -item[1][0])
    return "" if inside else ", each alone", dict(longest[:OWN_KERNELS])


def _draw_kinds(axis: Axes, steps: dict[str, dict[str, float]], heading: str) -> None:
    """A bar for each step, made of kinds."""
    title(axis, heading)
    if not steps:
        _say_unmeasured(axis)
        return
    order = [kind for kind in KIND_COLOURS if any(kind in times for times in steps.values())]
    lefts = [0.0] * len(steps)
    for kind in order:
        widths = [times.get(kind, 0.0) for times in steps.values()]
        axis.barh(range(len(steps)), widths, 0.68, lefts, color=KIND_COLOURS[kind], label=kind)
        lefts = [left + width for left, width in zip(lefts, widths, strict=True)]
    for position, total in enumerate(lefts):
        axis.text(total, position, f" {total:.1f} ms", va="center", size=9)
    _finish(axis, list(steps), max(lefts))
    axis.legend(
        loc="upper left",
        bbox_to_anchor=(0, -0.02),
        ncols=6,
        frameon=False,
        fontsize=8,
        columnspacing=1.0,
        handlelength=1.2,
    )


def _draw_floors(axis: Axes, ours: dict[str, tuple[float, float | None]], heading: str) -> None:
    """Bars of times, in front of them darker ones of floors."""
    title(axis, heading)
    if not ours:
        _say_unmeasured(axis)
        return
    times = [time for time, _ in ours.values()]
    floors = [floor or 0.0 for _, floor in ours.values()]
    axis.barh(range(len(ours)), times, 0.68, color=LIGHT, label="time")
    axis.barh(range(len(ours)), floors, 0.68, color=DARK, label="floor")
    for position, (time, floor) in enumerate(ours.values()):
        label = f" {time:.2f} ms" + ("" if floor is None else f"  (floor {floor:.2f})")
        axis.text(max(time, floor or 0.0), position, label, va="center", size=9)
    _finish(axis, list(ours), max(*times, *floors))
    axis.legend(loc="lower right", frameon=False, fontsize=8)


def _finish(axis: Axes, labels: Sequence[str], longest: float) -> None:
    axis.set_yticks(range(len(labels)), labels)
    axis.invert_yaxis()
    axis.set_xticks([])
    axis.set_xlim(0, 1.25 * longest or 1.0)
    axis.tick_params(length=0)
    for side in ("top", "right", "bottom"):
        axis.spines[side].set_visible(False)


def _say_unmeasured(axis: Axes) -> None:
    axis.set_axis_off()
    axis.text(0, 0.5, "not measured yet", transform=axis.transAxes, size=9)


def _note(cards: Sequence[Card]) -> str:
    lines = []
    for card in cards:
        invented = ": A REHEARSAL, all numbers are invented" if card.is_rehearsal else ""
        lines += [f"{card.name}{invented}", *(f"   {run}" for run in card.runs)]
    return "\n".join(lines)
