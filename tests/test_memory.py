"""Bytes saved for backward, in units of C channels of the map (float32, stride 1, without SE)."""

from __future__ import annotations

import gc
import subprocess
import sys
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import moat_kernels as mk
from moat_kernels.memory import release_memory, saved_bytes
from moat_kernels.ops.common.backends import backend_status

CHANNELS, BATCH, SIZE = 32, 8, 32
UNIT = BATCH * SIZE * SIZE * CHANNELS * 4  # bytes of C channels of the map

# What design gives, and what statistics (vectors of E, one C x C) add at this size: under 0.1 C.
LIMITS = {"none": 9.1, "expand": 5.1, "block": 1.1}


BACKENDS = [name for name in ("torch", "cpu") if backend_status()[name].usable]


def units_saved(block: torch.nn.Module, channels_last: bool = True) -> float:
    x = torch.randn(BATCH, CHANNELS, SIZE, SIZE)
    if channels_last:
        x = x.to(memory_format=torch.channels_last)
    x.requires_grad_()
    state = [*block.parameters(), *block.buffers()]
    return saved_bytes(lambda: block(x), state) / UNIT


def test_stock_block_keeps_26() -> None:
    stock = mk.reference.MBConvBlock(CHANNELS, CHANNELS, se_ratio=None)
    assert 26.0 <= units_saved(stock) <= 26.1


@pytest.mark.parametrize("channels_last", [True, False], ids=["channels_last", "contiguous"])
@pytest.mark.parametrize("recompute", LIMITS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_fused_block(backend: str, recompute: str, channels_last: bool) -> None:
    block = mk.FusedMBConv(CHANNELS, CHANNELS, se_ratio=None, recompute=recompute)
    with mk.use_backend(backend):
        assert int(LIMITS[recompute]) <= units_saved(block, channels_last) <= LIMITS[recompute]


@pytest.mark.parametrize("recompute", LIMITS)
def test_with_more_channels_than_the_covariance_pays_for(recompute: str) -> None:
    """Few rows per channel: statistics are direct and no C x C matrix is kept."""
    channels, size = 256, 7
    block = mk.FusedMBConv(channels, channels, se_ratio=None, recompute=recompute)
    x = torch.randn(2, channels, size, size, requires_grad=True)
    with mk.use_backend("torch"):
        saved = saved_bytes(lambda: block(x), [*block.parameters(), *block.buffers()])
    # Vectors of E = 4 C floats: 6 of them are 24 C bytes beside 98 rows of 4 C bytes.
    assert saved <= (LIMITS[recompute] + 0.5) * x.numel() * 4


def test_frozen_norms_save_no_more() -> None:
    block = mk.FusedMBConv(CHANNELS, CHANNELS, se_ratio=None, recompute="expand").eval()
    with mk.use_backend("torch"):
        assert units_saved(block) <= LIMITS["expand"]


def test_nothing_is_saved_without_gradients() -> None:
    block = mk.FusedMBConv(CHANNELS, CHANNELS).requires_grad_(False)
    with torch.no_grad():
        assert units_saved(block) == 0


@pytest.mark.parametrize(("recompute", "limit"), [("none", 15.2), ("expand", 11.2), ("block", 2.2)])
@pytest.mark.parametrize("backend", BACKENDS)
def test_moat_block(backend: str, recompute: str, limit: float) -> None:
    """The attention half keeps its input, LayerNorm's output, qkv (3 C) and the attended map."""
    block = mk.FusedMOATBlock(CHANNELS, CHANNELS, position_size=7, recompute=recompute)
    with mk.use_backend(backend):
        assert units_saved(block) <= limit


def test_whole_model_against_stock() -> None:
    stock, fused = (
        mk.create_model("tiny_moat_0", fused=fused, recompute="expand", num_classes=10)
        for fused in (False, True)
    )
    x = torch.randn(2, 3, 128, 128)
    with mk.use_backend("torch"):
        sizes = [
            saved_bytes(lambda model=model: model(x), [*model.parameters(), *model.buffers()])
            for model in (stock, fused)
        ]
    assert sizes[1] <= 0.35 * sizes[0]


@pytest.mark.skipif("cpu" not in BACKENDS, reason="no native kernels")
@pytest.mark.parametrize("recompute", LIMITS)
def test_autocast_saves_half(recompute: str) -> None:
    """Of maps; statistics are in float64, and softmax's sums and each row's moments in float32."""
    model = mk.create_model("tiny_moat_0", recompute=recompute, num_classes=10)
    x = torch.randn(2, 3, 128, 128)
    state = [*model.parameters(), *model.buffers()]
    sizes = []
    for autocast in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            sizes.append(saved_bytes(lambda: model(x), state))
    assert sizes[1] <= 0.53 * sizes[0]


@pytest.mark.skipif("cpu" not in BACKENDS, reason="no native kernels")
def test_counting_frees_what_was_saved() -> None:
    """Also where an operation saves its own output."""
    nodes = []

    class Exp(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
            output = x.exp()
            ctx.save_for_backward(output)
            nodes.append(weakref.ref(ctx))
            return output

    x = torch.randn(1000, requires_grad=True)
    assert saved_bytes(lambda: Exp.apply(x)) == x.nbytes
    gc.collect()
    assert nodes[0]() is None


def test_memory_kept_for_the_next_step_is_bounded_and_given_back() -> None:
    """Twice the wide tensors (E = 4 C) and as much again for their gradients, at most."""
    block = mk.FusedMBConv(CHANNELS, CHANNELS, se_ratio=None, recompute="none")

    def kept_after_steps(*batches: int) -> int:
        for batch in batches:
            x = torch.randn(batch, CHANNELS, SIZE, SIZE)
            block(x).sum().backward()
        return release_memory()

    release_memory()
    with mk.use_backend("cpu"):
        once = kept_after_steps(BATCH)
        assert 2 * 4 * UNIT <= once <= 5 * 4 * UNIT
        assert kept_after_steps(BATCH, BATCH, BATCH) == once
        # Blocks of another size are not kept beside those of the largest step.
        assert kept_after_steps(BATCH, BATCH // 2, BATCH, BATCH // 4) <= once
    assert release_memory() == 0


@pytest.mark.skipif("cpu" not in BACKENDS, reason="no native kernels")
def test_memory_of_other_sizes_is_used_again_without_harm() -> None:
    """Levels and batches in turn cut and join kept blocks; gradients stay what they are."""
    blocks = {}
    for recompute in ("none", "expand", "block"):
        torch.manual_seed(0)
        blocks[recompute] = mk.FusedMBConv(CHANNELS, CHANNELS, se_ratio=None, recompute=recompute)
    inputs = [torch.randn(batch, CHANNELS, SIZE, SIZE) for batch in (BATCH, BATCH // 2, 3)]

    def step(block: mk.FusedMBConv, x: torch.Tensor) -> torch.Tensor:
        x = x.detach().requires_grad_()
        block(x).square().sum().backward()
        assert x.grad is not None
        return x.grad

    with mk.use_backend("cpu"):
        cases = [(block, x) for x in inputs for block in blocks.values()]
        fresh = []
        for block, x in cases:
            release_memory()
            fresh.append(step(block, x))
        most = max(_kept_after(lambda case=case: step(*case)) for case in cases)
        release_memory()
        assert all(
            torch.equal(step(*case), expected)
            for _ in range(2)
            for case, expected in zip(cases, fresh, strict=True)
        )
        assert release_memory() <= most


def _kept_after(function: Callable[[], object]) -> int:
    release_memory()
    function()
    return release_memory()


@pytest.mark.skipif("cpu" not in BACKENDS, reason="native kernels are not usable here")
def test_scratch_memory_is_kept_within_bounds_and_freed_on_demand() -> None:
    block = mk.FusedMBConv(8, 8).eval()
    images = [torch.randn(1, 8, side, side) for side in (32, 600)]

    @torch.no_grad()
    def run(x: Tensor, times: int = 1) -> None:
        for _ in range(times):
            block(x)

    assert 0 < _kept_after(lambda: run(images[0])) < 2**21
    large = _kept_after(lambda: run(images[1]))
    assert large > 2**25
    assert _kept_after(lambda: run(images[1], times=3)) == large
    assert release_memory() == 0


PEAKS = """
import torch
from moat_kernels.memory import peak_bytes

def call():
    torch.ones(2**26 // 4)
    torch.ones(2**25 // 4)

print(peak_bytes(lambda: None), peak_bytes(call), peak_bytes(call))
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's /proc")
def test_the_peak_counts_what_is_freed_before_the_end() -> None:
    """In a process whose allocator holds nothing that it could take the two from at once."""
    output = subprocess.check_output([sys.executable, "-c", PEAKS], text=True)
    nothing, *peaks = (int(number) / 2**20 for number in output.split())
    assert nothing < 4
    assert all(63 <= peak < 80 for peak in peaks)
