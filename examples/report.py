"""The results of a training run as a table and as JSON."""

from __future__ import annotations

import dataclasses
import json
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from files import written_whole
from memory import MEBIBYTE, PEAK_ON_CPU, PEAK_ON_CUDA

from moat_kernels import info


@dataclass(frozen=True, kw_only=True)
class Measurements:
    """What one kind of blocks did: a loss and a time for each step, and bytes.

    peak_bytes: None where it cannot be measured.
    """

    blocks: str
    losses: list[float]
    step_seconds: list[float]
    saved_bytes: int
    peak_bytes: int | None

    @property
    def ends(self) -> int:
        """How many steps count as the start, and as the end, of the run."""
        return max(1, len(self.losses) // 10)

    @property
    def first_loss(self) -> float:
        return statistics.fmean(self.losses[: self.ends])

    @property
    def last_loss(self) -> float:
        return statistics.fmean(self.losses[-self.ends :])

    @property
    def median_seconds(self) -> float:
        return statistics.median(self.step_seconds)


def loss_differences(results: Sequence[Measurements]) -> list[float]:
    """How far apart the losses of both kinds of blocks are, for each step."""
    return [abs(a - b) for a, b in zip(results[0].losses, results[1].losses, strict=True)]


Values = tuple[str, Callable[[Any], Any], Callable[[Any], str]]  # a row: title, value, its form


def format_table(
    results: Sequence[Measurements], device: str, qualities: Sequence[Values] = ()
) -> str:
    """All that was measured, for people.

    qualities: rows that say how good each of `results` became.
    """
    ends = results[0].ends
    first, last = ("first step", "last step")
    if ends > 1:
        first, last = f"mean of first {ends} steps", f"mean of last {ends} steps"

    def seconds(value: float) -> str:
        return f"{value:.3f} s"

    def mebibytes(value: float) -> str:
        return f"{value / MEBIBYTE:.1f} MiB"

    rows = [
        _row(f"loss, {first}", results, lambda one: one.first_loss, "{:.4f}".format),
        _row(f"loss, {last}", results, lambda one: one.last_loss, "{:.4f}".format),
        *(_row(title, results, value, form) for title, value, form in qualities),
        _row("median step time", results, lambda one: one.median_seconds, seconds, ratio=True),
        _row("saved for backward [1]", results, lambda one: one.saved_bytes, mebibytes, ratio=True),
        _row("peak of a step [2]", results, lambda one: one.peak_bytes, mebibytes, ratio=True),
    ]
    header = ["", *(one.blocks for one in results)]
    if len(results) == 2:
        header.append("fused/stock")
    lines = [
        f"{row[0]:<28}" + "".join(f"{cell:>14}" for cell in row[1:]) for row in [header, *rows]
    ]
    lines.insert(1, "-" * max(map(len, lines)))
    if len(results) == 2:
        differences = loss_differences(results)
        largest = max(differences)
        lines.append(
            f"\ndifference of the losses: {differences[0]:.2g} at step 1, at most {largest:.2g} "
            f"(step {differences.index(largest) + 1});\n"
            "training feeds rounding differences back, so they grow"
        )
    peak = PEAK_ON_CUDA if device == "cuda" else PEAK_ON_CPU
    lines += [
        "",
        "[1] storages that autograd keeps for the backward pass of a step, without parameters",
        f"[2] {peak}",
    ]
    return "\n" + "\n".join(lines)


def _row(
    title: str,
    results: Sequence[Measurements],
    value: Callable[[Measurements], Any],
    form: Callable[[Any], str],
    *,
    ratio: bool = False,
) -> list[str]:
    values = [value(one) for one in results]
    cells = ["not measured" if one is None else form(one) for one in values]
    if ratio and len(values) == 2 and None not in values:
        cells.append(f"{values[1] / values[0]:.2f}")
    return [title, *cells]


def write_json(path: Path, results: Sequence[Measurements], settings: Any) -> None:
    """All numbers, the settings, and what they were measured on; `path` whole or as it was.

    settings: a dataclass of them.
    """
    contents: dict[str, Any] = {
        "settings": dataclasses.asdict(settings),
        "results": {one.blocks: _numbers(one) for one in results},
        "environment": info.collect(),
    }
    if len(results) == 2:
        contents["largest_loss_difference"] = max(loss_differences(results))
    with written_whole(path) as new:
        new.write_text(json.dumps(contents, indent=2) + "\n")


def _numbers(one: Measurements) -> dict[str, Any]:
    summary = {"first_loss": one.first_loss, "last_loss": one.last_loss}
    return {**dataclasses.asdict(one), **summary, "median_seconds": one.median_seconds}
