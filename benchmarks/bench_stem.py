"""The stem's training step: two convolutions with batch norm and GELU between.

Rows named after a backend are FusedStem; with "cpu" its norm and GELU are native. On a GPU it is
stock in channels_last and has no row. The floor is the two convolutions alone, which all rows leave
to the same library.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import pytest
import torch
from bench_mbconv import STOCK
from device import chosen, own_backends
from interleaved import Comparison, Contender, Group, contenders_of
from shapes import TRAINING_BATCH
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import moat_kernels as mk
from moat_kernels.stem import FusedStem, Stem

# (resolution, width) of tiny_moat_0 and moat_0.
SHAPES = [(256, 32), (224, 64)]


def make_contender(stem: nn.Module, x: Tensor, grad: Tensor, backend: str | None) -> Contender:
    """Forward and backward. backend: None for what needs no choice."""

    def forward() -> Tensor:
        if backend is None:
            return stem(x)
        with mk.use_backend(backend):
            return stem(x)

    return Contender(
        lambda: forward().backward(grad),
        lambda: stem.zero_grad(set_to_none=True),
        forward,
        (*stem.parameters(), *stem.buffers()),
    )


def make_group(resolution: int, width: int, names: Sequence[str]) -> Group:
    """The contenders named, with the same weights and images."""
    torch.manual_seed(0)
    stock = Stem(width)
    x = torch.randn(TRAINING_BATCH, 3, resolution, resolution)
    channels_last = x.contiguous(memory_format=torch.channels_last)
    grad = torch.randn_like(stock(channels_last))

    def make(name: str) -> Contender:
        if name == "floor":
            convolutions = nn.Sequential(stock.conv_0, stock.conv_1)
            return make_contender(convolutions, channels_last, grad, None)
        if name in STOCK:
            memory_format = STOCK[name]
            return make_contender(
                stock,
                x.contiguous(memory_format=memory_format),
                grad.contiguous(memory_format=memory_format),
                None,
            )
        backend, _, recompute = name.partition(" ")
        fused = FusedStem(width, recompute=bool(recompute))
        fused.load_state_dict(stock.state_dict())
        return make_contender(fused, channels_last, grad, backend)

    with FlopCounterMode(display=False) as counter:
        stock(x).backward(grad)
    return Group(names, make, counter.get_total_flops())


BACKENDS = own_backends()[-1:] if chosen() == "cpu" else []
OURS = [name for backend in BACKENDS for name in (backend, f"{backend} recompute")]
TRAINING = [
    Comparison(
        f"stem training {resolution} px to {width} channels",
        partial(make_group, resolution, width),
        contenders=("floor", *STOCK, *OURS),
    )
    for resolution, width in SHAPES
]


@pytest.mark.parametrize(("comparison", "contender"), contenders_of(TRAINING))
def test_stem(measure: Any, comparison: Comparison, contender: str) -> None:
    measure(comparison, contender)
