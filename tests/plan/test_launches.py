"""How many kernels a fused block launches in a training step: a host is busy with each."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache

import pytest
import torch
from support.mbconv_passes import wide_crossings
from support.peers import import_peer
from torch import Tensor, nn
from torch.autograd.graph import _engine_run_backward

from moat_kernels import FusedMBConv, FusedMOATBlock, fuse, list_models, use_backend
from moat_kernels.ops.common.device import planning
from moat_kernels.ops.common.registration import looking_inside
from moat_kernels.ops.triton_support.launching import triton_missing
from moat_kernels.ops.triton_support.traffic import Pass, record_passes
from moat_kernels.plan.autocast import CudaAutocast
from moat_kernels.plan.meter import Meter
from moat_kernels.plan.step import BLOCKS, TrainingStep

pytestmark = pytest.mark.skipif(bool(triton_missing()), reason=triton_missing())


def passes_of(
    call: Callable[[Tensor], Tensor], x: Tensor, architecture: int = 90
) -> tuple[list[Pass], list[Pass]]:
    """What forward and backward launch, under autocast."""
    with (
        planning(architecture),
        use_backend("triton"),
        looking_inside(),
        record_passes() as passes,
        Meter(passes),
        CudaAutocast(torch.bfloat16),
    ):
        output = call(x)
        count = len(passes)
        gradient = torch.empty_like(output)
        # As plan/step.py, which says why.
        _engine_run_backward(
            *((output,), (gradient,), False, False, ()),
            allow_unreachable=True,
            accumulate_grad=True,
        )
    return passes[:count], passes[count:]


def launches(
    call: Callable[[Tensor], Tensor], x: Tensor, architecture: int = 90
) -> tuple[list[str], list[str]]:
    """The kernels of forward and backward, under autocast."""
    forward, backward = passes_of(call, x, architecture)
    return [one.kernel for one in forward], [one.kernel for one in backward]


def meta_map(channels: int, side: int) -> Tensor:
    """Of bfloat16, as blocks hand them on."""
    x = torch.empty(2, channels, side, side, dtype=torch.bfloat16, device="meta")
    return x.to(memory_format=torch.channels_last).requires_grad_()


def attention_half_launches(side: int, recompute: str) -> tuple[list[str], list[str]]:
    """With a drop path, of float32 weights."""
    with torch.device("meta"):
        block = FusedMOATBlock(64, 64, position_size=side, drop_path=0.2, recompute=recompute)
    return launches(block.attention_half, meta_map(64, side))


FORWARD = ["norm_and_cast_kernel", "addmm", "forward_kernel", "addmm", "addcmul"]
BACKWARD = [
    *("branch_gradient_kernel", "mm", "mm", "gradient_kernel", "mm", "mm"),
    *("layer_norm_backward_kernel", "fold_sums_kernel"),
]


def test_the_attention_half() -> None:
    forward, backward = attention_half_launches(7, "none")
    assert forward == ["bernoulli_", *FORWARD]
    assert backward == BACKWARD


def test_the_attention_half_of_large_windows() -> None:
    """Three kernels in place of one: faster on an H200 from some 64 tokens on."""
    forward, backward = attention_half_launches(14, "none")
    assert (len(forward), len(backward)) == (6, 10)


def test_recomputing_the_attention_half_draws_once() -> None:
    forward, backward = attention_half_launches(7, "block")
    assert forward == ["bernoulli_", *FORWARD]
    assert backward[: len(FORWARD)] == FORWARD
    assert len(backward) == len(FORWARD) + 8


def test_the_attention_half_of_a_block_of_timm() -> None:
    """As of ours: its draw and its sum are part of it too."""
    maxvit = import_peer("timm.models.maxxvit")
    config = replace(maxvit.MaxxVitTransformerCfg(), window_size=(7, 7), rel_pos_type="bias_tf")
    blocks = nn.Sequential(maxvit.PartitionAttention2d(64, "block", config, drop_path=0.2))
    fuse(blocks)
    forward, backward = launches(blocks.to("meta"), meta_map(64, 14))
    assert forward[: len(FORWARD) + 1] == ["bernoulli_", *FORWARD]
    assert backward[-len(BACKWARD) :] == BACKWARD


DRAW = ["bernoulli_", "div_"]
BOTTLENECK = (
    [
        *("row_moments_kernel", "fold_weights_kernel", "expand_kernel", "norm_kernel"),
        *("depthwise_kernel", "norm_kernel", "project_kernel"),
    ],
    [
        *("fold_weights_kernel", "project_input_kernel", "mm"),
        *("norm_gradient_kernel", "depthwise_backward_kernel", "norm_gradient_kernel"),
        *("expand_products_kernel", "sum", "fold_gradient_kernel", "correction_kernel"),
        "expand_input_kernel",
    ],
)


def bottleneck_launches(
    block: FusedMBConv | FusedMOATBlock, side: int = 28
) -> tuple[list[str], ...]:
    return launches(block.inverted_bottleneck, meta_map(64, side))


def test_the_bottleneck_of_a_moat_block() -> None:
    with torch.device("meta"):
        block = FusedMOATBlock(64, 64, drop_path=0.2)
    forward, backward = bottleneck_launches(block)
    assert forward == [*DRAW, *BOTTLENECK[0]]
    assert backward == BOTTLENECK[1]


@pytest.mark.parametrize(
    ("recompute", "forward", "backward"), [("none", 4, 10), ("expand", 4, 11), ("block", 4, 13)]
)
def test_how_often_wide_tensors_cross_memory(recompute: str, forward: int, backward: int) -> None:
    """BLAS' product of project's weight too: one written for it, and read."""
    with torch.device("meta"):
        block = FusedMOATBlock(64, 64, recompute=recompute)
    passes = passes_of(block.inverted_bottleneck, meta_map(64, 28))
    assert [wide_crossings(each, 256) for each in passes] == [forward, backward]


def test_squeeze_excite_and_strides() -> None:
    with torch.device("meta"):
        block = FusedMBConv(64, 64)
        first = FusedMBConv(64, 96, stride=2)
    assert tuple(map(len, bottleneck_launches(block))) == (9, 14)
    # The shortcut's pool and convolution are parts of other launches; its product is one more.
    assert tuple(map(len, bottleneck_launches(first))) == (9, 15)


@pytest.mark.parametrize(("stride", "backward"), [(1, 19), (2, 20)])
def test_a_whole_moat_block(stride: int, backward: int) -> None:
    """At windows of 7x7, where attention has one kernel backward; without the draws."""
    channels, side = 64 * stride, 7 * stride
    with torch.device("meta"):
        block = FusedMOATBlock(64, channels, stride=stride, position_size=7)
    assert tuple(map(len, launches(block, meta_map(64, side)))) == (12, backward)


@cache
def step_launches(model: str, blocks: str) -> int:
    resolution = 256 if model.startswith("tiny") else 224
    return len(TrainingStep(model, resolution, blocks, architecture=90).trace(64).passes)


@pytest.mark.parametrize("blocks", BLOCKS[1:])
@pytest.mark.parametrize("model", ["moat_0", "tiny_moat_0"])
def test_a_training_step_in_every_recompute_level(model: str, blocks: str) -> None:
    assert step_launches(model, blocks) <= 0.38 * step_launches(model, "stock")


@pytest.mark.parametrize("model", list_models())
def test_a_training_step_of_every_variant(model: str) -> None:
    assert step_launches(model, "none") <= 0.34 * step_launches(model, "stock")


def test_a_training_step_of_moat_0() -> None:
    assert step_launches("moat_0", "none") <= 469
