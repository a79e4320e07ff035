"""Shape inference: fused blocks and models on the meta device, and of fake tensors."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

import moat_kernels as mk
from moat_kernels.reference import MBConvBlock, MOATBlock


def make_model(fused: bool) -> nn.Module:
    sizes = {"stem_width": 8, "widths": (8, 16, 32, 32), "depths": (1, 1, 1, 1)}
    return mk.create_model("tiny_moat_0", fused=fused, num_classes=5, **sizes)


Make = Callable[[bool], nn.Module]
CASES: dict[str, tuple[Make, tuple[int, ...]]] = {
    "MBConv": (
        lambda fused: (mk.FusedMBConv if fused else MBConvBlock)(16, 24, stride=2),
        (2, 16, 9, 8),
    ),
    "MOAT": (
        lambda fused: (mk.FusedMOATBlock if fused else MOATBlock)(
            16, 32, head_dim=16, window_size=3, position_size=4
        ),
        (2, 16, 7, 8),
    ),
    "model": (make_model, (2, 3, 64, 64)),
}


def facts(tensor: Tensor) -> tuple[Any, ...]:
    return tuple(tensor.shape), tensor.dtype, tensor.stride()


def run(make: Make, fused: bool, shape: tuple[int, ...], train: bool, autocast: str) -> list[Any]:
    """Shape, dtype and strides of the output and of all gradients."""
    module = make(fused).train(train)
    x = torch.randn(shape).contiguous(memory_format=torch.channels_last).requires_grad_(train)
    context: contextlib.AbstractContextManager[object] = contextlib.nullcontext()
    if autocast:
        context = torch.autocast(autocast, dtype=torch.bfloat16)
    with context, torch.set_grad_enabled(train):
        output = module(x)
    if not train:
        return [facts(output)]
    output.float().sum().backward()
    gradients = [x.grad, *(parameter.grad for parameter in module.parameters())]
    return [facts(tensor) for tensor in (output, *gradients)]


@pytest.mark.filterwarnings("ignore:.*CUDA is not available")
@pytest.mark.parametrize("autocast", ["", "cpu", "cuda"])
@pytest.mark.parametrize("train", [False, True], ids=["eval", "training"])
@pytest.mark.parametrize("name", CASES)
def test_meta_tensors(name: str, train: bool, autocast: str) -> None:
    """As plain modules, whose meta tensors no autocast changes, and as the same call on a CPU."""
    make, shape = CASES[name]
    with torch.device("meta"):
        fused, plain = (run(make, fused, shape, train, autocast) for fused in (True, False))
    assert [each[:2] for each in fused] == [each[:2] for each in plain]
    assert fused == run(make, True, shape, train, "")


@pytest.mark.parametrize("autocast", ["", "cpu"])
@pytest.mark.parametrize("train", [False, True], ids=["eval", "training"])
@pytest.mark.parametrize("name", CASES)
def test_fake_tensors(name: str, train: bool, autocast: str) -> None:
    make, shape = CASES[name]
    with FakeTensorMode():
        fake = run(make, True, shape, train, autocast)
    assert fake == run(make, True, shape, train, autocast)
