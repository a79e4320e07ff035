"""How many kernels a fused block launches in a training step: a host is busy with each."""

from __future__ import annotations

import pytest
import torch
from torch.autograd.graph import _engine_run_backward

from moat_kernels import FusedMOATBlock, use_backend
from moat_kernels.ops.common.device import planning
from moat_kernels.ops.triton_support.launching import triton_missing
from moat_kernels.ops.triton_support.traffic import record_passes
from moat_kernels.plan.autocast import CudaAutocast
from moat_kernels.plan.meter import Meter

pytestmark = pytest.mark.skipif(bool(triton_missing()), reason=triton_missing())


def attention_half_launches(side: int, recompute: str) -> tuple[list[str], list[str]]:
    """The kernels of forward and backward, under autocast with a drop path, of float32 weights."""
    with torch.device("meta"):
        block = FusedMOATBlock(64, 64, position_size=side, drop_path=0.2, recompute=recompute)
        y = torch.empty(2, 64, side, side).to(memory_format=torch.channels_last).requires_grad_()
    with (
        planning(90),
        use_backend("triton"),
        record_passes() as passes,
        Meter(passes),
        CudaAutocast(torch.bfloat16),
    ):
        output = block.attention_half(y)
        count = len(passes)
        gradient = torch.empty_like(output)
        # As plan/step.py, which says why.
        _engine_run_backward(
            *((output,), (gradient,), False, False, ()),
            allow_unreachable=True,
            accumulate_grad=True,
        )
    names = [one.kernel for one in passes]
    return names[:count], names[count:]


FORWARD = ["norm_and_cast_kernel", "addmm", "forward_kernel", "addmm", "addcmul"]


@pytest.mark.parametrize("side", [7, 14])
def test_the_attention_half(side: int) -> None:
    forward, backward = attention_half_launches(side, "none")
    assert forward == ["bernoulli_", *FORWARD]
    assert backward == [
        *("branch_gradient_kernel", "mm", "mm", "gradient_kernel", "mm", "mm"),
        *("layer_norm_backward_kernel", "fold_sums_kernel"),
    ]


def test_the_attention_half_of_large_windows() -> None:
    forward, backward = attention_half_launches(20, "none")
    assert (len(forward), len(backward)) == (6, 11)


def test_recomputing_the_attention_half_draws_once() -> None:
    forward, backward = attention_half_launches(7, "block")
    assert forward == ["bernoulli_", *FORWARD]
    assert backward[: len(FORWARD)] == FORWARD
    assert len(backward) == len(FORWARD) + 8
