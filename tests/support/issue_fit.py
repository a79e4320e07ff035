"""docs/issue_steps.csv: what kernels issue in several training steps; and the table made of it.

`python benchmarks/issue.py` writes the file; `fit` makes the numbers of moat_kernels/plan/issue.py.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from support.issue_table import Issue, read_rows, write_rows

FILE = Path(__file__).parents[2] / "docs" / "issue_steps.csv"
# (variant, pixels, images): narrow and wide maps, short and long windows, few and many images.
STEPS = (
    ("moat_0", 224, 64),
    ("tiny_moat_0", 256, 64),
    ("moat_2", 384, 16),
    ("moat_4", 512, 4),
)
# The stencils of CUDA C++, as `traffic.Pass` calls them.
CUDA_NAMES = {
    "depthwise_forward_kernel": "cuda_depthwise_forward",
    "depthwise_backward_kernel": "cuda_depthwise_backward",
}


@dataclass(frozen=True)
class Total:
    """All launches of a kernel in a step that was counted."""

    model: str
    resolution: int
    batch: int
    kernel: str
    launches: int
    bytes: int
    flops: int
    instructions: int

    @property
    def step(self) -> tuple[str, int, int]:
        return self.model, self.resolution, self.batch


def totals(step: tuple[str, int, int], rows: Iterable[Issue]) -> list[Total]:
    """By kernel; those without declared bytes, which only finish another's sums, are left out."""
    groups: dict[str, list[Issue]] = {}
    for row in rows:
        cuda = row.compiler.startswith("nvcc")
        name = CUDA_NAMES.get(row.kernel, row.kernel) if cuda else row.kernel
        if row.bytes:
            groups.setdefault(name, []).append(row)
    return [_total(step, name, group) for name, group in sorted(groups.items())]


def _total(step: tuple[str, int, int], kernel: str, rows: list[Issue]) -> Total:
    launches = [max(row.cuda, row.triton) for row in rows]
    counts = [(1, row.bytes, row.flops, row.instructions) for row in rows]
    return Total(
        *step,
        kernel,
        *(sum(map(operator.mul, launches, each)) for each in zip(*counts, strict=True)),
    )


def write_file(rows: Iterable[Total]) -> None:
    write_rows(FILE, Total, rows)


def read_file() -> list[Total]:
    """The rows of the file."""
    return read_rows(FILE, Total)


def fit(rows: Iterable[Total]) -> dict[str, tuple[float, float]]:
    """Instructions for each byte and each FLOP by kernel: least squares of relative errors."""
    groups: dict[str, list[Total]] = {}
    for row in rows:
        groups.setdefault(row.kernel, []).append(row)
    return {kernel: _fit(group) for kernel, group in sorted(groups.items())}


def _fit(rows: list[Total]) -> tuple[float, float]:
    """The least squares of a bytes / instructions + b FLOPs / instructions = 1, a and b >= 0."""
    pairs = [(row.bytes / row.instructions, row.flops / row.instructions) for row in rows]
    left = sum(moved for moved, _ in pairs), sum(done for _, done in pairs)
    squares = [sum(one[i] * one[j] for one in pairs) for i, j in ((0, 0), (0, 1), (1, 1))]
    determinant = squares[0] * squares[2] - squares[1] ** 2
    candidates = [(left[0] / squares[0], 0.0)]
    if squares[2]:
        candidates.append((0.0, left[1] / squares[2]))
    if determinant > 1e-9 * squares[0] * squares[2]:
        candidates.append(
            (
                (left[0] * squares[2] - left[1] * squares[1]) / determinant,
                (left[1] * squares[0] - left[0] * squares[1]) / determinant,
            )
        )
    return min(
        (each for each in candidates if min(each) >= 0),
        key=lambda each: sum((each[0] * a + each[1] * b - 1) ** 2 for a, b in pairs),
    )
