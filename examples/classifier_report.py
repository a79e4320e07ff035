"""What training a classifier led to."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from report import Measurements, Values
from validation import Validation, best_of


@dataclass(frozen=True, kw_only=True)
class ClassifierMeasurements(Measurements):
    """accuracy: in the end, of `held_out` pictures (0..1); None without any.

    validations: what there was while training, the end included.
    """

    accuracy: float | None
    held_out: int
    validations: list[Validation]


def accuracy_rows(results: Sequence[ClassifierMeasurements]) -> list[Values]:
    """For report.format_table."""

    def best(one: ClassifierMeasurements) -> str | None:
        if not one.validations:
            return None
        best = best_of(one.validations)
        return f"{best.accuracy:.1%} ({best.step})"

    held_out = results[0].held_out
    return [
        (f"top-1 of {held_out} held out", lambda one: one.accuracy, "{:.1%}".format),
        ("best top-1 (after step)", best, str),
    ]
