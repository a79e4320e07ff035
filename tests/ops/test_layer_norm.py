"""`branch_layer_norm` where stock PyTorch computes it, and `add_branch`.

The kernels are tested by tests/triton_kernels/test_layer_norm_triton.py.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from support.native import needs_extension
from support.tolerances import (
    BACKEND_GRADIENT,
    LOW_PRECISION_FACTOR,
    assert_close,
    relative_error,
)
from torch import Tensor

from moat_kernels import use_backend
from moat_kernels.memory import saved_bytes
from moat_kernels.ops.layer_norm import add_branch, branch_layer_norm, covers


def test_without_kernels_it_is_stock() -> None:
    x = torch.randn(2, 3, 5, 8, requires_grad=True)
    weight, bias = torch.randn(2, 8)
    assert not covers(x, weight, bias)
    normalized, residual = branch_layer_norm(x, weight, bias, 1e-5)
    assert torch.equal(normalized, F.layer_norm(x, (8,), weight, bias, 1e-5))
    assert residual is x


def norm_step(x: Tensor, weight: Tensor, bias: Tensor) -> tuple[list[Tensor], Tensor]:
    """(gradients of a branch behind the norm and of what it is added to, the norm's result)."""
    leaves = [t.detach().requires_grad_() for t in (x, weight, bias)]
    normalized, residual = branch_layer_norm(*leaves, 1e-5)
    rows = normalized.to(x.dtype)  # as of the product that follows
    return list(torch.autograd.grad((rows.sin() * residual).sum(), leaves)), rows.detach()


@needs_extension
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [(1, 1, 1, 3), (2, 3, 5, 8), (2, 7, 4, 67)], ids=str)
def test_autocast_on_a_cpu(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """As exact as stock, whose result is rounded by the product that follows; 16 bits are saved."""
    x = torch.randn(shape).to(dtype)
    weight, bias = torch.randn(2, shape[-1])
    exact = norm_step(x.double(), weight.double(), bias.double())
    with torch.autocast("cpu", dtype), use_backend("reference"):
        stock_gradients, stock_rows = norm_step(x, weight, bias)
    with torch.autocast("cpu", dtype):
        assert covers(x, weight, bias)
        assert branch_layer_norm(x, weight, bias, 1e-5)[0].dtype == dtype
        gradients, rows = norm_step(x, weight, bias)
        tensors = [t.clone().requires_grad_() for t in (x, weight, bias)]
        saved = saved_bytes(lambda: branch_layer_norm(*tensors, 1e-5)[0], tensors)
    assert saved == 2 * 4 * x.numel() // shape[-1]  # mean and 1 / deviation of each row
    for actual, other, value in zip(
        [rows, *gradients], [stock_rows, *stock_gradients], [exact[1], *exact[0]], strict=True
    ):
        assert actual.dtype == other.dtype
        allowed = LOW_PRECISION_FACTOR * relative_error(other, value)
        assert_close(actual, value, allowed + torch.finfo(dtype).eps)


def test_what_the_cpu_backend_leaves_to_stock() -> None:
    x, weight, bias = torch.randn(2, 3, 8), torch.randn(8), torch.randn(8)
    with torch.autocast("cpu", torch.bfloat16):
        assert not covers(x, weight, bias)
        assert not covers(x.half(), weight, bias)
        assert not covers(x.bfloat16(), weight.bfloat16(), bias.bfloat16())
        assert not covers(x.bfloat16(), None, None)
        assert not covers(x[:0].bfloat16(), weight, bias)
    assert not covers(x.bfloat16(), weight, bias)


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
