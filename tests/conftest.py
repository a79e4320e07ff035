"""Every test runs with uninitialised memory filled with NaN: an unwritten element shows.

And as if it were the first: with the same random numbers, and nothing warned of.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(autouse=True)
def poisoned_memory() -> Iterator[None]:
    # Not above: it imports Triton, which tests/triton_kernels/conftest.py tells to interpret first.
    from moat_kernels.memory import release_memory
    from moat_kernels.ops.common import backends

    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    torch.manual_seed(0)
    backends._warned.clear()  # what an earlier test was told once
    release_memory()  # what an earlier test left there hides what this one does not write
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def captured() -> Iterator[None]:
    """CUDA graphs on a CPU, by a stand-in."""
    from support.stand_in_graphs import standing_in

    with standing_in():
        yield


@pytest.fixture(params=["as it is", "captured"])
def either_way(request: pytest.FixtureRequest) -> None:
    if request.param == "captured":
        request.getfixturevalue("captured")


# A file is one process's: those of half a minute and more begin first, so that none is left for the
# end. The first takes both cores; those that wait for a clock come when it is done.
LONGEST = (
    *("test_triton.py", "test_each_instruction_set.py", "test_native_sources.py"),
    *("test_aarch64.py", "test_story.py", "test_cuda_on_cpu.py", "test_rehearsal.py"),
    *("test_runner.py", "test_benchmarks_device.py", "test_export.py", "test_torchrun.py"),
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    places = {name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: places.get(item.path.name, len(LONGEST)))


def pytest_collection_finish() -> None:
    """Refuse to test the kernels of other sources; without any, their tests are skipped."""
    from moat_kernels.extension import OUTDATED, load_extension

    reason = load_extension().reason
    if reason.startswith(OUTDATED):
        raise pytest.UsageError(f"native kernels {reason}")


def pytest_configure(config: pytest.Config) -> None:
    # Small tensors on a possibly busy machine: more threads would only wait for each other.
    torch.set_num_threads(1)
