"""docs/issue_time.csv: the instructions that the kernels of a training step of moat_0 issue.

`python benchmarks/issue.py` writes it (issue.py counts), roofline.py makes a table of it.
"""

from __future__ import annotations

import csv
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, TypeVar

from moat_kernels.plan import Gpu

Row = TypeVar("Row", bound=Any)

FILE = Path(__file__).parents[2] / "docs" / "issue_time.csv"
MODEL, RESOLUTION, BATCH, ARCHITECTURE = "moat_0", 224, 64, 90
STEP = MODEL, RESOLUTION, BATCH
# What the whole step was to issue at most, on an H100.
PLANNED_SECONDS = 8e-3


@dataclass(frozen=True)
class Issue:
    """One different launch of the step.

    kernel, constants, arguments, grid, numbers, source: what tells it from others (the `key` of
        step_launches.py); the last is a hash. cuda, triton: how often it is made in a step with
        stencils of CUDA C++, and of Triton.
    bytes, flops, unit: as its launcher declares them (`traffic.Pass`).
    compiler: of its machine code. warps: of a block. instructions, most, tensor_flops, blocks: as
        `warp_instructions.Count`.
    """

    kernel: str
    constants: str
    arguments: str
    grid: str
    numbers: str
    source: str
    cuda: int
    triton: int
    bytes: int
    flops: int
    unit: str
    compiler: str
    warps: int
    instructions: int
    most: int
    tensor_flops: int
    blocks: int

    @property
    def key(self) -> tuple[str, ...]:
        return self.kernel, self.constants, self.arguments, self.grid, self.numbers, self.source

    def launches(self, cuda: bool) -> int:
        """In a step."""
        return self.cuda if cuda else self.triton

    def seconds(self, gpu: Gpu) -> tuple[float, float, float]:
        """Of one launch at full rates: its bytes, its products, its instructions."""
        products = self.flops / gpu.peaks[self.unit]
        return self.bytes / gpu.bandwidth, products, self.instructions / gpu.issue_rate


def read_file() -> list[Issue]:
    """The rows of the file."""
    return read_rows(FILE, Issue)


def write_file(rows: Iterable[Issue]) -> None:
    write_rows(FILE, Issue, sorted(rows, key=lambda row: row.key))


def read_rows(path: Path, kind: type[Row]) -> list[Row]:
    """A file of rows of a dataclass of strings and integers."""
    texts = {field.name for field in fields(kind) if field.type == "str"}
    with path.open(newline="") as file:
        return [
            kind(**{name: text if name in texts else int(text) for name, text in row.items()})
            for row in csv.DictReader(file)
        ]


def write_rows(path: Path, kind: type[Row], rows: Iterable[Row]) -> None:
    with path.open("w", newline="") as file:
        names = [field.name for field in fields(kind)]
        writer = csv.DictWriter(file, names, lineterminator="\n")
        writer.writeheader()
        writer.writerows(map(asdict, rows))
