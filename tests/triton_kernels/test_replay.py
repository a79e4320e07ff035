"""Calls that are replayed do what they did when they were made: the same bits, on other tensors."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from support.mbconv_cases import CASES
from torch import Tensor, nn

import moat_kernels as mk
from moat_kernels import use_backend

pytest.importorskip("triton")

from moat_kernels.ops.triton_support import replay
from moat_kernels.ops.triton_support.launching import listening
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
