"""`branch_layer_norm` where stock PyTorch computes it, and `add_branch`.

The kernels are tested by tests/triton_kernels/test_layer_norm_triton.py.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from support.tolerances import BACKEND_GRADIENT, assert_close
from torch import Tensor

from moat_kernels.ops.layer_norm import add_branch, branch_layer_norm, covers


def test_without_kernels_it_is_stock() -> None:
    x = torch.randn(2, 3, 5, 8, requires_grad=True)
    weight, bias = torch.randn(2, 8)
    assert not covers(x, weight, bias)
    normalized, residual = branch_layer_norm(x, weight, bias, 1e-5)
    assert torch.equal(normalized, F.layer_norm(x, (8,), weight, bias, 1e-5))
    assert residual is x


def step(function, x: Tensor, branch: Tensor, scale: Tensor | None) -> list[Tensor]:
    leaves = [t.detach().requires_grad_() for t in (x, branch)]
    output = function(*leaves, scale)
    return [output, *torch.autograd.grad(output.square().sum(), leaves)]


def stock(x: Tensor, branch: Tensor, scale: Tensor | None) -> Tensor:
    return x + (branch if scale is None else branch * scale[:, None, None, None])


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("batch", [0, 1, 3])
def test_sum(batch: int, scaled: bool) -> None:
    x, branch = torch.randn(2, batch, 3, 5, 7, dtype=torch.float64)
    scale = torch.linspace(0, 2, batch, dtype=torch.float64) if scaled else None
    for actual, expected in zip(
        step(add_branch, x, branch, scale), step(stock, x, branch, scale), strict=True
    ):
        assert_close(actual, expected, BACKEND_GRADIENT[torch.float64])


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("x_dtype", [torch.float32, torch.bfloat16], ids=str)
def test_dtypes_are_those_of_stock(x_dtype: torch.dtype, autocast: bool) -> None:
    """A bfloat16 branch of a map in either dtype; the sum is rounded once."""
    x, branch = torch.randn(2, 3, 4, 4, 7)
    x, branch, scale = x.to(x_dtype), branch.bfloat16(), torch.tensor([0, 1.25, 1.25]).bfloat16()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        actual, expected = step(add_branch, x, branch, scale), step(stock, x, branch, scale)
    for ours, theirs in zip(actual, expected, strict=True):
        assert ours.dtype == theirs.dtype
        assert_close(ours, theirs, 2 * torch.finfo(torch.bfloat16).eps)


def test_only_the_scale_is_kept() -> None:
    saved: list[Tensor] = []
    x, branch = torch.randn(2, 3, 4, 4, 7, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        add_branch(x, branch, torch.ones(3))
    assert [tuple(tensor.shape) for tensor in saved] == [(3,)]


def test_memory_format_is_that_of_stock() -> None:
    x = torch.randn(2, 3, 4, 5).permute(0, 2, 3, 1)
    branch = torch.randn(2, 4, 5, 3)
    assert add_branch(x, branch, torch.ones(2)).stride() == stock(x, branch, None).stride()
