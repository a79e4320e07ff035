"""Bytes and FLOPs of PyTorch's operators."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import moat_kernels as mk
from moat_kernels.ops.triton_support.traffic import Pass
from moat_kernels.plan.meter import Meter


def passes_of(function) -> list[Pass]:
    passes: list[Pass] = []
    with Meter(passes):
        function()
    return passes


def wide_crossings(passes: list[Pass], wide: int) -> int:
    return sum(
        len(crossing.shape) == 4 and crossing.shape[1] == wide and crossing.shape[2] > 1
        for one in passes
        for crossing in (*one.reads, *one.writes)
    )


def test_stock_crosses_memory_with_wide_tensors_14_times_forward_and_24_backward() -> None:
    block = mk.reference.MBConvBlock(16, 16, se_ratio=None).to("meta")
    x = torch.empty(4, 16, 12, 12, device="meta")
    forward: list[Pass] = []
    with mk.use_backend("reference"):
        with Meter(forward):
            output = block(x)
        assert wide_crossings(forward, 64) == 14
        loss = output.sum()
        assert wide_crossings(passes_of(loss.backward), 64) == 24


def test_a_convolution_and_its_gradients() -> None:
    x = torch.empty(2, 6, 8, 8, device="meta", requires_grad=True)
    weight = torch.empty(10, 6, 3, 3, device="meta", requires_grad=True)
    (forward,) = passes_of(lambda: F.conv2d(x, weight, padding=1))
    output = F.conv2d(x, weight, padding=1)
    flops = 2 * output.numel() * 6 * 9
    assert (forward.kernel, forward.flops) == ("convolution 3x3", flops)
    assert forward.bytes == 4 * (x.numel() + weight.numel() + output.numel())
    grad_x, grad_weight = passes_of(lambda: output.backward(output.detach()))
    assert grad_x.flops == grad_weight.flops == flops
    assert grad_x.bytes == 4 * (output.numel() + weight.numel() + x.numel())
    assert grad_weight.bytes == 4 * (output.numel() + x.numel() + weight.numel())


@pytest.mark.parametrize(
    ("dtype", "arithmetic"),
    [(torch.bfloat16, "bfloat16"), (torch.float32, "float32"), (torch.float64, "float64")],
    ids=str,
)
def test_matrix_products(dtype: torch.dtype, arithmetic: str) -> None:
    a = torch.empty(5, 3, 4, device="meta", dtype=dtype)
    (product,) = passes_of(lambda: a @ a.mT)
    assert (product.flops, product.arithmetic) == (2 * 5 * 3 * 4 * 3, arithmetic)


def test_views_and_allocations_cost_nothing() -> None:
    x = torch.empty(4, 6, device="meta")
    assert not passes_of(lambda: (x.view(2, 12).t(), x.expand(3, 4, 6), torch.empty_like(x)))


def test_in_place_operators_read_and_write_and_copies_overwrite() -> None:
    x, y = torch.empty(2, 4, 6, device="meta")
    (added,) = passes_of(lambda: x.add_(y))
    assert added.bytes == 3 * 24 * 4
    (copied,) = passes_of(lambda: x.copy_(y))
    assert copied.bytes == 2 * 24 * 4


def test_what_an_expanded_tensor_repeats_is_read_once() -> None:
    x = torch.empty(4, 1, device="meta").expand(4, 100)
    (one,) = passes_of(lambda: x.exp())
    assert [crossing.bytes for crossing in one.reads] == [16]
