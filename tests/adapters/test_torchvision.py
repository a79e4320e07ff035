"""torchvision's MaxViT, fused: the same numbers, and what is left alone."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from support.fusing import check_fused, reasons
from support.peers import import_peer
from torch import nn

maxvit = import_peer("torchvision.models.maxvit")


def make_model(**options) -> nn.Module:
    torch.manual_seed(0)
    return maxvit.MaxVit(
        (64, 64), 16, 2, [32, 64], [2, 2], 16, stochastic_depth_prob=0.2, num_classes=5, **options
    )


def make_attention(kind: str, **options) -> nn.Module:
    torch.manual_seed(0)
    settings = {"attention_dropout": 0.0, "mlp_dropout": 0.0, "p_stochastic_dropout": 0.3}
    size = (6, 4) if kind == "window" else (6, 6)
    return maxvit.PartitionAttentionLayer(
        16, 8, 2, kind, size, 2, nn.GELU, nn.LayerNorm, **{**settings, **options}
    )


def test_a_whole_model() -> None:
    check_fused(make_model(), torch.randn(2, 3, 64, 64), fused=12)


@pytest.mark.parametrize("kind", ["window", "grid"])
def test_partition_attention(kind: str) -> None:
    check_fused(make_attention(kind), torch.randn(3, 16, 6, 4 if kind == "window" else 6), fused=1)


@pytest.mark.parametrize("dropout", ["attention_dropout", "mlp_dropout"])
def test_dropout_leaves_only_the_partition_alone(dropout: str) -> None:
    layer = make_attention("grid", **{dropout: 0.5})
    report = check_fused(layer, torch.randn(2, 16, 6, 6), fused=1)
    assert report.fused[0].class_name == "RelativePositionalMultiHeadAttention"
    assert report.skipped[0].reason == "dropout, drawn window by window"


def make_conv(in_channels: int = 8, stride: int = 1, **options) -> nn.Module:
    torch.manual_seed(0)
    norm = partial(nn.BatchNorm2d, eps=1e-3, momentum=0.01)
    settings = {"activation_layer": nn.GELU, "norm_layer": norm, "p_stochastic_dropout": 0.3}
    return maxvit.MBConv(in_channels, 16, 4, 0.25, stride, **{**settings, **options})


@pytest.mark.parametrize("size", [(8, 6), (7, 9)], ids=str)
@pytest.mark.parametrize("stride", [1, 2])
def test_blocks(stride: int, size: tuple[int, int]) -> None:
    check_fused(make_conv(stride=stride), torch.randn(3, 8, *size), fused=1)


def test_other_blocks_are_left_alone() -> None:
    assert reasons(make_conv(activation_layer=nn.Hardswish)) == {"activation Hardswish"}
    assert reasons(make_conv(norm_layer=nn.InstanceNorm2d)) == {
        "InstanceNorm2d in place of a batch norm"
    }
    block = make_conv(stride=2)
    block.stochastic_depth.mode = "batch"
    assert reasons(block) == {"StochasticDepth by batch"}
