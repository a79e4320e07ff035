"""Options, and the facts that every benchmark records beside its time."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

import device
import pytest
import torch
from interleaved import Comparison, Row
from machine import facts
from processes import measure_apart
from results import LINES_SUFFIX, ResultLines


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--full", action="store_true", help="all variants and batches, torch.compile")
    parser.addoption("--threads", type=int, default=torch.get_num_threads())
    parser.addoption("--device", choices=("cpu", "cuda"), default=device.default())
    parser.addoption("--dtype", choices=("float32", "bfloat16", "float16"), default="float32")
    parser.addoption(
        "--results",
        type=Path,
        metavar="FILE",
        help=f"a {LINES_SUFFIX} file to write each contender to as soon as it is measured",
    )


def pytest_configure(config: pytest.Config) -> None:
    torch.set_num_threads(config.getoption("--threads"))
    device.choose(config.getoption("--device"))
    torch.set_default_dtype(getattr(torch, config.getoption("--dtype")))
    path = config.getoption("--results")
    if path is not None and path.suffix != LINES_SUFFIX:
        raise pytest.UsageError(f"--results must be a {LINES_SUFFIX} file, got {path}")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not config.getoption("--full"):
        skip = pytest.mark.skip(reason="only with --full")
        for item in items:
            if "full" in item.keywords:
                item.add_marker(skip)
    for item in items:
        if "measure" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.benchmark(timer=clock.read))


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict) -> None:
    machine_info["moat_kernels"] = facts()


class RecordedClock:
    """Tells pytest-benchmark the time that a contender took when all of its group had turns."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def read(self) -> float:
        return self.seconds

    def advance(self, seconds: float) -> None:
        self.seconds += seconds


clock = RecordedClock()


@pytest.fixture(scope="session")
def measure_group(request: pytest.FixtureRequest) -> Callable[[Comparison], dict[str, Row]]:
    """Measures all contenders of a group that this run has, once: their rows by name."""
    full = request.config.getoption("--full")
    path = request.config.getoption("--results")
    lines = None if path is None else ResultLines(path, facts())
    measure = measure_apart if device.chosen() == "cuda" else Comparison.measure

    @lru_cache(maxsize=1)  # contenders of a group run one after the other
    def measured(comparison: Comparison) -> dict[str, Row]:
        rows: dict[str, Row] = {}

        def report(row: Row) -> None:
            rows[row["contender"]] = row
            if lines is not None:
                lines.write(comparison.name, row)

        slow = comparison.slow if full else ()
        measure(comparison, (*comparison.contenders, *slow), report)
        return rows

    return measured


@pytest.fixture
def measure(benchmark: Any, measure_group: Any) -> Callable[[Comparison, str], None]:
    """measure(comparison, name): time one contender, beside all others of its group."""

    def run(comparison: Comparison, name: str) -> None:
        row = measure_group(comparison)[name]
        if "skipped" in row:
            pytest.skip(row["skipped"])
        if "failure" in row:
            pytest.fail(f"{name}: {row['failure']}\n\n{row['traceback']}".rstrip(), pytrace=False)
        benchmark.group = comparison.name
        benchmark.extra_info.update(row)
        benchmark.pedantic(clock.advance, args=(row["interleaved_ms"] / 1e3,), rounds=1)

    return run
