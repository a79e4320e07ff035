"""What the host does for a MOAT block on a GPU: Python, the dispatcher, launching.

One forward and one backward pass under bfloat16 autocast of maps so small that computing them takes
next to nothing. Stock modules run on the CPU as they are; of fused ones the Triton kernels are
launched by a launcher that does nothing (pretend_gpu.py), their stock operators run.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import pytest
import torch
from device import chosen
from interleaved import Comparison, Contender, Group, contenders_of
from torch import Tensor, nn

import moat_kernels as mk
from moat_kernels.ops.triton_support.launching import triton_missing

CHANNELS, SIZE = 32, 4


def step(block: nn.Module, x: Tensor, on_gpu: Callable[[], Any]) -> None:
    with on_gpu():
        with torch.autocast("cpu", torch.bfloat16):
            y = block(x)
        y.backward(y)


def make_group(names: Sequence[str]) -> Group:
    x = torch.randn(2, CHANNELS, SIZE, SIZE, dtype=torch.bfloat16, requires_grad=True)
    plain = mk.reference.MOATBlock(CHANNELS, CHANNELS, drop_path=0.1)
    fused = mk.FusedMOATBlock(CHANNELS, CHANNELS, drop_path=0.1)
    calls = {"stock": partial(step, plain, x, partial(mk.use_backend, "reference"))}
    if "fused" in names:
        from pretend_gpu import launching_nothing

        calls["fused"] = partial(step, fused, x, launching_nothing)
    return Group(names, lambda name: Contender(calls[name]), 0.0)


HOST_TIME = [
    Comparison(
        "host time of a MOAT block in training",
        make_group,
        contenders=("stock", "fused") if chosen() == "cpu" and not triton_missing() else (),
    )
]


@pytest.mark.parametrize(("comparison", "contender"), contenders_of(HOST_TIME))
def test_host_time(measure: Any, comparison: Comparison, contender: str) -> None:
    measure(comparison, contender)
