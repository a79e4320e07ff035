"""The inverted bottleneck: eval, and a training step (forward and backward; stride 1, no SE).

The floor is the time of the block's bare matrix products by torch.mm: two in eval (three where the
shortcut is projected), six in training (three for each 1x1 convolution). A second floor computes
them by oneDNN (floor.py).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import pytest
import torch
from device import frozen_backends, own_backends
from floor import Product, product_floors
from interleaved import Comparison, Contender, Group, contenders_of
from peers import checkpointed, compiled
from runtimes import Served, available, make_runtime
from shapes import (
    EVAL_BATCHES,
    EXPAND_RATIO,
    OTHER_BLOCKS,
    PLAIN_BLOCKS,
    TRAINING_BATCH,
    Block,
)
from torch import Tensor

import moat_kernels as mk
from moat_kernels.reference import MBConvBlock

FLOORS = product_floors()
STOCK = {"stock": torch.contiguous_format, "stock channels_last": torch.channels_last}
FUSED = own_backends()
FROZEN = frozen_backends()
# In float32, as the floors.
RUNTIMES = available("OpenVINO float32", "ONNX Runtime", "torch.compile")
LEVELS = ("auto", "none", "expand", "block")


def eval_contender(block: torch.nn.Module, x: Tensor, backend: str | None = None) -> Contender:
    """One forward pass without gradients."""

    @torch.no_grad()
    def call() -> None:
        if backend is None:
            block(x)
        else:
            with mk.use_backend(backend):
                block(x)

    return Contender(call)


def training_contender(
    block: torch.nn.Module,
    x: Tensor,
    backend: str | None = None,
    run: Callable[[Tensor], Tensor] | None = None,
) -> Contender:
    """Forward (by `run`, if given) and backward of the block, gradients freshly allocated."""
    x = x.detach().requires_grad_()
    cotangent = torch.randn_like(x)
    run = block if run is None else run

    def forward() -> Tensor:
        if backend is None:
            return run(x)
        with mk.use_backend(backend):
            return run(x)

    def setup() -> None:
        block.zero_grad(set_to_none=True)
        x.grad = None

    state = (*block.parameters(), *block.buffers())
    return Contender(lambda: forward().backward(cotangent), setup, forward, state)


def product_sizes(block: Block, batch: int) -> list[tuple[int, int, int]]:
    """(rows, depth, columns) of the matrix products of a forward pass."""
    wide, rows = EXPAND_RATIO * block.out_channels, batch * block.size**2
    sizes = [(rows * block.stride**2, block.in_channels, wide), (rows, wide, block.out_channels)]
    if block.in_channels != block.out_channels:
        sizes.append((rows, block.in_channels, block.out_channels))
    return sizes


def make_floor(
    product: Product, sizes: Sequence[tuple[int, int, int]], training: bool
) -> Contender:
    """`product` of all [rows, depth] by [depth, columns] matrices, one after the other.

    In training with the two products more of each that its gradients are: of left and of right.
    """
    operands = [
        (torch.randn(rows, depth), torch.randn(depth, columns), torch.randn(rows, columns))
        for rows, depth, columns in sizes
    ]

    def call() -> None:
        for left, right, gradient in operands:
            product(left, right)
            if training:
                product(gradient, right.t())
                product(left.t(), gradient)

    return Contender(call)


def make_blocks(
    block: Block, batch: int
) -> tuple[MBConvBlock, Callable[..., mk.FusedMBConv], Tensor]:
    """The stock block, a maker of fused ones with its weights, and an input (channels_last)."""
    torch.manual_seed(0)
    channels = (block.in_channels, block.out_channels)
    options = {"stride": block.stride, "se_ratio": 0.25 if block.gated else None}
    stock = MBConvBlock(*channels, **options)

    def make_fused(recompute: str) -> mk.FusedMBConv:
        fused = mk.FusedMBConv(*channels, recompute=recompute, **options)
        fused.load_state_dict(stock.state_dict())
        return fused

    side = block.stride * block.size
    x = torch.randn(batch, block.in_channels, side, side)
    return stock, make_fused, x.to(memory_format=torch.channels_last)


def make_eval_group(block: Block, batch: int, names: Sequence[str]) -> Group:
    stock, make_fused, x = make_blocks(block, batch)
    stock.eval()
    sizes = product_sizes(block, batch)
    served = Served(stock, x)

    def make(name: str) -> Contender:
        if name in FLOORS:
            return make_floor(FLOORS[name], sizes, training=False)
        if name in STOCK:
            return eval_contender(stock, x.contiguous(memory_format=STOCK[name]))
        if name in RUNTIMES:
            return make_runtime(name, served)
        fused = make_fused("auto").eval()
        return eval_contender(mk.freeze(fused) if name in FROZEN else fused, x, name.split()[0])

    return Group(names, make, flops=total_flops(sizes))


def make_training_group(block: Block, batch: int, names: Sequence[str]) -> Group:
    stock, make_fused, x = make_blocks(block, batch)
    sizes = product_sizes(block, batch)

    def make(name: str) -> Contender:
        if name in FLOORS:
            return make_floor(FLOORS[name], sizes, training=True)
        if name in STOCK:
            return training_contender(stock, x.contiguous(memory_format=STOCK[name]))
        if name == "stock checkpoint":
            return training_contender(stock, x, run=checkpointed(stock))
        if name == "torch.compile":
            return training_contender(stock, x, run=compiled(stock))
        backend, level = name.split()
        return training_contender(make_fused(level), x, backend)

    return Group(names, make, flops=3 * total_flops(sizes))


def total_flops(sizes: Sequence[tuple[int, int, int]]) -> float:
    return sum(2 * rows * depth * columns for rows, depth, columns in sizes)


EVAL = [
    Comparison(
        f"mbconv eval {block} batch {batch}",
        partial(make_eval_group, block, batch),
        contenders=(*FLOORS, *STOCK, *RUNTIMES[:-1], *FUSED, *FROZEN),
        slow=RUNTIMES[-1:],
        full=batch != EVAL_BATCHES[0],
    )
    for block in (*PLAIN_BLOCKS, *OTHER_BLOCKS)
    for batch in EVAL_BATCHES
]
TRAINING = [
    Comparison(
        f"mbconv training {block} batch {TRAINING_BATCH}",
        partial(make_training_group, block, TRAINING_BATCH),
        contenders=(
            *(*FLOORS, *STOCK, "stock checkpoint", "torch auto"),
            *(f"{name} {level}" for level in LEVELS for name in FUSED[1:]),
        ),
        slow=("torch.compile", "torch expand", "torch block"),
    )
    for block in PLAIN_BLOCKS
]


@pytest.mark.parametrize(("comparison", "contender"), contenders_of([*EVAL, *TRAINING]))
def test_mbconv(measure: Any, comparison: Comparison, contender: str) -> None:
    measure(comparison, contender)
