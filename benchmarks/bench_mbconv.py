"""The inverted bottleneck: eval, and a training step (forward and backward; stride 1, no SE).

The floor is the time of the block's bare matrix products by torch.mm: two in eval (three where the
shortcut is projected), six in training (three for each 1x1 convolution).
"""

from __future__ import annotations

from functools import lru_cache

import pytest
import torch
from interleaved import Contender, Group
from shapes import BLOCK_SHAPES, EXPAND_RATIO, OTHER_BLOCKS, TRAINING_BATCH
from torch import Tensor

import moat_kernels as mk
from moat_kernels.ops.backends import backend_status

STOCK = {"stock": torch.contiguous_format, "stock channels_last": torch.channels_last}
FUSED = [name for name in ("torch", "cpu") if backend_status()[name].usable]
EVAL = ["floor", *STOCK, *FUSED]
TRAINING = [
    "floor",
    *STOCK,
    *(f"{name} {level}" for name in FUSED for level in ("none", "expand", "block")),
]


def bare_products(rows: int, channels: int, training: bool) -> Contender:
    """The matrix products of both 1x1 convolutions, forward or forward and backward."""
    wide = EXPAND_RATIO * channels
    narrow_rows, wide_rows = torch.randn(rows, channels), torch.randn(rows, wide)
    expand, project = torch.randn(channels, wide), torch.randn(wide, channels)

    def call() -> None:
        torch.mm(narrow_rows, expand)
        torch.mm(wide_rows, project)
        if training:
            torch.mm(narrow_rows, project.t())  # of project: gradient of its input ...
            torch.mm(wide_rows.t(), narrow_rows)  # ... and of its weight
            torch.mm(wide_rows, expand.t())
            torch.mm(narrow_rows.t(), wide_rows)

    return Contender(call)


def bare_eval_products(sizes: list[tuple[int, int, int]]) -> Contender:
    """Products of [rows, depth] and [depth, columns] matrices, one after the other."""
    operands = [
        (torch.randn(rows, depth), torch.randn(depth, columns)) for rows, depth, columns in sizes
    ]

    def call() -> None:
        for left, right in operands:
            torch.mm(left, right)

    return Contender(call)


def eval_contender(block: torch.nn.Module, x: Tensor, backend: str | None) -> Contender:
    """One forward pass without gradients."""

    @torch.no_grad()
    def call() -> None:
        if backend is None:
            block(x)
        else:
            with mk.use_backend(backend):
                block(x)

    return Contender(call)


def training_contender(block: torch.nn.Module, x: Tensor, backend: str | None) -> Contender:
    """Forward and backward, gradients freshly allocated as in training."""
    x = x.detach().requires_grad_()
    cotangent = torch.randn_like(x)

    def forward() -> Tensor:
        if backend is None:
            return block(x)
        with mk.use_backend(backend):
            return block(x)

    def setup() -> None:
        block.zero_grad(set_to_none=True)
        x.grad = None

    state = (*block.parameters(), *block.buffers())
    return Contender(lambda: forward().backward(cotangent), setup, forward, state)


@lru_cache(maxsize=1)  # contenders of a group run one after the other
def make_group(size: int, channels: int, batch: int, training: bool) -> Group:
    """All contenders for one shape, with the same weights and input."""
    torch.manual_seed(0)
    make = training_contender if training else eval_contender
    x = torch.randn(batch, channels, size, size)
    channels_last = x.to(memory_format=torch.channels_last)
    stock = mk.reference.MBConvBlock(channels, channels, se_ratio=None).train(training)
    contenders = {"floor": bare_products(batch * size * size, channels, training)}
    for name, memory_format in STOCK.items():
        contenders[name] = make(stock, x.contiguous(memory_format=memory_format), None)
    for name in TRAINING if training else EVAL:
        backend, _, level = name.partition(" ")
        if backend not in FUSED:
            continue
        block = mk.FusedMBConv(channels, channels, se_ratio=None, recompute=level or "auto")
        block.load_state_dict(stock.state_dict())
        contenders[name] = make(block.train(training), channels_last, backend)
    products = 6 if training else 2
    flops = products * 2 * batch * size * size * channels * EXPAND_RATIO * channels
    mode = "training" if training else "eval"
    name = f"mbconv {mode} {size}x{size}x{channels} batch {batch}"
    return Group(name, contenders, flops, floor="floor")


@lru_cache(maxsize=1)
def make_other_group(
    size: int, in_channels: int, out_channels: int, stride: int, gated: bool, batch: int
) -> Group:
    """Eval of a block with stride or gate; `size` is that of its output."""
    torch.manual_seed(0)
    options = {"stride": stride, "se_ratio": 0.25 if gated else None}
    x = torch.randn(batch, in_channels, stride * size, stride * size)
    channels_last = x.to(memory_format=torch.channels_last)
    wide, rows = EXPAND_RATIO * out_channels, batch * size * size
    products = [(rows * stride**2, in_channels, wide), (rows, wide, out_channels)]
    if in_channels != out_channels:
        products.append((rows, in_channels, out_channels))
    contenders = {"floor": bare_eval_products(products)}
    stock = mk.reference.MBConvBlock(in_channels, out_channels, **options).eval()
    for name, memory_format in STOCK.items():
        contenders[name] = eval_contender(stock, x.contiguous(memory_format=memory_format), None)
    for name in FUSED:
        block = mk.FusedMBConv(in_channels, out_channels, **options)
        block.load_state_dict(stock.state_dict())
        contenders[name] = eval_contender(block.eval(), channels_last, name)
    flops = sum(2 * rows * depth * columns for rows, depth, columns in products)
    kind = f"stride {stride}{', squeeze-excite' if gated else ''}"
    name = f"mbconv eval {size}x{size}x{out_channels} {kind} batch {batch}"
    return Group(name, contenders, flops, floor="floor")


@pytest.mark.parametrize("contender", EVAL)
@pytest.mark.parametrize("batch", [1, pytest.param(8, marks=pytest.mark.full)])
@pytest.mark.parametrize(("size", "channels"), BLOCK_SHAPES)
def test_eval(measure, size: int, channels: int, batch: int, contender: str) -> None:
    measure(make_group(size, channels, batch, training=False), contender)


@pytest.mark.parametrize("contender", TRAINING)
@pytest.mark.parametrize(("size", "channels"), BLOCK_SHAPES)
def test_training(measure, size: int, channels: int, contender: str) -> None:
    measure(make_group(size, channels, TRAINING_BATCH, training=True), contender)


@pytest.mark.parametrize("contender", EVAL)
@pytest.mark.parametrize("batch", [1, pytest.param(8, marks=pytest.mark.full)])
@pytest.mark.parametrize(("size", "in_channels", "out_channels", "stride", "gated"), OTHER_BLOCKS)
def test_eval_of_other_blocks(
    measure,
    size: int,
    in_channels: int,
    out_channels: int,
    stride: int,
    gated: bool,
    batch: int,
    contender: str,
) -> None:
    group = make_other_group(size, in_channels, out_channels, stride, gated, batch)
    measure(group, contender)
