"""How calls run on a GPU: captured in graphs, compiled, on the current stream, on any device."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from support.backend_comparison import Results, train_step
from support.tolerances import BACKEND_GRADIENT, BACKEND_OUTPUT, assert_close
from torch import Tensor, nn

import moat_kernels as mk

MODULES: dict[str, Callable[[], nn.Module]] = {
    "MBConv": lambda: mk.FusedMBConv(64, 64),
    "MBConv, stride 2": lambda: mk.FusedMBConv(64, 96, stride=2),
    "MBConv, expand": lambda: mk.FusedMBConv(64, 64, recompute="expand"),
    "MOAT": lambda: mk.FusedMOATBlock(64, 64, window_size=7),
}
each_module = pytest.mark.parametrize("name", MODULES)
each_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)


def make(name: str, dtype: torch.dtype, device: str) -> tuple[nn.Module, Tensor]:
    """(a module, a batch for it)."""
    torch.manual_seed(0)
    x = torch.randn(4, 64, 14, 14, device=device, dtype=dtype)
    return MODULES[name]().to(device, dtype), x.to(memory_format=torch.channels_last)


def same(actual: Results, expected: Results) -> None:
    for name, value in expected.items():
        assert torch.equal(actual[name], value), name


def warm_up(function: Callable[[], object]) -> None:
    """As PyTorch asks before a capture: on another stream, so that nothing is left to compile."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            function()
    torch.cuda.current_stream().wait_stream(stream)


@each_dtype
@each_module
def test_evaluation_in_a_graph(name: str, dtype: torch.dtype, cuda: str, kernels: None) -> None:
    module, x = make(name, dtype, cuda)
    module.eval()
    with torch.no_grad():
        warm_up(lambda: module(x))
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            output = module(x)
        x.copy_(torch.randn_like(x))
        graph.replay()
        assert torch.equal(output, module(x))


@each_dtype
@each_module
def test_a_training_step_in_a_graph(
    name: str, dtype: torch.dtype, cuda: str, kernels: None
) -> None:
    """Forward, backward, running statistics and the optimiser's step."""
    module, x = make(name, dtype, cuda)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.01)
    cotangent = torch.randn_like(module(x))
    initial = copy.deepcopy(module.state_dict())

    def step() -> Tensor:
        optimizer.zero_grad(set_to_none=True)
        output = module(x)
        output.backward(cotangent)
        optimizer.step()
        return output

    warm_up(step)
    graph = torch.cuda.CUDAGraph()
    optimizer.zero_grad(set_to_none=True)
    with torch.cuda.graph(graph):
        output = step()
    x.copy_(torch.randn_like(x))
    module.load_state_dict(initial)
    graph.replay()
    replayed = {"output": output.clone(), **copy.deepcopy(module.state_dict())}
    module.load_state_dict(initial)
    expected = step().detach()
    same(replayed, {"output": expected, **module.state_dict()})


@each_dtype
@each_module
def test_compiled_without_a_break(name: str, dtype: torch.dtype, cuda: str, kernels: None) -> None:
    module, x = make(name, dtype, cuda)
    compiled = torch.compile(copy.deepcopy(module), fullgraph=True)
    actual, expected = train_step(compiled, x), train_step(module, x)
    # What is compiled around the operators may round elsewhere.
    slack = 1 if dtype == torch.float32 else torch.finfo(dtype).eps / torch.finfo(torch.float32).eps
    for key, value in expected.items():
        tolerance = BACKEND_OUTPUT if key == "output" else BACKEND_GRADIENT
        name = key if key in ("output", "x") else f"_orig_mod.{key}"
        assert_close(actual[name], value, slack * tolerance[torch.float32], key)


@each_module
def test_compiled_with_graphs(name: str, cuda: str, kernels: None) -> None:
    module, x = make(name, torch.bfloat16, cuda)
    module.eval()
    compiled = torch.compile(module, fullgraph=True, mode="reduce-overhead")
    with torch.no_grad():
        for _ in range(3):
            output = compiled(x).clone()
        assert_close(output, module(x), 1e-2)


@each_module
def test_the_host_never_waits(name: str, cuda: str, kernels: None) -> None:
    module, x = make(name, torch.bfloat16, cuda)
    x.requires_grad_()
    cotangent = torch.randn_like(module(x))
    module(x).backward(cotangent)  # compiles, and waits for that
    torch.cuda.set_sync_debug_mode("error")
    try:
        module(x).backward(cotangent)
        with torch.no_grad():
            module.eval()(x)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@each_module
def test_kernels_run_on_the_current_stream(name: str, cuda: str, kernels: None) -> None:
    """What is not ordered behind the late copy would read zeros."""
    module, x = make(name, torch.bfloat16, cuda)
    expected = train_step(copy.deepcopy(module), x)
    late = torch.zeros_like(x)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(200_000_000)
        late.copy_(x)
        actual = train_step(module, late)
    stream.synchronize()
    same(actual, expected)


@each_module
def test_another_device_than_the_current_one(name: str, cuda: str, kernels: None) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("one GPU")
    module, x = make(name, torch.bfloat16, cuda)
    expected = train_step(copy.deepcopy(module), x)
    actual = train_step(copy.deepcopy(module).to("cuda:1"), x.to("cuda:1"))
    assert torch.cuda.current_device() == 0
    for key, value in expected.items():
        assert actual[key].device == torch.device("cuda:1")
        assert_close(actual[key].to(cuda), value, 1e-2, key)
