"""What a copy with random weights tells before a module is fused."""

from __future__ import annotations

import torch
from support.fusing import randomize
from support.twins import changzy00
from torch import Tensor, nn

import moat_kernels as mk


def make_block() -> nn.Module:
    torch.manual_seed(0)
    return randomize(changzy00.MBConv(16, 16, use_se=True))


def test_changed_copies_of_known_code_are_left_alone() -> None:
    """The same names and structure, other arithmetic: found by trying it out."""

    class MBConv(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return changzy00.MBConv.forward(self, 1.01 * x)

    block = make_block()
    block.__class__ = MBConv
    reason = "its results differ from those of the code that its names are known from"
    assert mk.fuse(block).skipped[0].reason == reason
    assert type(block) is MBConv


def test_weights_on_the_meta_device_are_left_alone() -> None:
    with torch.device("meta"):
        block = changzy00.MBConv(16, 16)
    assert "meta device" in mk.fuse(block).skipped[0].reason


def test_what_cannot_be_tried_out_is_left_alone() -> None:
    block = make_block()
    block.conv3 = nn.Conv2d(16, 16, 1).double()  # takes 64 channels
    assert mk.fuse(block).skipped[0].reason.startswith("trying it out failed: ")


def test_random_numbers_are_not_consumed() -> None:
    model = make_block()
    state = torch.get_rng_state()
    mk.fuse(model)
    assert torch.equal(torch.get_rng_state(), state)
