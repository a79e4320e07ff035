"""Window attention with position bias: forward and backward, from packed qkv and the bias table.

The floor is the bare batched matrix products on contiguous operands: two forward, five backward
(the scores once more).
"""

from __future__ import annotations

from functools import lru_cache

import pytest
import torch
import torch.nn.functional as F
from interleaved import Contender, Group
from shapes import ATTENTION_SHAPES, HEAD_DIM, TRAINING_BATCH
from torch import Tensor

import moat_kernels as mk
from moat_kernels.functional import WindowAttentionDescription, window_attention
from moat_kernels.ops.backends import backend_status
from moat_kernels.ops.window_attention.partition import partition, reverse
from moat_kernels.ops.window_attention.position_bias import gather_bias
from moat_kernels.ops.window_attention.reference import split_heads

OURS = [name for name in ("reference", "torch", "cpu") if backend_status()[name].usable]
CONTENDERS = ["floor", "scaled_dot_product_attention", *OURS]


def scaled_dot_product(
    qkv: Tensor, table: Tensor, description: WindowAttentionDescription
) -> Tensor:
    """PyTorch's fused attention with the bias of all heads materialised, as users write it."""
    _, height, width, _ = qkv.shape
    window = description.window_for(height, width)
    windows = split_heads(partition(qkv, window, "window"), description).flatten(1, 2)
    bias = gather_bias(table, window)
    output = F.scaled_dot_product_attention(*windows.unbind(), attn_mask=bias)
    merged = output.transpose(1, 2).flatten(-2)
    return reverse(merged.unflatten(0, (qkv.shape[0], -1)), height, width, window, "window")


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


@lru_cache(maxsize=1)  # contenders of a group run one after the other
def make_group(size: int, window: int | None, channels: int) -> Group:
    """All contenders for one shape, with the same input."""
    torch.manual_seed(0)
    description = WindowAttentionDescription(
        channels // HEAD_DIM, HEAD_DIM, None if window is None else (window, window)
    )
    side = window or size
    qkv = torch.randn(TRAINING_BATCH, size, size, 3 * channels, requires_grad=True)
    table = torch.randn(description.heads, 2 * side - 1, 2 * side - 1, requires_grad=True)
    cotangent = torch.randn(TRAINING_BATCH, size, size, channels)

    def contender(function, backend: str | None) -> Contender:
        def forward() -> Tensor:
            if backend is None:
                return function(qkv, table, description)
            with mk.use_backend(backend):
                return function(qkv, table, description)

        def setup() -> None:
            qkv.grad = table.grad = None

        return Contender(lambda: forward().backward(cotangent), setup, forward, (qkv, table))

    windows = TRAINING_BATCH * (size // side) ** 2 * description.heads
    contenders = {
        "floor": bare_products(windows, side * side),
        "scaled_dot_product_attention": contender(scaled_dot_product, None),
        **{name: contender(window_attention, name) for name in OURS},
    }
    flops = 7 * 2 * windows * side**4 * HEAD_DIM
    kind = "whole map" if window is None else f"{window}x{window} windows"
    name = f"window_attention training {size}x{size}x{channels} {kind} batch {TRAINING_BATCH}"
    return Group(name, contenders, flops, floor="floor")


@pytest.mark.parametrize("contender", CONTENDERS)
@pytest.mark.parametrize(("size", "window", "channels"), ATTENTION_SHAPES)
def test_training(measure, size: int, window: int | None, channels: int, contender: str) -> None:
    measure(make_group(size, window, channels), contender)
