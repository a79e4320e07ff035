"""Options, and the facts that every benchmark records beside its time."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import device
import pytest
import torch
from interleaved import Comparison, Group
from machine import facts, summary


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--full", action="store_true", help="all variants and batches, torch.compile")
    parser.addoption("--threads", type=int, default=torch.get_num_threads())
    parser.addoption("--device", choices=("cpu", "cuda"), default=device.default())
    parser.addoption("--dtype", choices=("float32", "bfloat16", "float16"), default="float32")


def pytest_configure(config: pytest.Config) -> None:
    torch.set_num_threads(config.getoption("--threads"))
    device.choose(config.getoption("--device"))
    torch.set_default_dtype(getattr(torch, config.getoption("--dtype")))


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not config.getoption("--full"):
        skip = pytest.mark.skip(reason="only with --full")
        for item in items:
            if "full" in item.keywords:
                item.add_marker(skip)


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict) -> None:
    machine_info["moat_kernels"] = facts()


@pytest.fixture(scope="session")
def measure_group(request: pytest.FixtureRequest) -> Callable[[Comparison], Group]:
    """Makes a group of all contenders that this run has, once."""
    full = request.config.getoption("--full")

    @lru_cache(maxsize=1)  # contenders of a group run one after the other
    def make(comparison: Comparison) -> Group:
        slow = comparison.slow if full else ()
        with torch.device(device.chosen()):
            return comparison.make((*comparison.contenders, *slow))

    return make


@pytest.fixture
def measure(benchmark: Any, measure_group: Any) -> Callable[[Comparison, str], None]:
    """measure(comparison, name): time one contender, beside all others of its group."""

    def run(comparison: Comparison, name: str) -> None:
        group = measure_group(comparison)
        contender = group.contenders[name]
        benchmark.group = comparison.name
        benchmark.extra_info.update(group.extra_info(name))
        benchmark.extra_info.update(summary())
        benchmark.pedantic(contender.call, setup=contender.setup, rounds=1)

    return run
