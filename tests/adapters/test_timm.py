"""timm's CoAtNet and MaxViT models, fused: the same numbers, and what is left alone."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from support.fusing import check_fused, check_same, randomize, reasons, run
from support.peers import import_peer
from torch import nn

import moat_kernels as mk

timm = import_peer("timm")
maxxvit = import_peer("timm.models.maxxvit")

SMALL = {"img_size": 64, "embed_dim": (32, 32, 64, 64), "depths": (1, 2, 2, 1), "num_classes": 5}
# name -> (modules fused with SMALL, what differs from SMALL)
MODELS = {
    "coatnet_0_224": (6, {}),
    "coatnet_bn_0_rw_224": (6, {}),  # pre-norm with activation, SE before the norm, silu
    "coatnet_0_rw_224": (4, {}),  # pools before it expands: those blocks stay
    "coatnet_rmlp_0_rw_224": (6, {}),  # bias tables made by MLPs
    "maxvit_tiny_tf_224": (18, {}),  # TF padding, tanh GELU, eps 1e-3, heads outside
    "maxvit_tiny_rw_224": (18, {}),
    "maxxvit_rmlp_nano_rw_256": (12, {"embed_dim": (64, 64, 128, 128)}),
}


def make_model(name: str, **options) -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model(name, **{**SMALL, **MODELS[name][1], **options})


def make_conv(in_chs: int = 16, out_chs: int = 16, stride: int = 1, **settings) -> nn.Module:
    torch.manual_seed(0)
    config = dataclasses.replace(maxxvit.MaxxVitConvCfg(), **settings)
    return maxxvit.MbConvBlock(in_chs, out_chs, stride, cfg=config, drop_path=0.3)


@pytest.mark.parametrize("name", MODELS)
def test_whole_models(name: str) -> None:
    check_fused(
        make_model(name, drop_path_rate=0.2), torch.randn(2, 3, 64, 64), fused=MODELS[name][0]
    )


def test_a_model_of_its_real_size_is_fused_whole() -> None:
    report = mk.fuse(timm.create_model("coatnet_0_224"))
    assert [entry.op for entry in report.fused].count("mbconv") == 5
    assert [entry.op for entry in report.fused].count("window_attention") == 7
    assert not report.skipped


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"padding": "same"},
        {"padding": "same", "pool_type": "max"},
        {"pool_type": "avg"},
        {"pool_type": "max2"},
        {"attn_early": True, "attn_act_layer": "relu"},
        {"attn_layer": ""},
        {"kernel_size": 5, "act_layer": "relu", "output_bias": False},
        {"pre_norm_act": True, "act_layer": "gelu_tanh", "expand_output": False},
    ],
    ids=str,
)
def test_strided_blocks(settings: dict) -> None:
    check_fused(make_conv(8, 16, 2, **settings), torch.randn(3, 8, 8, 6), fused=1)


@pytest.mark.parametrize("settings", [{"padding": "same"}, {"pool_type": "avg"}], ids=str)
def test_strided_blocks_on_odd_maps(settings: dict) -> None:
    """Without padding timm's pools of two do not fit them."""
    check_fused(make_conv(8, 16, 2, **settings), torch.randn(3, 8, 7, 9), fused=1)


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"stride_mode": "pool"}, "stride_mode 'pool'"),
        ({"stride_mode": "1x1"}, "a 1x1 convolution with a stride"),
        ({"group_size": 8}, "8 groups of a convolution over 64 channels"),
        ({"attn_layer": "eca"}, "channel attention EcaModule"),
        ({"act_layer": "hard_swish"}, "activation Hardswish"),
    ],
    ids=str,
)
def test_other_convolution_blocks_are_left_alone(settings: dict, reason: str) -> None:
    block = make_conv(16, 16, 2, **settings)
    assert reasons(block) == {reason}
    assert type(block) is maxxvit.MbConvBlock


def test_convnext_blocks_are_left_alone() -> None:
    block = maxxvit.ConvNeXtBlock(16, cfg=maxxvit.MaxxVitConvCfg(block_type="convnext"))
    assert reasons(block) == {"its norm is a layer norm, after the depthwise convolution"}


def make_partition(kind: str = "PartitionAttentionCl", **settings) -> nn.Module:
    torch.manual_seed(0)
    options = {"window_size": (2, 3), "grid_size": (2, 3), "dim_head": 8, **settings}
    config = dataclasses.replace(maxxvit.MaxxVitTransformerCfg(), **options)
    return getattr(maxxvit, kind)(16, "grid", config)


@pytest.mark.parametrize("rel_pos_type", ["bias", "bias_tf", "mlp", ""])
@pytest.mark.parametrize("kind", ["PartitionAttentionCl", "PartitionAttention2d"])
def test_grid_attention_in_either_layout(kind: str, rel_pos_type: str) -> None:
    block = make_partition(kind, rel_pos_type=rel_pos_type)
    size = (16, 4, 6) if kind.endswith("2d") else (4, 6, 16)
    check_fused(block, torch.randn(2, *size), fused=1)


def test_projection_dropout_leaves_only_the_partition_alone() -> None:
    block = make_partition(proj_drop=0.5)
    report = check_fused(block, torch.randn(2, 4, 6, 16), fused=1)
    assert [entry.path for entry in report.fused] == ["attn"]
    assert report.skipped[0].reason == "projection dropout, drawn window by window"


def test_attention_dropout_is_fused_in_eval_only() -> None:
    block = make_partition(attn_drop=0.5)
    with pytest.warns(mk.FallbackWarning, match=r"dropout of the attention weights, p=0\.5"):
        report = check_fused(block, torch.randn(2, 4, 6, 16), fused=1)
    assert report.fused[0].note == "in eval only: dropout of the attention weights, p=0.5"


def test_the_parallel_block_shares_one_input() -> None:
    config = dataclasses.replace(
        maxxvit.MaxxVitTransformerCfg(), window_size=(2, 2), grid_size=(2, 2), dim_head=8
    )
    block = maxxvit.ParallelPartitionAttention(32, config)
    check_fused(block, torch.randn(2, 4, 6, 32), fused=2)


def test_a_shared_bias_falls_back_at_the_call() -> None:
    attention = randomize(maxxvit.Attention2d(16, dim_head=8))
    x, shared = torch.randn(2, 16, 3, 4).double(), torch.randn(2, 12, 12).double()
    expected = attention(x, shared_rel_pos=shared)
    assert len(mk.fuse(attention).fused) == 1
    with pytest.warns(mk.FallbackWarning, match="shared_rel_pos"):
        assert torch.equal(attention(x, shared_rel_pos=shared), expected)


def test_maps_that_the_windows_do_not_divide_fail_as_before() -> None:
    block = make_partition()
    mk.fuse(block)
    with (
        pytest.warns(mk.FallbackWarning, match="do not divide"),
        pytest.raises(AssertionError, match="must be divisible"),
    ):
        block(torch.randn(1, 5, 6, 16))


def test_another_input_size_set_later() -> None:
    """timm replaces the bias tables; nothing of the old ones is kept."""
    stock, fused = make_model("maxvit_tiny_tf_224"), make_model("maxvit_tiny_tf_224")
    mk.fuse(fused)
    for model in (stock, fused):
        randomize(model).set_input_size((96, 96))
    fused.load_state_dict(stock.state_dict())
    x = torch.randn(1, 3, 96, 96).double()
    check_same(run(fused, x, training=True), run(stock, x, training=True))
