"""Calls that are replayed do what they did when they were made: the same bits, on other tensors."""

from __future__ import annotations

import copy
import ctypes
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from support.mbconv_cases import CASES
from torch import Tensor, nn

import moat_kernels as mk
from moat_kernels import use_backend

pytest.importorskip("triton")

from moat_kernels.ops.triton_support import replay
from moat_kernels.ops.triton_support.launching import launch, listening
from moat_kernels.ops.triton_support.replay import replayed

SHAPE = (2, 24, 5, 6)
BLOCKS: dict[str, Callable[[], nn.Module]] = {
    "MOAT": lambda: mk.FusedMOATBlock(24, 24, head_dim=16, window_size=4, drop_path=0.5),
    "MOAT, stride 2": lambda: mk.FusedMOATBlock(24, 40, stride=2, head_dim=16),
    "MBConv": lambda: mk.FusedMBConv(24, 24, drop_path=0.5),
    "MBConv, recomputed": lambda: mk.FusedMBConv(24, 40, stride=2, recompute="block"),
}
CASES_OF_BLOCKS = [
    pytest.param("MOAT", torch.float32, marks=pytest.mark.oldest_triton),
    *((name, torch.float32) for name in list(BLOCKS)[1:]),
    ("MOAT", torch.float16),
]


def directly(function: Callable[[], Any]) -> Any:
    """The call made as it is: somebody listens to its launches."""
    with listening(lambda _: None):
        return function()


def step(block: nn.Module, x: Tensor, dtype: torch.dtype) -> list[Tensor]:
    """Output, gradients and state after a step of training, and the output in evaluation."""
    block.train().zero_grad()
    x = x.detach().requires_grad_()
    torch.manual_seed(1)
    autocast = torch.autocast(x.device.type, dtype, enabled=dtype != torch.float32)
    with use_backend("triton"), torch.autograd.set_multithreading_enabled(False), autocast:
        y = block(x)
        y.backward(y.detach().cos())
        with torch.no_grad():
            evaluated = block.eval()(x)
    gradients = [parameter.grad.clone() for parameter in block.parameters()]
    return [y.detach(), x.grad, evaluated, *gradients, *(b.clone() for b in block.buffers())]


@pytest.fixture
def replays(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many tensors each tape was run with."""
    runs: list[int] = []
    run = replay._on_device

    def counted(device: torch.device, tape: Any, tensors: list[Tensor]) -> Any:
        runs.append(len(tensors))
        return run(device, tape, tensors)

    monkeypatch.setattr(replay, "_on_device", counted)
    return runs


@pytest.mark.parametrize(("name", "dtype"), CASES_OF_BLOCKS)
def test_a_block_replayed(name: str, dtype: torch.dtype, device: str, replays: list[int]) -> None:
    torch.manual_seed(0)
    block = BLOCKS[name]().to(device)
    inputs = [torch.randn(SHAPE, device=device) for _ in range(3)]
    inputs = [x.to(memory_format=torch.channels_last) for x in inputs]
    step(copy.deepcopy(block), inputs[0], dtype)
    for x in inputs[1:]:  # recorded, replayed
        expected = directly(lambda x=x: step(copy.deepcopy(block), x, dtype))
        replays.clear()
        actual = step(copy.deepcopy(block), x, dtype)
        assert all(map(torch.equal, actual, expected))
    assert len(replays) >= 3  # forward, backward, evaluation


def test_each_kind_of_call_has_its_own_tape(device: str, replays: list[int]) -> None:
    """Other shapes, strides, dtypes, modes and settings."""
    torch.manual_seed(0)
    block = mk.FusedMBConv(24, 24, se_ratio=None).to(device)
    x = torch.randn(SHAPE, device=device)
    kinds = [
        (x.to(memory_format=torch.channels_last), torch.float32),
        (x.contiguous(), torch.float32),
        (x[:1], torch.float32),
        (x[:, :, :4], torch.float32),
        (x.half(), torch.float16),
        (x, torch.float16),
    ]
    expected = [
        directly(lambda e=each, d=dtype: step(copy.deepcopy(block), e, d)) for each, dtype in kinds
    ]
    for _ in range(3):
        for (each, dtype), results in zip(kinds, expected, strict=True):
            actual = step(copy.deepcopy(block), each, dtype)
            assert all(map(torch.equal, actual, results))
    assert len(replays) == 3 * len(kinds)


@pytest.mark.parametrize("name", ["squeeze-excite", "no norms", "frozen expand_norm"])
def test_running_statistics_are_updated_once(name: str, device: str) -> None:
    from support.mbconv_cases import make_parameters, map_tensors

    case = CASES[name]
    parameters = map_tensors(make_parameters(case), lambda t: t.to(device, torch.float32))
    x = torch.randn(2, case.in_channels, 4, 4, device=device)
    for _ in range(4):
        direct = map_tensors(parameters, lambda t: t.clone())
        again = map_tensors(parameters, lambda t: t.clone())
        with use_backend("triton"), torch.no_grad():
            expected = directly(
                lambda d=direct: mk.functional.mbconv(x, d, case.description, training=True)
            )
            actual = mk.functional.mbconv(x, again, case.description, training=True)
        assert torch.equal(actual, expected)
        pairs = zip(_tensors(again), _tensors(direct), strict=True)
        assert all(torch.equal(one, other) for one, other in pairs)


def _tensors(parameters: Any) -> list[Tensor]:
    found = []
    for value in parameters:
        if isinstance(value, Tensor):
            found.append(value)
        elif value is not None:
            found += _tensors(value)
    return found


def test_what_is_asked_of_a_tensor_is_in_the_key(device: str) -> None:
    @replayed()
    def shifted(x: Tensor, by: float) -> dict[str, Any]:
        out = torch.empty_like(x)
        torch.add(x, by, out=out)
        return {"out": out[1:], "parts": (out.view(-1), None), "in": x}

    for size in (3, 3, 3, 4):
        for by in (1.0, float("inf")):
            x = torch.randn(size, 2, device=device)
            result = shifted(x, by)
            assert torch.equal(result["out"], x[1:] + by)
            assert torch.equal(result["parts"][0], (x + by).flatten())
            assert result["parts"][1] is None
            assert result["in"] is x


def test_calls_that_look_at_values_are_made(device: str, replays: list[int]) -> None:
    @replayed()
    def halved(x: Tensor) -> Tensor:
        return x / 2 if x.sum() > 0 else x * 2

    for value in (1.0, 1.0, 1.0, -1.0):
        x = torch.full((2,), value, device=device)
        assert torch.equal(halved(x), x / 2 if value > 0 else x * 2)
    assert not replays


def test_arguments_that_share_memory(device: str, replays: list[int]) -> None:
    """Parts of one storage are told apart; where they overlap, nothing is replayed."""

    @replayed()
    def added(x: Tensor, y: Tensor) -> Tensor:
        return x + 2 * y

    memory = torch.randn(32, device=device)
    for first, second in ((0, 8), (8, 0), (16, 8), (0, 24)):
        x, y = memory[first : first + 8], memory[second : second + 8]
        assert torch.equal(added(x, y), x + 2 * y)
    assert len(replays) == 2
    for _ in range(4):
        x, y = memory[:16], memory[4:20]
        assert torch.equal(added(x, y), x + 2 * y)
    assert len(replays) == 2
    for _ in range(3):  # the same tensor twice is one argument
        assert torch.equal(added(memory, memory), memory + 2 * memory)
    assert len(replays) == 3


def test_what_operators_return(device: str, replays: list[int]) -> None:
    """Lists of one, tuples, parts of what is new; results that nobody uses."""

    @replayed()
    def several(x: Tensor) -> list[Tensor]:
        (one,) = torch._foreach_add([x], 1.0)
        variance, mean = torch.var_mean(x, 0)
        values, _ = x.sort(1)
        part = torch.cat([x, x])[1:].mul_(2)
        return [one, variance, mean, values, part]

    for _ in range(4):
        x = torch.randn(3, 2, device=device)
        twice = torch.cat([x, x])[1:] * 2
        expected = [x + 1, *torch.var_mean(x, 0), x.sort(1).values, twice]
        assert all(map(torch.equal, several(x), expected))
    assert len(replays) == 2


def test_kinds_are_told_apart(device: str) -> None:
    @replayed()
    def kind_of(x: Tensor, other: Any) -> Tensor:
        if isinstance(other, Tensor):
            return x + other
        return x * 3 if isinstance(other, int) else x * 5

    x = torch.randn(4, device=device)
    for _ in range(3):
        assert torch.equal(kind_of(x, x), x + x)
        assert torch.equal(kind_of(x, 0), x * 3)
        assert torch.equal(kind_of(x, []), x * 5)
        assert torch.equal(kind_of(x, ()), x * 5)


def test_tapes_outlive_calls_that_cannot_be_replayed(
    device: str, replays: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(replay, "MOST_TAPES", 2)

    @replayed()
    def doubled(x: Tensor, looks: bool) -> Tensor:
        return x * 2 if not looks or x.sum().isfinite() else x

    x = torch.randn(4, device=device)
    for _ in range(4):
        for looks in (True, False):
            assert torch.equal(doubled(x, looks), x * 2)
    assert len(replays) == 2


class AddOne:
    """In place of a compiled kernel: y = x + 1 on the CPU, by addresses as Triton launches."""

    arg_names = ("x", "y", "count", "BLOCK")
    fn = SimpleNamespace(__name__="add_one")
    function, packed_metadata = 7, (4, 1, 0)

    def __init__(self) -> None:
        self.launches: list[tuple[Any, ...]] = []

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., AddOne]:
        def launched(x: Tensor, y: Tensor, count: int, BLOCK: int, **_: Any) -> AddOne:
            self._add(x.data_ptr(), y.data_ptr(), count)
            return self

        return launched

    def run(self, *arguments: Any) -> None:
        *launch, x, y, count, _ = arguments
        self.launches.append(tuple(launch))
        self._add(x, y, count)

    def _add(self, x: int, y: int, count: int) -> None:
        source, target = ((ctypes.c_float * count).from_address(each) for each in (x, y))
        for index in range(count):
            target[index] = source[index] + 1


class Driver:
    """What a tape asks Triton's driver for."""

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 42 + device


def test_compiled_kernels_get_addresses(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of arguments wherever they begin, of parts of an output, of small temporary memory."""
    from triton.runtime.driver import driver

    monkeypatch.setattr(driver, "_active", Driver())
    kernel = AddOne()

    def add(x: Tensor, y: Tensor) -> None:
        launch(kernel, (1, 2), x, y, x.numel(), reads=(x,), writes=(y,), BLOCK=8)

    @replayed()
    def chained(x: Tensor) -> Tensor:
        once, twice = torch.empty_like(x), torch.empty_like(x)
        add(x, once)
        add(once, twice)
        output = x.new_empty(3, len(x))
        add(twice, output[2])
        output[0].copy_(x)
        torch.add(output[2], 1, out=output[1])
        return output[1:]

    memory = torch.arange(64.0)
    for begin in (0, 8, 4, 40):
        x = memory[begin : begin + 8]
        assert torch.equal(chained(x), torch.stack([x + 4, x + 3]))
    # Of the last two calls: grid, stream, and what the kernel was compiled to.
    assert kernel.launches == 6 * [(1, 2, 1, 42, 7, (4, 1, 0), None, None, None)]
