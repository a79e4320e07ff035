"""What it costs to read the modules of a model at every call, beside the call.

"reading" looks at every module of the fused parts (hooks, classes, settings), gathers their
tensors and computes nothing. Frozen models read nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import pytest
import torch
from device import chosen
from interleaved import Comparison, Contender, Group, contenders_of
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import moat_kernels as mk
from moat_kernels.block_reading import read_block
from moat_kernels.stem import FusedStem

RESOLUTION = 256


def reader(model: nn.Module) -> Callable[[], None]:
    """Reads what a call of the model reads."""
    stem = next(module for module in model.modules() if isinstance(module, FusedStem))
    blocks = [module for module in model.modules() if isinstance(module, mk.FusedMBConv)]
    moats = [module for module in model.modules() if isinstance(module, mk.FusedMOATBlock)]

    def read() -> None:
        stem.read()
        for block in (*blocks, *moats):
            read_block(block)
        for block in moats:
            block.read_attention_half()

    return read


def make_group(names: Sequence[str]) -> Group:
    model = mk.create_model("tiny_moat_0").eval()
    x = torch.randn(1, 3, RESOLUTION, RESOLUTION).contiguous(memory_format=torch.channels_last)
    calls: dict[str, Callable[[], Any]] = {
        "model": torch.no_grad()(partial(model, x)),
        "reading": torch.no_grad()(reader(model)),
    }
    with FlopCounterMode(display=False) as counter:
        mk.create_model("tiny_moat_0", fused=False).eval()(x)
    return Group(names, lambda name: Contender(calls[name]), counter.get_total_flops())


READING = [
    Comparison(
        f"reading tiny_moat_0 {RESOLUTION} px batch 1",
        make_group,
        contenders=("model", "reading") if chosen() == "cpu" else (),
    )
]


@pytest.mark.parametrize(("comparison", "contender"), contenders_of(READING))
def test_reading(measure: Any, comparison: Comparison, contender: str) -> None:
    measure(comparison, contender)
