"""torch.compile where sizes and settings change: one graph, no breaks, the eager result."""

from __future__ import annotations

import copy
from functools import partial

import pytest
import torch
from support.small_model import make_model
from support.tolerances import BACKEND_GRADIENT, BACKEND_ZERO_GRADIENT, assert_close
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint

import moat_kernels as mk
from moat_kernels.block_reading import read_block
from moat_kernels.ops.common.encoding import decode_fields
from moat_kernels.ops.mbconv.description import MBConvDescription, Norm


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
        if expected[name].abs().max() < BACKEND_ZERO_GRADIENT:  # zero but for rounding
            assert tensor.abs().max() <= BACKEND_ZERO_GRADIENT, name
            continue
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


# Of which attention, the bias tables and padding know nothing where a graph is made.
SIZES = ((96, 112), (97, 140), (128, 72), (130, 65), (72, 200))
WINDOWS = (None, None, (2, 3), None)  # of one stage; the last attends to the whole map


@pytest.mark.parametrize(
    ("fused", "train", "backend", "sizes"),
    [
        # What Inductor makes of these operators it makes in training too.
        (True, False, "aot_eager", SIZES),
        (True, True, "inductor", SIZES),
        # With Inductor each size is compiled: so it lowers gradients of stock convolutions.
        (False, True, "aot_eager", SIZES[:3]),
    ],
    ids=["fused eval", "fused training", "plain training"],
)
def test_one_graph_of_a_whole_model_serves_all_sizes(
    fused: bool, train: bool, backend: str, sizes: tuple[tuple[int, int], ...]
) -> None:
    eager = make_model(torch.float32, fused=fused, window_size=WINDOWS).train(train)
    compiled, counter = compile_dynamic(copy.deepcopy(eager), backend)
    check_same(compiled, eager, torch.randn(2, 3, *sizes[0]))
    compilations = counter.frame_count
    for batch, size in enumerate(sizes[1:], start=2):
        check_same(compiled, eager, torch.randn(batch, 3, *size))
    assert counter.frame_count == compilations


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

    @torch.compile(dynamic=True, fullgraph=True, backend="eager")
    def encode() -> str:
        return read_block(block).description.encode()

    assert MBConvDescription.decode(encode()) == read_block(block).description


def test_tuples_are_encoded() -> None:
    for padding in ("tf_same", (0, 1, 2, 3)):
        description = MBConvDescription(padding=padding, pre_norm=Norm(momentum=None))
        assert decode_fields(description.encode())["padding"] == padding
        assert MBConvDescription.decode(description.encode()) == description


def test_a_checkpointed_block_counts_its_batch_once() -> None:
    eager = mk.FusedMBConv(8, 8)
    torch._dynamo.reset()

    def checkpointed(block: nn.Module, x: Tensor) -> Tensor:
        return checkpoint(block, x, use_reentrant=False)

    block = copy.deepcopy(eager)
    compiled = torch.compile(partial(checkpointed, block), fullgraph=True)
    for _ in range(2):
        x = torch.randn(2, 8, 4, 4)
        for call in (eager, compiled):
            call(x.clone().requires_grad_()).square().sum().backward()
    for (name, buffer), expected in zip(block.named_buffers(), eager.buffers(), strict=True):
        assert_close(buffer, expected, BACKEND_GRADIENT[torch.float32], name)
