"""FlopCounterMode counts a fused model as the plain one: by PyTorch's rules, module by module."""

from __future__ import annotations

import pytest
import torch
from support.small_model import make_model
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import moat_kernels as mk
from moat_kernels import functional
from moat_kernels.reference import MBConvBlock, MOATBlock

WINDOWS = (None, None, 3, None)  # a window that does not divide its map
BLOCKS = [f"stages.{stage}.0" for stage in range(4)]


def count(module: nn.Module, x: Tensor, mode: str) -> FlopCounterMode:
    module.train(mode == "training")
    with FlopCounterMode(display=False) as counter, torch.set_grad_enabled(mode != "no_grad"):
        output = module(x)
        if mode == "training":
            output.sum().backward()
    return counter


def by_module(counter: FlopCounterMode) -> dict[str, int]:
    return {name: sum(counts.values()) for name, counts in counter.get_flop_counts().items()}


@pytest.mark.parametrize("mode", ["no_grad", "grad", "training"])
def test_a_whole_model_counts_as_the_plain_one(mode: str) -> None:
    x = torch.randn(2, 3, 64, 48)
    fused, plain = (
        by_module(count(make_model(torch.float32, fused=fused, window_size=WINDOWS), x, mode))
        for fused in (True, False)
    )
    assert plain["Global"] > 1e6
    for name in ("Global", *(f"MOAT.{name}" for name in BLOCKS)):
        assert fused[name] == plain[name], name


@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_every_backend_counts_alike(backend: str) -> None:
    x = torch.randn(2, 16, 9, 8)
    plain = count(MBConvBlock(16, 24, stride=2), x, "training").get_total_flops()
    with mk.use_backend(backend):
        fused = count(mk.FusedMBConv(16, 24, stride=2), x, "training").get_total_flops()
    assert fused == plain


def expand_flops(block: nn.Module, pixels: int) -> int:
    return 2 * pixels * block.expand_conv.weight.numel()


def test_recomputation_counts_what_it_computes_again() -> None:
    x = torch.randn(2, 16, 8, 8)
    totals = {
        level: count(mk.FusedMBConv(16, 16, recompute=level), x, "training").get_total_flops()
        for level in ("none", "expand", "block")
    }
    block = MBConvBlock(16, 16)
    expand = expand_flops(block, 2 * 8 * 8)
    depthwise = 2 * 2 * 8 * 8 * block.depthwise_conv.weight.numel()
    assert totals["none"] == count(block, x, "training").get_total_flops()
    assert totals["expand"] - totals["none"] == expand
    assert totals["block"] - totals["expand"] == depthwise


def test_gradients_that_nobody_needs_do_not_count() -> None:
    """As with stock autograd: frozen weights, and no gradient of what comes before them."""
    x = torch.randn(2, 16, 8, 8)
    totals = []
    for block in (mk.FusedMOATBlock(16, 32, head_dim=16), MOATBlock(16, 32, head_dim=16)):
        for module in (block.pre_norm, block.expand_conv, block.shrink_conv):
            module.requires_grad_(False)
        totals.append(count(block, x, "training").get_total_flops())
    assert totals[0] == totals[1]


def test_other_orders_of_the_bottleneck() -> None:
    parameters = functional.MBConvParameters(
        torch.randn(24, 16), torch.randn(16, 1, 3, 3), torch.randn(8, 24), None, None, None
    )
    description = functional.MBConvDescription(
        order="depthwise_first",
        pre_norm=None,
        expand_norm=None,
        depthwise_norm=None,
        residual=False,
        stride=2,
        padding=(1, 1, 1, 1),
    )
    x = torch.randn(2, 16, 9, 8, requires_grad=True)
    for weight in parameters[:3]:
        weight.requires_grad_()
    totals = []
    for backend in ("torch", "reference"):
        with mk.use_backend(backend), FlopCounterMode(display=False) as counter:
            functional.mbconv(x, parameters, description).sum().backward()
        totals.append(counter.get_total_flops())
    assert totals[0] == totals[1] > 0


def test_exported_programs_count_too() -> None:
    block = mk.FusedMOATBlock(16, 32, head_dim=16, window_size=3).eval()
    x = torch.randn(2, 16, 8, 8)
    with torch.no_grad():
        program = torch.export.export(block, (x,)).module()
    plain = MOATBlock(16, 32, head_dim=16, window_size=3)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        program(x)
    assert counter.get_total_flops() == count(plain, x, "no_grad").get_total_flops()
