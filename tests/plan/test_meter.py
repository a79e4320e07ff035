"""The meter of memory and kernels, on real CPU tensors whose sizes are known."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import moat_kernels as mk
from moat_kernels.memory import saved_bytes
from moat_kernels.plan import meter as module
from moat_kernels.plan.meter import Meter


def rounded(elements: int) -> int:
    """Bytes of so many float32."""
    return -(-4 * elements // 512) * 512


def test_storages_count_once_rounded_until_freed() -> None:
    with Meter([]) as meter:
        a = torch.ones(1000)
        b = a.view(10, 100)[2:]
        assert meter.live == 4096
        c = b + 1
        assert meter.live == 4096 + rounded(800)
        del a
        assert meter.live == 4096 + rounded(800)
        del b
        c.mul_(2)
        assert meter.live == rounded(800)
    assert meter.peak == 4096 + rounded(800)


def test_tensors_from_before_count_while_they_live() -> None:
    before = torch.ones(500)
    with Meter([]) as meter:
        meter.hold((before, before[:3]))
        assert meter.live == 2048
        del before
        assert meter.live == 0


def test_peak_of_a_training_step() -> None:
    rows, channels, wide = 64, 96, 384
    x = torch.randn(rows, channels)
    weight = torch.randn(channels, wide, requires_grad=True)
    with Meter([]) as meter:
        meter.hold((x, weight))
        loss = F.gelu(x @ weight).sum()
        forward = meter.peak
        loss.backward()
        kept = rounded(rows * channels) + rounded(channels * wide)
        hidden, scalar = rounded(rows * wide), rounded(1)
        assert forward == kept + 2 * hidden + scalar
        # Backward: the gradient of GELU beside its input, then that of the weight.
        assert meter.peak == kept + 2 * scalar + max(2 * hidden, hidden + rounded(weight.numel()))
        assert meter.live == kept + scalar + rounded(weight.numel())


@pytest.mark.parametrize("recompute", ["stock", "none", "expand", "block"])
def test_what_lives_between_forward_and_backward_is_what_autograd_saves(
    recompute: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "ROUNDING", 1)
    block: torch.nn.Module = mk.reference.MBConvBlock(8, 8)
    if recompute != "stock":
        block = mk.FusedMBConv(8, 8, recompute=recompute)
    x = torch.randn(2, 8, 12, 10).to(memory_format=torch.channels_last).requires_grad_()
    state = [*block.parameters(), *block.buffers()]
    with mk.use_backend("reference" if recompute == "stock" else "torch"):
        expected = saved_bytes(lambda: block(x), state)
        with Meter([]) as meter:
            meter.hold(state)
            before = meter.live
            meter.hold((x,))
            output = block(x)
            kept = meter.live - before
    assert kept == expected + output.numel() * 4


@pytest.mark.parametrize("given", ["x", "weight", "neither"])
def test_convolutions_of_meta_tensors_are_in_cudnn_s_memory_format(given: str) -> None:
    x, weight = (torch.empty(4, 4, 6, 6, device="meta") for _ in range(2))
    if given == "x":
        x = x.to(memory_format=torch.channels_last)
    elif given == "weight":
        weight = weight.to(memory_format=torch.channels_last)
    with Meter([]):
        output = F.conv2d(x, weight, padding=3)
    assert output.is_contiguous(memory_format=torch.channels_last) == (given != "neither")


def test_the_package_s_operators_are_seen_through() -> None:
    block = mk.FusedMBConv(8, 8)
    x = torch.randn(2, 8, 12, 10)
    passes: list = []
    with mk.use_backend("torch"), Meter(passes):
        block(x)
    names = {one.kernel for one in passes}
    assert "depthwise convolution 3x3" in names
    assert not any("mbconv" in name for name in names)
