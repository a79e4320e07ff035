"""`moat_kernels.tune` from the first launch to the table that it writes, with an invented clock."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from support import cuda_on_cpu
from torch import Tensor

pytest.importorskip("triton")

import moat_kernels as mk
from moat_kernels import tune
from moat_kernels.ops.mbconv.triton import cuda_kernels
from moat_kernels.ops.mbconv.triton.launch_table import Implementation
from moat_kernels.ops.triton_support import choice, launching, user_table
from moat_kernels.ops.triton_support.choice import choose
from moat_kernels.ops.triton_support.launch_table import Blocks, LaunchTable
from moat_kernels.ops.triton_support.launching import observing, tunable
from moat_kernels.ops.triton_support.traffic import Pass, record_passes
from moat_kernels.ops.triton_support.tuning import Survey, Tuner
from moat_kernels.ops.triton_support.user_table import Entry
from moat_kernels.ops.window_attention.triton import backend as window_attention

GPU = "Some GPU"


@dataclasses.dataclass(frozen=True)
class Step:
    """A launch of the toy below, and the time that it takes."""

    cost: int


TOYS = LaunchTable(
    "toys",
    {("add", 4, "any"): Step(4)},
    choices={"cost": (1, 2, 3, 4, 5)},
    exceptions={},
)


class Toy:
    """Stands for a kernel: what it writes to, and what goes wrong with launches of some costs."""

    def __init__(self, size: int = 8) -> None:
        self.buffer = torch.zeros(size)
        self.cost = 0
        self.faults: dict[int, str] = {}
        self.calls = 0

    def clock(self, function: Callable) -> float:
        """The time of the launch that `function` makes."""
        function()
        return float(self.cost)


@tunable
def add(toy: Toy, x: Tensor) -> Tensor:
    """x + 1 into the toy's buffer."""
    from triton.runtime.errors import OutOfResources

    blocks = choose(TOYS, "add", x, x.shape)
    toy.cost, toy.calls = blocks.cost, toy.calls + 1
    fault = toy.faults.get(blocks.cost)
    if fault == "no memory":
        raise OutOfResources(200, 100, "shared memory")
    if fault != "unwritten":
        toy.buffer.copy_(x + (2 if fault == "wrong" else 1))
    if fault == "NaN":
        toy.buffer[3] = float("nan")
    listener = launching._listener.get()
    if listener is not None:
        listener(SimpleNamespace(compiled=SimpleNamespace(n_spills=8 if fault == "spills" else 0)))
    return toy.buffer


def search(toy: Toy, x: Tensor) -> Entry:
    entries: list[Entry] = []
    with observing(Tuner({"toys": TOYS}, toy.clock, entries.append)):
        assert torch.equal(add(toy, x), x + 1)
        calls = toy.calls
        assert torch.equal(add(toy, x), x + 1)
        assert toy.calls == calls + 1
    (entry,) = entries
    return entry


def test_the_search_walks_to_the_fastest() -> None:
    entry = search(Toy(), torch.ones(8))
    assert (entry.blocks.cost, entry.microseconds, entry.static_microseconds) == (1, 1.0, 4.0)


@pytest.mark.oldest_triton
@pytest.mark.parametrize("fault", ["wrong", "unwritten", "NaN", "spills", "no memory"])
def test_what_cannot_be_used_is_not_chosen(fault: str) -> None:
    toy = Toy()
    toy.faults = {2: fault}
    assert search(toy, torch.ones(8)).blocks.cost == 3


def test_nan_of_the_data_are_no_difference() -> None:
    x = torch.ones(8)
    x[2] = float("nan")
    entries: list[Entry] = []
    toy = Toy()
    with observing(Tuner({"toys": TOYS}, toy.clock, entries.append)):
        add(toy, x)
    assert entries[0].blocks.cost == 1


def test_the_search_ends_in_time() -> None:
    """With no time left a problem keeps its launch, and none is begun."""
    toy, entries = Toy(), []
    clock = iter((False, False, True))
    tuner = Tuner({"toys": TOYS}, toy.clock, entries.append, lambda: next(clock, True))
    with observing(tuner):
        add(toy, torch.ones(8))  # asked before the search and before each neighbour
        add(Toy(16), torch.ones(16))
    (entry,) = entries
    assert (entry.blocks.cost, entry.problem.sizes) == (3, (8,))


def test_what_static_launches_lose() -> None:
    """Time above that of the bytes, times the calls; nothing is launched otherwise."""
    toy = Toy()
    survey = Survey(lambda function: function().numel() / 2, bandwidth=1e12)
    with observing(survey):
        for _ in range(3):
            add(toy, torch.ones(8))
        add(Toy(16), torch.ones(16))
    losses = {problem.sizes: lost for problem, lost in survey.losses.items()}
    assert losses == {(8,): 3 * 4.0, (16,): 8.0}
    assert toy.cost == 4


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """A machine with a GPU of that name, where each launch has one neighbour."""

    def neighbours(self: LaunchTable, blocks: Blocks) -> Iterator[Blocks]:
        if isinstance(blocks, Implementation):
            yield Implementation("cuda")
        else:
            yield dataclasses.replace(blocks, stages=5)

    monkeypatch.setattr(LaunchTable, "neighbours", neighbours)
    monkeypatch.setattr(choice, "device_name", lambda _: GPU)
    monkeypatch.delenv(user_table.ENVIRONMENT_VARIABLE, raising=False)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    user_table.chooser.cache_clear()
    yield
    user_table.chooser.cache_clear()


def step(model: torch.nn.Module, x: Tensor) -> list[Pass]:
    """What a training step launches."""
    with (
        mk.use_backend("triton"),
        torch.autograd.set_multithreading_enabled(False),
        record_passes() as passes,
    ):
        model(x).float().sum().backward()
    return passes


def test_a_model_is_tuned_and_the_table_is_used(
    device: str, gpu: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The later of two launches is always the faster one: stages 5, and CUDA C++ where built."""
    monkeypatch.setattr(window_attention, "in_one", lambda *_: False)  # as large windows
    if device == "cpu" and not cuda_on_cpu.reason_unavailable():
        cuda_on_cpu.load()
    torch.manual_seed(0)
    blocks = [
        mk.FusedMOATBlock(16, 16, window_size=(3, 5), head_dim=16, recompute=recompute)
        .to(device, torch.bfloat16)
        .train()
        for recompute in tune.RECOMPUTE
    ]
    x = torch.randn(2, 16, 6, 5, device=device, dtype=torch.bfloat16, requires_grad=True)
    times = (0.9**index for index in itertools.count())

    def clock(function: Callable) -> float:
        function()
        return next(times)

    launched = {one.kernel for one in step(blocks[0], x)}
    entries: list[Entry] = []
    tune.tune(blocks, x, clock, entries.append)
    tuned = {(entry.problem.op, entry.problem.kernel) for entry in entries}
    kernels = {
        "mbconv": "expand depthwise project project_input depthwise_backward expand_products "
        "expand_input",
        "window_attention": "forward query key_value bias",
    }
    expected = {(op, name) for op, names in kernels.items() for name in names.split()}
    for stencil in ("depthwise_forward", "depthwise_backward"):
        if f"cuda_{stencil}" in launched:  # Hopper's own choice: Triton's is not launched
            expected.remove(("mbconv", stencil.removesuffix("_forward")))
    assert tuned >= expected
    for entry in entries:
        assert entry.microseconds < entry.static_microseconds
        assert entry.blocks == Implementation("cuda") or entry.blocks.stages == 5
        assert tune.describe(entry).startswith(f"{entry.problem.op} {entry.problem.kernel}, ")

    assert "depthwise_kernel" in [one.kernel for one in step(blocks[0], x)]
    user_table.write(GPU, entries)
    assert user_table.read(GPU).launches == {entry.problem: entry.blocks for entry in entries}
    if cuda_kernels._has_kernel(device):
        assert "cuda_depthwise_backward" in [one.kernel for one in step(blocks[0], x)]
        assert ("mbconv", "expand_depthwise_pass") in tuned
