"""lucidrains' MaxViT, fused: the same numbers, and what is left alone."""

from __future__ import annotations

import pytest
import torch
from support.fusing import check_fused, reasons
from support.peers import import_peer
from torch import nn

import moat_kernels as mk

max_vit = import_peer("vit_pytorch.max_vit")


def make_model(dropout: float = 0.0) -> nn.Module:
    torch.manual_seed(0)
    return max_vit.MaxViT(num_classes=5, dim=32, depth=(1, 2), window_size=4, dropout=dropout)


def test_a_whole_model() -> None:
    report = check_fused(make_model(), torch.randn(2, 3, 32, 32), fused=9)
    names = [entry.class_name for entry in report.fused if entry.op == "mbconv"]
    assert names == ["Sequential", "Sequential", "MBConvResidual"]


def test_its_default_dropout_is_fused_in_eval_only() -> None:
    with pytest.warns(mk.FallbackWarning, match=r"dropout of the attention weights, p=0\.1"):
        report = check_fused(make_model(dropout=0.1), torch.randn(2, 3, 32, 32), fused=9)
    notes = {entry.note for entry in report.fused if entry.op == "window_attention"}
    assert notes == {"in eval only: dropout of the attention weights, p=0.1"}


def test_dropsample_runs_as_itself() -> None:
    block = max_vit.MBConv(8, 8, downsample=False, dropout=0.1)
    report = check_fused(block, torch.randn(2, 8, 6, 4), fused=1)
    assert report.skipped[0].reason == "Dropsample"
    assert [entry.path for entry in report.fused] == ["fn"]


def test_other_sequences_are_not_touched() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8), nn.GELU())
    assert mk.fuse(model) == mk.FusionReport((), ())


def test_an_embedding_of_another_kind_is_left_alone() -> None:
    attention = max_vit.Attention(16, dim_head=8, window_size=2)
    attention.rel_pos_bias.max_norm = 1.0
    assert reasons(attention) == {"an embedding with padding_idx or max_norm"}
