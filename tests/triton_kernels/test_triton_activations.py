"""Activations and derivatives inside Triton kernels against ops/activations.py in float64."""

from __future__ import annotations

import pytest
import torch
from support.tolerances import BACKEND_OUTPUT, assert_close

triton = pytest.importorskip("triton")

import triton.language as tl  # noqa: E402

from moat_kernels.ops.common.activations import activate as reference  # noqa: E402
from moat_kernels.ops.common.activations import activate_backward  # noqa: E402
from moat_kernels.ops.triton_support.activations import (  # noqa: E402
    activate,
    activation_derivative,
)

pytestmark = pytest.mark.oldest_triton
SIZE = 256


@triton.jit
def kernel(x, value, derivative, KIND: tl.constexpr, SIZE: tl.constexpr):
    index = tl.arange(0, SIZE)
    values = tl.load(x + index)
    tl.store(value + index, activate(values, KIND))
    tl.store(derivative + index, activation_derivative(values, KIND))


def test_gelu_and_its_derivative_within_1e_6(device: str) -> None:
    """Its polynomials everywhere, their ends included; -infinity is NaN, as PyTorch's is."""
    x = torch.cat(
        [torch.linspace(-9, 9, SIZE - 3), torch.tensor([float("inf"), -float("inf"), 0.0])]
    )
    x = x.to(device)
    value, derivative = torch.empty_like(x), torch.empty_like(x)
    kernel[(1,)](x, value, derivative, KIND="gelu", SIZE=SIZE)
    exact = x.double()
    expected = torch.nn.functional.gelu(exact)
    assert torch.equal(value.isnan(), expected.isnan())
    finite = exact.isfinite()
    assert (value.double() - expected)[finite].abs().max() < 1e-6
    slope = activate_backward("gelu", torch.ones_like(exact), exact)
    assert (derivative.double() - slope)[finite].abs().max() < 1e-6


@pytest.mark.parametrize("kind", ["gelu", "gelu_tanh", "silu", "relu", "identity"])
def test_values_and_derivatives(kind: str, device: str) -> None:
    x = torch.linspace(-12, 12, SIZE, device=device)
    x[:3] = torch.tensor([-60.0, 60.0, float("nan")])
    value, derivative = torch.empty_like(x), torch.empty_like(x)
    kernel[(1,)](x, value, derivative, KIND=kind, SIZE=SIZE)
    exact = x.double()
    assert_close(value, reference(kind, exact), BACKEND_OUTPUT[torch.float32])
    expected = activate_backward(kind, torch.ones_like(exact), exact)
    # ReLU passes no gradient at NaN, here; PyTorch's passes it all.
    comparable = slice(None) if kind != "relu" else ~exact.isnan()
    assert_close(derivative[comparable], expected[comparable], BACKEND_OUTPUT[torch.float32])
