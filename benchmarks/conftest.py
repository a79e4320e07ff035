"""Options, and the facts that every benchmark records beside its time."""

from __future__ import annotations

import pytest
import shapes
import torch
from interleaved import Contender, Group

from moat_kernels.info import collect


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--full", action="store_true", help="all variants and batches, torch.compile")
    parser.addoption("--threads", type=int, default=torch.get_num_threads())


def pytest_configure(config: pytest.Config) -> None:
    torch.set_num_threads(config.getoption("--threads"))
    shapes.FULL = config.getoption("--full")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not config.getoption("--full"):
        skip = pytest.mark.skip(reason="only with --full")
        for item in items:
            if "full" in item.keywords:
                item.add_marker(skip)


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict) -> None:
    machine_info["moat_kernels"] = collect()


@pytest.fixture
def measure(benchmark):
    """measure(group, name): time one contender, beside all others of its group."""

    def run(group: Group, name: str) -> None:
        contender: Contender = group.contenders[name]
        benchmark.group = group.name
        benchmark.extra_info.update(group.extra_info(name))
        benchmark.pedantic(contender.call, setup=contender.setup, rounds=3)

    return run
