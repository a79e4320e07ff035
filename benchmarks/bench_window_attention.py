"""Window attention with position bias: forward and backward, from packed qkv and the bias table.

The floor is the bare batched matrix products on contiguous operands: two forward, five backward
(the scores once more). torch.compile gets the same function as scaled_dot_product_attention.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from device import own_backends
from interleaved import Comparison, Contender, Group, contenders_of
from peers import compiled
from shapes import ATTENTION_MAPS, HEAD_DIM, TRAINING_BATCH, AttentionMap
from torch import Tensor

import moat_kernels as mk
from moat_kernels.functional import WindowAttentionDescription, window_attention
from moat_kernels.ops.window_attention.algebra.partition import partition, reverse
from moat_kernels.ops.window_attention.algebra.position_bias import gather_bias
from moat_kernels.ops.window_attention.reference import split_heads

OURS = ["reference", *own_backends()]


def scaled_dot_product(
    qkv: Tensor, table: Tensor, description: WindowAttentionDescription
) -> Tensor:
    """PyTorch's fused attention with the bias of all heads materialised, as users write it."""
    batch, height, width, _ = qkv.shape
    window = description.window_for(height, width)
    windows = split_heads(partition(qkv, window, "window"), description)
    bias = gather_bias(table, window)
    output = F.scaled_dot_product_attention(*windows.unbind(), attn_mask=bias)
    merged = output.transpose(1, 2).flatten(-2)
    return reverse(merged, (batch, height, width), window, "window")


def bare_products(windows: int, tokens: int) -> Contender:
    """scores, output; scores again, and the gradients of v, weights, q and k."""
    rows, scores = torch.randn(windows, tokens, HEAD_DIM), torch.randn(windows, tokens, tokens)
    columns = rows.transpose(1, 2).contiguous()

    def call() -> None:
        for _ in range(3):  # scores twice, gradient of the weights
            torch.bmm(rows, columns)
        for _ in range(4):  # output, gradients of v, q, k
            torch.bmm(scores, rows)

    return Contender(call)


def make_group(attention_map: AttentionMap, names: Sequence[str]) -> Group:
    """The contenders named, with the same input."""
    torch.manual_seed(0)
    size, window, channels = attention_map
    description = WindowAttentionDescription(
        channels // HEAD_DIM, HEAD_DIM, None if window is None else (window, window)
    )
    side = window or size
    qkv = torch.randn(TRAINING_BATCH, size, size, 3 * channels, requires_grad=True)
    table = torch.randn(description.heads, 2 * side - 1, 2 * side - 1, requires_grad=True)
    cotangent = torch.randn(TRAINING_BATCH, size, size, channels)
    windows = TRAINING_BATCH * (size // side) ** 2 * description.heads

    def contender(function: Callable[..., Tensor], backend: str | None = None) -> Contender:
        def forward() -> Tensor:
            if backend is None:
                return function(qkv, table, description)
            with mk.use_backend(backend):
                return function(qkv, table, description)

        def setup() -> None:
            qkv.grad = table.grad = None

        return Contender(lambda: forward().backward(cotangent), setup, forward, (qkv, table))

    def make(name: str) -> Contender:
        if name == "floor":
            return bare_products(windows, side * side)
        if name == "scaled_dot_product_attention":
            return contender(scaled_dot_product)
        if name == "torch.compile":
            return contender(compiled(scaled_dot_product))
        return contender(window_attention, name)

    flops = 7 * 2 * windows * side**4 * HEAD_DIM
    return Group(names, make, flops)


TRAINING = [
    Comparison(
        f"window_attention training {attention_map} batch {TRAINING_BATCH}",
        partial(make_group, attention_map),
        contenders=("floor", "scaled_dot_product_attention", "torch.compile", *OURS),
    )
    for attention_map in ATTENTION_MAPS
]


@pytest.mark.parametrize(("comparison", "contender"), contenders_of(TRAINING))
def test_window_attention(measure: Any, comparison: Comparison, contender: str) -> None:
    measure(comparison, contender)
