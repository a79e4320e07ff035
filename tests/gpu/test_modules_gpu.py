"""Fused blocks and a whole model on a GPU against the reference in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.backend_comparison import check, check_module, train_step
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


# Not in float16: through so many layers its rounding, stock or fused, is near the factor allowed.
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_small_model(dtype: torch.dtype, device: str, kernels: None) -> None:
    x = torch.randn(2, 3, RESOLUTION, RESOLUTION)
    reference, fused = make_model(torch.float32, fused=False), make_model(torch.float32)
    with mk.use_backend("triton"):
        check_module(reference, fused, x, dtype, device)


def test_autocast_of_a_small_model(device: str, kernels: None) -> None:
    x = torch.randn(2, 3, RESOLUTION, RESOLUTION).to(device)
    exact = train_step(make_model(fused=False).to(device), x.double())
    with torch.autocast(device, torch.bfloat16), mk.use_backend("triton"):
        stock = train_step(make_model(torch.float32, fused=False).to(device), x)
        fused = train_step(make_model(torch.float32).to(device), x)
    check(fused, stock, exact, torch.bfloat16)
