"""torch.compile where sizes and settings change: one graph, no breaks, the eager result."""

from __future__ import annotations

import copy

import pytest
import torch
from support.small_model import make_model
from support.tolerances import BACKEND_GRADIENT, assert_close
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

import moat_kernels as mk
from moat_kernels.ops.common.encoding import decode_fields
from moat_kernels.ops.mbconv.description import MBConvDescription, Norm

BLOCKS = {
    "MBConv": lambda: mk.FusedMBConv(16, 24, stride=2),
    "whole map": lambda: mk.FusedMOATBlock(16, 32, head_dim=16, position_size=4),
    "windows": lambda: mk.FusedMOATBlock(16, 32, head_dim=16, window_size=3, position_size=4),
}


def outputs(module: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """The output, and in training gradients and statistics."""
    x = x.clone().requires_grad_(module.training)
    with torch.set_grad_enabled(module.training):
        output = module(x)
    found = {"output": output.detach()}
    if module.training:
        module.zero_grad()
        output.square().sum().backward()
        found["x"] = x.grad
        found |= {name: parameter.grad for name, parameter in module.named_parameters()}
        found |= {name: buffer.clone() for name, buffer in module.named_buffers()}
    return {name.removeprefix("_orig_mod."): tensor for name, tensor in found.items()}


def check_same(compiled: nn.Module, eager: nn.Module, x: Tensor) -> None:
    expected = outputs(eager, x)
    for name, tensor in outputs(compiled, x).items():
        assert_close(tensor, expected[name], BACKEND_GRADIENT[torch.float32], name, 1e-3)


def compile_dynamic(
    module: nn.Module, backend: str = "aot_eager"
) -> tuple[nn.Module, CompileCounterWithBackend]:
    torch._dynamo.reset()
    counter = CompileCounterWithBackend(backend)
    return torch.compile(module, dynamic=True, fullgraph=True, backend=counter), counter


def set_norms(module: nn.Module, **settings: float) -> None:
    for norm in module.modules():
        if isinstance(norm, nn.BatchNorm2d):
            vars(norm).update(settings)


@pytest.mark.parametrize(
    ("name", "train"), [("MBConv", False), ("whole map", False), ("windows", True)]
)
def test_graphs_hold_for_maps_of_many_sizes(name: str, train: bool) -> None:
    """None is made for one size; even ones here, as padding of odd ones may have guards."""
    eager = BLOCKS[name]().train(train)
    compiled, counter = compile_dynamic(copy.deepcopy(eager))
    for size in ((8, 10), (14, 12), (20, 16)):
        check_same(compiled, eager, torch.randn(2, 16, *size))
    assert counter.frame_count < 3


def test_a_whole_model_of_two_sizes() -> None:
    eager = make_model(torch.float32).eval()
    compiled, _ = compile_dynamic(copy.deepcopy(eager), "eager")
    for size in ((64, 80), (96, 72)):
        check_same(compiled, eager, torch.randn(2, 3, *size))


def test_a_norm_that_changes_compiles_once_more() -> None:
    eager = mk.FusedMBConv(16, 16)
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("eager")
    compiled = torch.compile(copy.deepcopy(eager), fullgraph=True, backend=counter)
    x = torch.randn(2, 16, 8, 8)
    for calls, settings in enumerate(({}, {"momentum": 0.3}, {"eps": 0.1 + 0.2}), start=1):
        set_norms(eager, **settings)
        set_norms(compiled, **settings)
        for _ in range(2):
            check_same(compiled, eager, x)
        assert counter.frame_count == calls


def test_descriptions_keep_every_digit_when_traced() -> None:
    block = mk.FusedMBConv(16, 16)
    set_norms(block, eps=0.1 + 0.2)
    torch._dynamo.reset()
    encode = torch.compile(
        lambda: block.description().encode(), dynamic=True, fullgraph=True, backend="eager"
    )
    assert MBConvDescription.decode(encode()) == block.description()


def test_tuples_are_encoded() -> None:
    for padding in ("tf_same", (0, 1, 2, 3)):
        description = MBConvDescription(padding=padding, pre_norm=Norm(momentum=None))
        assert decode_fields(description.encode())["padding"] == padding
        assert MBConvDescription.decode(description.encode()) == description
