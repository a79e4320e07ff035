"""changzy00's MOAT (a structural twin), fused: the same numbers, and what is left alone."""

from __future__ import annotations

import pytest
import torch
from support.fusing import check_fused, reasons
from support.twins import changzy00
from torch import nn

import moat_kernels as mk

SMALL = {"stem_dim": 16, "embed_dims": (16, 32, 64, 64), "depths": (1, 2, 2, 1), "num_classes": 5}


def test_a_whole_model() -> None:
    torch.manual_seed(0)
    check_fused(changzy00.MOAT(**SMALL), torch.randn(2, 3, 64, 64), fused=9)


def test_attention_dropout_is_fused_in_eval_only() -> None:
    model = changzy00.MOAT(**SMALL, attn_drop=0.1)
    with pytest.warns(mk.FallbackWarning, match=r"dropout of the attention weights, p=0\.1"):
        report = check_fused(model, torch.randn(2, 3, 64, 64), fused=9)
    notes = {entry.note for entry in report.fused if entry.op == "window_attention"}
    assert notes == {"in eval only: dropout of the attention weights, p=0.1"}


@pytest.mark.parametrize("use_se", [True, False])
@pytest.mark.parametrize(("planes", "stride"), [(16, 1), (24, 1), (16, 2)])
def test_blocks(planes: int, stride: int, use_se: bool) -> None:
    block = changzy00.MBConv(16, planes, stride, use_se=use_se)
    check_fused(block, torch.randn(3, 16, 7, 8), fused=1)


def test_other_blocks_are_left_alone() -> None:
    block = changzy00.MBConv(16, 16)
    block.act = nn.Hardswish()
    assert reasons(block) == {"activation Hardswish"}
    block = changzy00.MBConv(16, 16, use_se=True)
    block.se.fc[3] = nn.Hardsigmoid()
    assert reasons(block) == {"squeeze-and-excitation with gate Hardsigmoid"}
