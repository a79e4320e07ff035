"""What training a detector led to."""

from __future__ import annotations

from dataclasses import dataclass

from average_precision import AveragePrecision, best_step
from report import Measurements, Values


@dataclass(frozen=True, kw_only=True)
class DetectorMeasurements(Measurements):
    """precisions: of what was held out, by the number of steps done, the end included."""

    precisions: dict[int, AveragePrecision]

    @property
    def last(self) -> AveragePrecision:
        return self.precisions[len(self.losses)]


def _best(one: DetectorMeasurements) -> str:
    step = best_step(one.precisions)
    return f"{one.precisions[step].box:.3f} ({step})"


# For report.format_table.
PRECISION_ROWS: list[Values] = [
    ("box AP, held out", lambda one: one.last.box, "{:.3f}".format),
    ("box AP at IoU 0.5", lambda one: one.last.box_50, "{:.3f}".format),
    ("mask AP, held out", lambda one: one.last.mask, "{:.3f}".format),
    ("mask AP at IoU 0.5", lambda one: one.last.mask_50, "{:.3f}".format),
    ("best box AP (after step)", _best, str),
]
