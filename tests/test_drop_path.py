"""Stochastic depth by itself."""

from __future__ import annotations

import pytest
import torch

from moat_kernels.drop_path import DropPath

DTYPES = (torch.float64, torch.float32, torch.bfloat16)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_samples_are_dropped_or_scaled(dtype: torch.dtype) -> None:
    drop_path = DropPath(0.25)
    scale = drop_path.scale(torch.empty(4000, 1, dtype=dtype))
    assert scale.dtype == dtype
    assert set(scale.tolist()) == {0.0, torch.tensor(4 / 3, dtype=dtype).item()}
    assert (scale == 0).double().mean() == pytest.approx(0.25, abs=0.03)


def test_every_dtype_draws_the_same_and_every_call_another() -> None:
    drop_path, drawn = DropPath(0.5), []
    for dtype in DTYPES:
        torch.manual_seed(0)
        drawn.append([drop_path.draw(torch.empty(64, dtype=dtype)).tolist() for _ in range(2)])
    assert drawn[0] == drawn[1] == drawn[2]
    assert drawn[0][0] != drawn[0][1]


def test_nothing_is_drawn_in_eval_or_without_probability() -> None:
    x = torch.ones(8, 1, 1, 1)
    state = torch.get_rng_state()
    for drop_path in (DropPath(0.5).eval(), DropPath(0.0)):
        assert drop_path.scale(x) is None and torch.equal(drop_path(x), x)
    assert torch.equal(torch.get_rng_state(), state)
