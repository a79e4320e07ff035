"""RooKichenn's MOAT (a structural twin), fused: the same numbers, and what is left alone."""

from __future__ import annotations

import pytest
import torch
from support.fusing import check_fused, reasons
from support.twins import rookichenn
from torch import nn

SMALL = {
    "channels": (32, 32, 64, 64),
    "embedding_channels": 32,
    "depths": (1, 2, 2, 1),
    "num_classes": 5,
}


@pytest.mark.parametrize("window_size", [None, (2, 2)], ids=str)
def test_whole_models(window_size: tuple[int, int] | None) -> None:
    """attn_drop, which the original ignores, changes nothing; drop path draws the same numbers."""
    torch.manual_seed(0)
    model = rookichenn.MOAT(
        (64, 64), window_size=window_size, attn_drop=0.3, drop_path=0.2, **SMALL
    )
    report = check_fused(model, torch.randn(2, 3, 64, 64), fused=9)
    assert "stages.2.0.moat_attention.attention.relative_position_index" in model.state_dict()
    assert {entry.implementation for entry in report.fused} == {"RooKichenn MOAT"}


@pytest.mark.parametrize("use_se", [True, False])
@pytest.mark.parametrize("downscale", [True, False])
def test_blocks(downscale: bool, use_se: bool) -> None:
    block = rookichenn.MBConvBlock(16, 16, downscale, drop_path=0.3, use_se=use_se)
    check_fused(block, torch.randn(3, 16, 6, 8), fused=1)


def test_other_blocks_are_left_alone() -> None:
    block = rookichenn.MBConvBlock(16, 16)
    block.main_path[1].has_skip = True
    assert reasons(block) == {"DepthwiseSeparableConv with a residual"}
    block = rookichenn.MBConvBlock(16, 16)
    block.main_path[1].aa = nn.AvgPool2d(2)
    assert reasons(block) == {"DepthwiseSeparableConv with aa"}
    block = rookichenn.MBConvBlock(16, 16, use_se=True)
    block.main_path[2].gate = nn.Hardsigmoid()
    assert reasons(block) == {"squeeze-and-excitation with gate Hardsigmoid"}
