"""16-bit convolutions of channels whose mean is far from 0, as tests/ops has them of others."""

from __future__ import annotations

import pytest
import torch
from support.far_from_zero import INPUTS, PRECISIONS, Comparison

pytest.importorskip("triton")

SHAPES = [(2, 6, 7, 6), (3, 6, 7, 8)]


@pytest.mark.parametrize(("mean", "std"), INPUTS[1:])
@pytest.mark.parametrize(("dtype", "autocast"), PRECISIONS)
def test_running_statistics(
    dtype: torch.dtype, autocast: bool, mean: float, std: float, device: str
) -> None:
    """Products of 16-bit rows are of what is left of them above their mean, rounded."""
    for shape in SHAPES:
        x = (torch.randn(shape) * std + mean).to(device)
        comparison = Comparison("triton", dtype, autocast, device)
        comparison.check_running_statistics(x, 12)


@pytest.mark.parametrize(("dtype", "autocast"), PRECISIONS)
def test_fixed_statistics(dtype: torch.dtype, autocast: bool, device: str) -> None:
    for mean, std in INPUTS[1:]:
        x = (torch.randn(SHAPES[0]) * std + mean).to(device)
        Comparison("triton", dtype, autocast, device).check_fixed_statistics(x, 12)
