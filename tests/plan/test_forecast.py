"""Forecasts of the time of launches, by hand: with an H200's 4.8 TB/s."""

from __future__ import annotations

import pytest
import torch

from moat_kernels.ops.triton_support.traffic import Crossing, Pass
from moat_kernels.plan import GPUS, compiled_seconds, eager_seconds, graphed_seconds
from moat_kernels.plan.operators import OperatorPass

H200 = GPUS["h200"]
KILOBYTE = (Crossing(torch.Size([1000]), 1000),)


def moving(seconds: float) -> tuple[Crossing, ...]:
    """What DRAM moves at full bandwidth in this time."""
    size = round(4.8e12 * seconds)
    return (Crossing(torch.Size([size]), size),)


def test_in_a_graph_kernels_come_as_near_to_their_floors_as_those_that_were_measured() -> None:
    ours = Pass("expand_kernel", moving(0.25e-3), (), 0, "float32")
    multiplies = Pass("project_kernel", KILOBYTE, (), round(0.5e-3 * 989.4e12), "bfloat16")
    theirs = OperatorPass("gelu", moving(0.39e-3), (), 0, "float32")
    assert graphed_seconds([ours], H200) == pytest.approx(1e-3)
    assert graphed_seconds([multiplies], H200) == pytest.approx(2e-3)
    assert graphed_seconds([theirs], H200) == pytest.approx(1e-3)
    assert graphed_seconds([ours, multiplies, theirs], H200) == pytest.approx(4e-3)


def test_every_launch_takes_something() -> None:
    small = OperatorPass("mul", KILOBYTE, (), 0, "float32")
    assert graphed_seconds([small] * 1000, H200) == pytest.approx(2.7e-3)


def test_eager_the_slower_of_host_and_gpu_decides() -> None:
    small = OperatorPass("mul", KILOBYTE, (), 0, "float32")
    large = OperatorPass("gelu", moving(39e-3), (), 0, "float32")
    assert eager_seconds([small] * 1000, H200) == pytest.approx(33e-3)
    assert eager_seconds([*[small] * 1000, large], H200) == pytest.approx(102.7e-3)


def test_torch_compile_leaves_three_quarters_of_what_stock_takes_in_a_graph() -> None:
    theirs = OperatorPass("gelu", moving(0.39e-3), (), 0, "float32")
    assert compiled_seconds([theirs] * 10, H200) == pytest.approx(7.4e-3)


def test_the_host_takes_longer_for_launches_of_this_package() -> None:
    ours = Pass("norm_kernel", KILOBYTE, (), 0, "float32")
    theirs = OperatorPass("mul", KILOBYTE, (), 0, "float32")
    assert eager_seconds([ours] * 10 + [theirs] * 10, H200) == pytest.approx(1.21e-3)
