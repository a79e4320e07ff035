"""16-bit convolutions of channels whose mean is far from 0 lose nothing beside stock modules."""

from __future__ import annotations

import pytest
import torch
from support.far_from_zero import INPUTS, PRECISIONS, Comparison
from support.native import needs_extension

BACKENDS = ["torch", pytest.param("cpu", marks=needs_extension)]
# 84 rows of 6 channels measure the norms one by one, 715 rows of 13 by their covariance.
SHAPES = [(2, 6, 7, 6), (5, 13, 13, 11)]


@pytest.mark.parametrize(("mean", "std"), INPUTS)
@pytest.mark.parametrize(("dtype", "autocast"), PRECISIONS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_running_statistics(
    backend: str, dtype: torch.dtype, autocast: bool, mean: float, std: float
) -> None:
    """They are of x, not of rows that were rounded for the convolution."""
    for shape in SHAPES:
        x = torch.randn(shape) * std + mean
        Comparison(backend, dtype, autocast).check_running_statistics(x, 36)


@pytest.mark.parametrize(("mean", "std"), INPUTS)
@pytest.mark.parametrize(("dtype", "autocast"), PRECISIONS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_fixed_statistics(
    backend: str, dtype: torch.dtype, autocast: bool, mean: float, std: float
) -> None:
    """The running mean leaves rows before they are rounded."""
    for shape in SHAPES:
        x = torch.randn(shape) * std + mean
        Comparison(backend, dtype, autocast).check_fixed_statistics(x, 36)
