"""Apple's MOAT (a structural twin), fused: the same numbers, and what is left alone."""

from __future__ import annotations

import pytest
import torch
from support.fusing import check_fused, reasons
from support.twins import apple
from support.twins.apple import BlockArgs, PEType
from torch import nn

import moat_kernels as mk

SMALL = {"stem_size": 16, "hidden_size": (16, 32, 64, 64), "num_blocks": (1, 2, 2, 1)}


def make_model(pe_type: PEType, window: tuple[int, int] | None = None, **options) -> nn.Module:
    torch.manual_seed(0)
    return apple.MOAT((64, 96), local_window_size=window, pe_type=pe_type, **SMALL, **options)


@pytest.mark.parametrize("window", [None, (2, 3)], ids=str)
def test_whole_models(window: tuple[int, int] | None) -> None:
    check_fused(make_model(PEType.SINGLE_HEAD_RPE, window), torch.randn(2, 3, 64, 96), fused=9)


def test_local_position_encoding_is_left_alone() -> None:
    """The original's default; the convolutional blocks are fused all the same."""
    report = check_fused(make_model(PEType.LePE_ADD), torch.randn(2, 3, 64, 96), fused=6)
    assert {entry.reason for entry in report.skipped} == {"local position encoding (LePE)"}


def test_no_position_encoding() -> None:
    attention = apple.WindowAttention(32, (2, 3), 2, PEType.LePE_FUSED)
    check_fused(attention, torch.randn(4, 6, 32), fused=1)


def test_tables_of_one_head_by_another_type_are_left_alone() -> None:
    attention = apple.WindowAttention(32, (2, 3), 2, PEType.RPE)
    assert reasons(attention) == {"PEType.RPE with a table of one head"}


def test_attention_dropout_is_fused_in_eval_only() -> None:
    attention = apple.WindowAttention(32, (2, 3), 2, PEType.SINGLE_HEAD_RPE, attn_drop=0.5)
    with pytest.warns(mk.FallbackWarning, match=r"dropout of the attention weights, p=0\.5"):
        report = check_fused(attention, torch.randn(4, 6, 32), fused=1)
    assert report.fused[0].note.startswith("in eval only")


@pytest.mark.parametrize(
    ("arguments", "options"),
    [
        (BlockArgs(3, 16, 16, 4, True, 1, 0.25), {"activation": "swish"}),
        (BlockArgs(3, 16, 24, 4, True, 1, None), {"activation": "relu"}),
        (BlockArgs(5, 16, 24, 2, False, 1, 0.25), {"pre_norm": False}),
        (BlockArgs(3, 16, 16, 4, True, 2, None), {}),
    ],
    ids=str,
)
def test_blocks(arguments: BlockArgs, options: dict) -> None:
    check_fused(apple.MBConvBlock(arguments, **options), torch.randn(3, 16, 6, 8), fused=1)


def test_blocks_that_expand_nothing_or_drop() -> None:
    block = apple.MBConvBlock(BlockArgs(3, 16, 16, 1, True, 1, None))
    assert reasons(block) == {"expand_ratio 1"}
    block = apple.MBConvBlock(BlockArgs(3, 16, 16, 4, True, 1, None), drop_rate=0.25)
    with pytest.warns(mk.FallbackWarning, match=r"dropout of the residual, p=0\.25"):
        report = check_fused(block, torch.randn(3, 16, 6, 8), fused=1)
    assert report.fused[0].note == "in eval only: dropout of the residual, p=0.25"
