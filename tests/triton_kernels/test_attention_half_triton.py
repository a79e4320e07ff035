"""Training the attention half by Triton kernels, against plain PyTorch in float64."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from support.tolerances import (
    BACKEND_GRADIENT,
    BACKEND_OUTPUT,
    LOW_PRECISION_FACTOR,
    assert_close,
    relative_error,
)
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from moat_kernels import FallbackWarning, FusedMOATBlock, use_backend
from moat_kernels.reference import MOATBlock

pytest.importorskip("triton")

from moat_kernels.ops.triton_support.launching import listening
from moat_kernels.ops.window_attention.triton import backend as window_attention

LOW = (torch.bfloat16, torch.float16)
SHAPE = (2, 40, 5, 7)

# More channels than heads use, and tables that are resized and that are not.
CASES = {
    "whole map": {"position_size": 5},
    "windows": {"window_size": (3, 4), "position_size": 4},
    "one row": {"window_size": (1, 7), "position_size": 7},
    "beyond the map": {"window_size": 9, "position_size": 9},
    "no table": {"window_size": 4, "position_size": None},
}


@contextmanager
def triton_only() -> Iterator[None]:
    with use_backend("triton"), warnings.catch_warnings():
        warnings.simplefilter("error", FallbackWarning)
        yield


def make_block(device: str, **options) -> FusedMOATBlock:
    """A block whose attention is far from uniform and whose norm is far from the identity."""
    block = FusedMOATBlock(8, SHAPE[1], head_dim=16, **options)
    for parameter in (*block.attention.parameters(), *block.attention_norm.parameters()):
        nn.init.normal_(parameter, 0.1, 0.3)
    return block.to(device)


def make_map(device: str, shape: tuple[int, ...] = SHAPE) -> Tensor:
    return torch.randn(shape).to(device, memory_format=torch.channels_last)


def train(function, block: nn.Module, y: Tensor) -> dict[str, Tensor]:
    """Output and gradients of one step of `function`; the drop path draws the same each time."""
    torch.manual_seed(1)
    block.zero_grad()
    leaf = y.detach().requires_grad_()
    output = function(block, leaf)
    generator = torch.Generator().manual_seed(2)
    output.backward(torch.randn(output.shape, generator=generator).to(output))
    gradients = {name: p.grad for name, p in block.named_parameters() if p.grad is not None}
    return {"output": output.detach(), "y": leaf.grad, **gradients}


def fused(block: nn.Module, y: Tensor) -> Tensor:
    with triton_only():
        output = block.attention_half(y)
    assert is_joined(output)
    return output


def is_joined(output: Tensor) -> bool:
    """Whether one autograd function computed it."""
    function = output.grad_fn
    while function.name() != "_AttentionHalfBackward" and function.next_functions:
        function = function.next_functions[0][0]
    return function.name() == "_AttentionHalfBackward"


def stock(block: nn.Module, y: Tensor) -> Tensor:
    with use_backend("reference"):
        return MOATBlock.attention_half(block, y)


def exactly(block: nn.Module, y: Tensor) -> dict[str, Tensor]:
    return train(stock, copy.deepcopy(block).double(), y.double())


def check(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        tolerance = BACKEND_OUTPUT if name == "output" else BACKEND_GRADIENT
        assert actual[name].dtype == torch.float32, name
        assert_close(actual[name], value, tolerance[torch.float32], name, floor=0.1)


@pytest.mark.oldest_triton
@pytest.mark.parametrize("drop_path", [0.0, 0.5])
@pytest.mark.parametrize("case", CASES)
def test_float32(case: str, drop_path: float, device: str) -> None:
    block, y = make_block(device, drop_path=drop_path, **CASES[case]), make_map(device)
    check(train(fused, block, y), exactly(block, y))


@pytest.mark.oldest_triton
@pytest.mark.parametrize("autocast", [True, False], ids=["autocast", "all of it"])
@pytest.mark.parametrize("dtype", LOW, ids=str)
def test_low_precision_is_as_close_to_float64_as_stock(
    dtype: torch.dtype, autocast: bool, device: str
) -> None:
    block, y = make_block(device, drop_path=0.5, **CASES["windows"]), make_map(device)
    if not autocast:
        block, y = block.to(dtype), y.to(dtype)
    with torch.autocast(device, dtype, enabled=autocast):
        eager, actual = train(stock, block, y), train(fused, block, y)
    for name, value in exactly(block, y).items():
        assert actual[name].dtype == eager[name].dtype, name
        allowed = LOW_PRECISION_FACTOR * relative_error(eager[name], value)
        assert_close(actual[name], value, allowed + torch.finfo(dtype).eps, name)


def test_gradients_of_float32_weights_are_not_rounded(device: str) -> None:
    block, y = make_block(device), make_map(device)
    with torch.autocast(device, torch.bfloat16):
        gradients = train(fused, block, y)
    for name in ("attention.qkv.weight", "attention.proj.weight", "attention.qkv.bias"):
        assert not torch.equal(gradients[name], gradients[name].bfloat16().float()), name


@pytest.fixture
def large_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    """All windows are taken for those with several backward kernels of attention."""
    monkeypatch.setattr(window_attention, "in_one", lambda *_: False)


@pytest.mark.usefixtures("large_windows")
@pytest.mark.parametrize("case", ["whole map", "windows"])
def test_large_windows(case: str, device: str) -> None:
    block, y = make_block(device, **CASES[case]), make_map(device)
    check(train(fused, block, y), exactly(block, y))


@pytest.mark.parametrize("channels_last", [True, False], ids=["channels_last", "contiguous"])
def test_memory_formats_are_kept(channels_last: bool, device: str) -> None:
    block, y = make_block(device), make_map(device)
    y = y if channels_last else y.contiguous()
    actual, expected = train(fused, block, y), exactly(block, y)
    check(actual, expected)
    assert actual["output"].stride() == expected["output"].stride()


def test_recomputing_changes_no_bit(device: str) -> None:
    block, y = make_block(device, drop_path=0.5), make_map(device)
    kept = train(fused, block, y)
    block.recompute = "block"
    again = train(fused, block, y)
    assert all(torch.equal(again[name], value) for name, value in kept.items())


def test_the_same_bits_every_time(device: str) -> None:
    block, y = make_block(device, **CASES["windows"]), make_map(device)
    with torch.autocast(device, torch.bfloat16):
        first, second = (train(fused, block, y) for _ in range(2))
    assert all(torch.equal(first[name], value) for name, value in second.items())


@pytest.mark.parametrize("windows", ["small_windows", "large_windows"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_stays_in_its_window(
    value: float, windows: str, device: str, request: pytest.FixtureRequest
) -> None:
    if windows == "large_windows":
        request.getfixturevalue(windows)
    block, y = make_block(device, window_size=4, position_size=4), make_map(device)
    y[1, 5, 4, 0] = value
    actual, expected = train(fused, block, y), train(stock, block, y)
    assert actual["output"][0].isfinite().all()
    for name in ("output", "y", "attention.qkv.bias"):
        assert torch.equal(actual[name].isfinite(), expected[name].isfinite()), name


@pytest.mark.parametrize("trained", ["attention.qkv.weight", "attention_norm.bias", None])
def test_only_what_needs_a_gradient_gets_one(trained: str | None, device: str) -> None:
    block, y = make_block(device, position_size=5), make_map(device)
    expected = exactly(block, y)
    for name, parameter in block.named_parameters():
        parameter.requires_grad_(name == trained)
    actual = train(fused, block, y)
    names = {"output", "y", trained} - {None}
    check(actual, {name: expected[name] for name in names})


def evaluated(block: nn.Module, y: Tensor) -> Tensor:
    """Without gradients; its launches are those of training's forward pass."""
    launched: list[str] = []
    listener = listening(lambda launch: launched.append(launch.kernel.fn.__name__))
    with torch.no_grad(), listener, triton_only():
        output = block.eval().attention_half(y)
    assert launched == ["norm_and_cast_kernel", "forward_kernel"]
    return output


@pytest.mark.parametrize("case", CASES)
def test_without_gradients(case: str, device: str) -> None:
    block, y = make_block(device, drop_path=0.5, **CASES[case]), make_map(device)
    with torch.no_grad():
        expected = stock(copy.deepcopy(block).double().eval(), y.double())
    actual = evaluated(block, y)
    assert actual.stride() == expected.stride()
    assert_close(actual, expected, BACKEND_OUTPUT[torch.float32], "output", floor=0.1)


@pytest.mark.parametrize("autocast", [True, False], ids=["autocast", "all of it"])
@pytest.mark.parametrize("dtype", LOW, ids=str)
def test_without_gradients_in_low_precision(
    dtype: torch.dtype, autocast: bool, device: str
) -> None:
    block, y = make_block(device, **CASES["windows"]).eval(), make_map(device)
    with torch.no_grad():
        exact = stock(copy.deepcopy(block).double(), y.double())
    if not autocast:
        block, y = block.to(dtype), y.to(dtype)
    with torch.no_grad(), torch.autocast(device, dtype, enabled=autocast):
        eager, actual = stock(block, y), evaluated(block, y)
    assert actual.dtype == eager.dtype
    allowed = LOW_PRECISION_FACTOR * relative_error(eager, exact)
    assert_close(actual, exact, allowed + torch.finfo(dtype).eps, "output")


def without_bias(block: FusedMOATBlock) -> None:
    block.attention.proj.bias = None


def with_a_hook(block: FusedMOATBlock) -> None:
    block.attention.qkv.register_forward_hook(lambda module, x, output: None)


def with_weights_made_at_the_call(block: FusedMOATBlock) -> None:
    nn.utils.parametrizations.weight_norm(block.attention.proj)


@pytest.mark.parametrize("change", [without_bias, with_a_hook, with_weights_made_at_the_call])
def test_what_is_not_covered_runs_as_layers(change, device: str) -> None:
    block, y = make_block(device), make_map(device)
    change(block)
    with use_backend("triton"):
        assert not is_joined(block.attention_half(y.requires_grad_()))
        actual = train(FusedMOATBlock.attention_half, block, y)
    check(actual, exactly(block, y))


def test_without_gradients_it_runs_as_layers(device: str) -> None:
    block, y = make_block(device), make_map(device)
    with triton_only(), torch.no_grad():
        output = block.attention_half(y)
    assert_close(output, exactly(block, y)["output"], BACKEND_OUTPUT[torch.float32])


@pytest.mark.parametrize("recompute", ["none", "block"])
def test_compiled_without_graph_breaks(recompute: str, device: str) -> None:
    block, y = make_block(device, drop_path=0.5, **CASES["windows"]), make_map(device)
    block.recompute = recompute
    torch._dynamo.reset()
    compiled = torch.compile(FusedMOATBlock.attention_half, fullgraph=True, backend="aot_eager")
    with triton_only():
        actual = train(compiled, block, y)
    check(actual, exactly(block, y))


def test_flops_are_counted_as_of_stock(device: str) -> None:
    block, y = make_block(device, window_size=(5, 7), position_size=5), make_map(device)
    counted = []
    for function in (stock, fused):
        with FlopCounterMode(display=False) as counter:
            train(function, block, y)
        counted.append(counter.get_total_flops())
    assert counted[0] == counted[1] > 0


def test_opcheck(device: str) -> None:
    block, y = make_block(device, **CASES["windows"]), make_map(device)
    *tensors, table = (t.detach() for t in block.read_attention_half())
    kept = torch.ones(len(y), device=device)
    settings = (block.attention.description.encode(), 1e-5, 2.0, torch.bfloat16)
    checks = ("test_schema", "test_faketensor")
    forward = torch.ops.moat_kernels.attention_half_forward.default
    backward = torch.ops.moat_kernels.attention_half_backward.default
    arguments = (y, tensors, table, kept)
    torch.library.opcheck(forward, (*arguments, *settings), test_utils=checks)
    output, *saved = forward(*arguments, *settings)
    for needed in ([True] * 8, [True, *[False] * 7]):
        torch.library.opcheck(
            backward,
            (torch.randn_like(output), *arguments, saved, *settings, needed),
            test_utils=checks,
        )
