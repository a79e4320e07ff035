"""The operators that a compiled training step has for the stem's convolutions."""

from __future__ import annotations

import copy

import pytest
import torch
from support.tolerances import BACKEND_GRADIENT, BACKEND_OUTPUT, assert_close
from torch import Tensor, nn
from torch._dynamo.backends.common import aot_autograd

from moat_kernels.ops.stem.convolution import convolution
from moat_kernels.reference import SameConv2d
from moat_kernels.stem import FusedStem, Stem


def gradients(output: Tensor, grad: Tensor, x: Tensor, conv: nn.Conv2d) -> list[Tensor]:
    return list(torch.autograd.grad(output, [x, *conv.parameters()], grad))


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("size", [(8, 6), (7, 8), (1, 5)])
def test_equals_the_convolution(size, stride: int, bias: bool, memory_format) -> None:
    conv = SameConv2d(3, 8, 3, stride, bias=bias).double()
    for batch in (0, 1, 3):
        x = torch.randn(batch, 3, *size, dtype=torch.float64).to(memory_format=memory_format)
        x.requires_grad_()
        expected, actual = conv(x), convolution(x, (conv.weight, conv.bias), stride)
        assert actual.is_contiguous(memory_format=torch.channels_last)
        assert_close(actual, expected, BACKEND_OUTPUT[torch.float64])
        grad = torch.randn_like(expected)
        found = gradients(actual, grad, x, conv)
        for mine, stock in zip(found, gradients(expected, grad, x, conv), strict=True):
            assert mine.shape == stock.shape
            assert_close(mine, stock, BACKEND_GRADIENT[torch.float64])
        assert found[0].stride() == x.stride()


def test_gradients_that_are_not_needed_are_not_computed() -> None:
    weight, bias = torch.randn(8, 3, 3, 3), torch.randn(8)
    x = torch.randn(2, 3, 6, 6, requires_grad=True)
    convolution(x, (weight, bias), 2).sum().backward()
    assert x.grad is not None
    found = torch.ops.moat_kernels.stem_convolution_backward(
        torch.randn(2, 8, 3, 3), x, weight, 2, [False, True, False]
    )
    assert [gradient.shape for gradient in found] == [weight.shape]


@pytest.mark.parametrize("stride", [1, 2])
def test_opcheck(stride: int) -> None:
    checks = ("test_schema", "test_faketensor")
    operators = torch.ops.moat_kernels
    weight, bias = torch.randn(8, 3, 3, 3), torch.randn(8)
    for memory_format in (torch.contiguous_format, torch.channels_last):
        x = torch.randn(2, 3, 7, 6).to(memory_format=memory_format)
        call = (x, weight, bias, stride)
        torch.library.opcheck(operators.stem_convolution.default, call, test_utils=checks)
        grad = torch.randn_like(operators.stem_convolution(*call))
        for needs in ([True, True, True], [False, True, False]):
            torch.library.opcheck(
                operators.stem_convolution_backward.default,
                (grad, x, weight, stride, needs),
                test_utils=checks,
            )


@pytest.mark.parametrize("autocast", [False, True])
def test_compiled_training_calls_them(autocast: bool) -> None:
    """With gradients and statistics of the stem that is not compiled, autocast to bfloat16 too."""
    called = []

    def compile_graph(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> torch.fx.GraphModule:
        called.extend(
            str(node.target) for node in graph.graph.nodes if "kernels.stem_" in str(node.target)
        )
        return graph

    torch.manual_seed(0)
    fused = FusedStem(16)
    stock = copy.deepcopy(fused)
    stock.__class__ = Stem
    torch._dynamo.reset()
    backend = aot_autograd(fw_compiler=compile_graph)
    compiled = torch.compile(fused, fullgraph=True, backend=backend)
    x = torch.randn(2, 3, 17, 12)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        actual, expected = compiled(x), stock(x)
    assert actual.dtype == expected.dtype == (torch.bfloat16 if autocast else torch.float32)
    grad = torch.randn_like(expected)
    actual.backward(grad)
    expected.backward(grad)
    assert called == [
        *["moat_kernels.stem_convolution.default"] * 2,
        *["moat_kernels.stem_convolution_backward.default"] * 2,
    ]
    tolerance = 2e-2 if autocast else BACKEND_GRADIENT[torch.float32]
    assert_close(actual, expected, tolerance)
    for (name, mine), other in zip(fused.named_parameters(), stock.parameters(), strict=True):
        assert mine.grad.dtype == torch.float32
        if name != "conv_0.bias":  # before a norm: zero but for rounding
            assert_close(mine.grad, other.grad, tolerance, name)
    for mine, other in zip(fused.buffers(), stock.buffers(), strict=True):
        assert_close(mine.double(), other.double(), tolerance)
