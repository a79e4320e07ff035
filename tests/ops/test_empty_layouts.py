"""An empty batch gives an empty result and zero gradients, however its tensors are laid out."""

from __future__ import annotations

import pytest
import torch
from support.empty_layouts import empty_layouts
from support.mbconv_cases import CASES, copy_parameters, make_parameters
from support.native import needs_extension
from torch import Tensor, nn

from moat_kernels import FusedMBConv, FusedMOATBlock, create_model, use_backend
from moat_kernels.functional import WindowAttentionDescription, mbconv, window_attention
from moat_kernels.ops.linear import linear

BACKENDS = ["reference", "torch", pytest.param("cpu", marks=needs_extension)]


def check(compute, x: Tensor, shape: tuple[int, ...], leaves: list[Tensor]) -> None:
    """The result without and with gradients; leaves: what else takes gradients, of zeros."""
    with torch.no_grad():
        assert compute(x).shape == shape
    x = x.detach().requires_grad_()
    for grad in empty_layouts(shape).values():
        output = compute(x)
        assert output.shape == shape
        gradients = torch.autograd.grad(output, [x, *leaves], grad, allow_unused=True)
        assert gradients[0].shape == x.shape
        assert not any(gradient.any() for gradient in gradients[1:] if gradient is not None)


@pytest.mark.parametrize("window", [(3, 4), None], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_window_attention(backend: str, window: tuple[int, int] | None) -> None:
    description = WindowAttentionDescription(2, 8, window)
    height, width = description.window_for(6, 8)
    table = torch.randn(2, 2 * height - 1, 2 * width - 1, requires_grad=True)
    with use_backend(backend):
        for qkv in empty_layouts((0, 6, 8, 48)).values():
            check(lambda x: window_attention(x, table, description), qkv, (0, 6, 8, 16), [table])


@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
@pytest.mark.parametrize("name", ["stride 1", "squeeze-excite", "depthwise first"])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.filterwarnings("ignore::moat_kernels.FallbackWarning")
def test_mbconv(backend: str, name: str, training: bool) -> None:
    case = CASES[name]
    parameters = copy_parameters(make_parameters(case, torch.float32))
    leaves = [tensor for tensor in parameters if isinstance(tensor, Tensor)]

    def compute(x: Tensor) -> Tensor:
        return mbconv(x, parameters, case.description, training=training)

    with use_backend(backend):
        for x in empty_layouts((0, case.in_channels, 5, 6)).values():
            check(compute, x, (0, case.out_channels, 5, 6), leaves)


def test_linear() -> None:
    weight, bias = torch.randn(32, 16, requires_grad=True), torch.randn(32, requires_grad=True)
    for x in empty_layouts((0, 5, 16)).values():
        check(lambda x: linear(x, weight, bias), x, (0, 5, 32), [weight, bias])


MODULES = {
    "mbconv": (lambda: FusedMBConv(32, 32), (0, 32, 5, 6), (0, 32, 5, 6)),
    "moat": (
        lambda: FusedMOATBlock(32, 64, stride=2, window_size=3),
        (0, 32, 12, 12),
        (0, 64, 6, 6),
    ),
    "stem": (lambda: create_model("tiny_moat_0").stem, (0, 3, 9, 8), (0, 32, 5, 4)),
}


@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
@pytest.mark.parametrize("name", MODULES)
def test_modules(name: str, training: bool) -> None:
    make, in_shape, out_shape = MODULES[name]
    module: nn.Module = make().train(training)
    for x in empty_layouts(in_shape).values():
        check(module, x, out_shape, list(module.parameters()))
