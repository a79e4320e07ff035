"""Fused blocks and a whole model on a GPU against the reference in float64."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from support.backend_comparison import Results, check_module, check_over_inputs, train_step
from support.small_model import RESOLUTION, make_model
from torch import nn

import moat_kernels as mk
from moat_kernels.memory import saved_bytes
from moat_kernels.reference import MBConvBlock, MOATBlock

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
BLOCKS: dict[str, tuple[type, type, dict[str, Any], tuple[int, ...]]] = {
    "small": (
        *(MOATBlock, mk.FusedMOATBlock),
        {"in_channels": 16, "out_channels": 16, "head_dim": 16, "window_size": (6, 5)},
        (2, 16, 6, 5),
    ),
    "MBConv": (
        *(MBConvBlock, mk.FusedMBConv),
        {"in_channels": 64, "out_channels": 96, "stride": 2},
        (2, 64, 56, 56),
    ),
    "MOAT": (
        *(MOATBlock, mk.FusedMOATBlock),
        {"in_channels": 96, "out_channels": 96, "window_size": 14},
        (2, 96, 28, 28),
    ),
    "MOAT, stride 2": (
        *(MOATBlock, mk.FusedMOATBlock),
        {"in_channels": 96, "out_channels": 192, "stride": 2, "window_size": 14},
        (2, 96, 28, 28),
    ),
}


def make_block(kind: type, options: dict[str, Any]) -> nn.Module:
    torch.manual_seed(0)
    return kind(**options)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", BLOCKS)
def test_blocks(name: str, dtype: torch.dtype, device: str, kernels: None) -> None:
    reference, fused, options, shape = BLOCKS[name]
    with mk.use_backend("triton"):
        check_module(
            make_block(reference, options),
            make_block(fused, options),
            torch.randn(shape),
            dtype,
            device,
        )


@pytest.mark.parametrize(("recompute", "saved"), [("none", 9), ("expand", 5), ("block", 1)])
def test_bytes_kept_for_backward(recompute: str, saved: int, cuda: str, kernels: None) -> None:
    """So many times C channels of the map, and small tensors."""
    block = mk.FusedMBConv(96, 96, recompute=recompute).to(cuda, torch.bfloat16)
    x = torch.randn(8, 96, 56, 56, device=cuda, dtype=torch.bfloat16)
    x = x.to(memory_format=torch.channels_last)
    with mk.use_backend("triton"):
        kept = saved_bytes(lambda: block(x), [*block.parameters(), *block.buffers()])
    assert saved <= kept / (x.numel() * x.element_size()) < 1.05 * saved


def test_a_small_model(device: str, kernels: None) -> None:
    x = torch.randn(2, 3, RESOLUTION, RESOLUTION)
    reference, fused = make_model(torch.float32, fused=False), make_model(torch.float32)
    with mk.use_backend("triton"):
        check_module(reference, fused, x, torch.float32, device)


# Batch norms over few pixels magnify its rounding: gradients of stock are off by 3 to 20 %.
@pytest.mark.parametrize("autocast", [False, True])
def test_a_small_model_in_bfloat16(autocast: bool, device: str, kernels: None) -> None:
    weights = torch.float32 if autocast else torch.bfloat16

    def both_modes(model: nn.Module, x: torch.Tensor) -> Results:
        results = train_step(model, x)
        with torch.no_grad():
            return results | {"output in evaluation": model.eval()(x)}

    def steps(x: torch.Tensor) -> tuple[Results, Results, Results]:
        stock, fused = (
            make_model(torch.float32, fused=each).to(device, weights) for each in (False, True)
        )
        exact = both_modes(copy.deepcopy(stock).double(), x.double())
        with torch.autocast(device, torch.bfloat16, enabled=autocast), mk.use_backend("triton"):
            return both_modes(fused, x.to(weights)), both_modes(stock, x.to(weights)), exact

    generator = torch.Generator().manual_seed(0)
    size = (2, 3, RESOLUTION, RESOLUTION)
    inputs = [torch.randn(size, generator=generator).bfloat16().to(device) for _ in range(8)]
    check_over_inputs([steps(x) for x in inputs], torch.bfloat16)
