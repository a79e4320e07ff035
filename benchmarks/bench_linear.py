"""The attention's linear layers in training: forward and backward of qkv and proj.

The floor is the three bare matrix products by torch.mm.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import pytest
import torch
from device import own_backends
from interleaved import Comparison, Contender, Group, contenders_of
from shapes import ATTENTION_MAPS, TRAINING_BATCH
from torch import Tensor

import moat_kernels as mk
from moat_kernels.ops.linear.api import linear

# use_backend("torch") is torch.nn.functional.linear. There is no kernel of "triton" for it.
OURS = tuple(name for name in own_backends() if name != "triton")


def bare_products(x: Tensor, weight: Tensor, grad: Tensor) -> Contender:
    """Output, and the gradients of x and of the weight."""

    def call() -> None:
        torch.mm(x, weight.t())
        torch.mm(grad, weight)
        torch.mm(grad.t(), x)

    return Contender(call)


def make_group(rows: int, channels: int, columns: int, names: Sequence[str]) -> Group:
    """The contenders named, for a layer from `channels` to `columns`, with the same input."""
    torch.manual_seed(0)
    x = torch.randn(rows, channels, requires_grad=True)
    weight = torch.randn(columns, channels, requires_grad=True)
    bias = torch.randn(columns, requires_grad=True)
    grad = torch.randn(rows, columns)

    def make(name: str) -> Contender:
        if name == "floor":
            return bare_products(x.detach(), weight.detach(), grad)

        def forward() -> Tensor:
            with mk.use_backend(name):
                return linear(x, weight, bias)

        def setup() -> None:
            x.grad = weight.grad = bias.grad = None

        return Contender(lambda: forward().backward(grad), setup, forward, (weight, bias))

    flops = 3 * 2 * rows * channels * columns
    return Group(names, make, flops)


TRAINING = [
    Comparison(
        f"linear training {rows} rows {channels} to {columns}",
        partial(make_group, rows, channels, columns),
        contenders=("floor", *OURS),
    )
    for rows, channels in sorted({(TRAINING_BATCH * size**2, c) for size, _, c in ATTENTION_MAPS})
    for columns in (3 * channels, channels)
]


@pytest.mark.parametrize(("comparison", "contender"), contenders_of(TRAINING))
def test_linear(measure: Any, comparison: Comparison, contender: str) -> None:
    measure(comparison, contender)
