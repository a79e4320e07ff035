"""The Triton kernels of a batch norm, and what their launches compute beside it."""

from __future__ import annotations

import pytest
import torch
from support.tolerances import assert_close

from moat_kernels.ops.common.batch_norm import Norm, NormParameters

pytest.importorskip("triton")

from moat_kernels.ops.mbconv.triton.kernels import norm as norm_kernels
from moat_kernels.ops.mbconv.triton.kernels.moments import Sums, row_moments
from moat_kernels.ops.mbconv.triton.kernels.norm import fold_norm, norm_gradient
from moat_kernels.ops.mbconv.triton.kernels.shortcut import Pooling


@pytest.mark.parametrize(
    ("dtype", "mean"),
    [(torch.bfloat16, 0.0), (torch.float16, 0.0), (torch.float32, 0.0), (torch.float32, 1e4)],
    ids=str,
)
def test_running_statistics_of_the_input(dtype: torch.dtype, mean: float, device: str) -> None:
    """A mean near zero keeps its digits; nothing cancels where it is 1e4 standard deviations."""
    rows = (torch.randn(5000, 70).to(device) + mean).to(dtype)
    tiles = row_moments(rows)
    assert tiles.total == 5000 and len(tiles.values) > 2
    norm = fold_norm(Norm(), NormParameters(), tiles, None, tiles.values, None)
    exact = rows.double()
    assert (norm[2].double() - exact.mean(0)).abs().max() < 1e-6 * (1 + mean)
    # Means of chunks are kept in float32, whose last digit is 1e-3 at 1e4.
    assert_close(norm[4], exact.var(0, correction=0), 2e-6 * (1 + mean / 500))
    whole_mean, whole_variance = tiles.whole()
    assert (norm[2] - whole_mean).abs().max() < 1e-6 * (1 + mean)
    assert_close(norm[4], whole_variance, 2e-6 * (1 + mean / 500))


@pytest.mark.parametrize("parts", [1, 2, 5, 19])
@pytest.mark.parametrize("taps", [False, True], ids=["norm alone", "taps"])
def test_what_is_added_up_beside_a_norm(parts: int, taps: bool, device: str) -> None:
    """More programs than the norm has blocks of channels, whose own results stay what they are."""
    torch.manual_seed(0)
    channels = 18
    sums = Sums(torch.randn(3, 11 if taps else 2, channels, device=device), 0)
    norm = torch.rand(5, channels, device=device) + 0.5
    weight = torch.randn(channels, 9, device=device) if taps else None
    partial = torch.randn(parts, 1003, device=device)
    arguments = (sums, norm, NormParameters(), None, weight, 7, True, not taps)
    nothing = Pooling.of(None, 1, torch.float32)
    with_parts = norm_gradient(*arguments, partial, nothing)
    alone = norm_gradient(*arguments, None, nothing)
    assert alone.added is None and with_parts.added is not None
    assert_close(with_parts.added, partial.double().sum(0), 1e-6)
    assert torch.equal(with_parts.factors, alone.factors)
    for one, other in zip(with_parts.gradients, alone.gradients, strict=True):
        assert torch.equal(one, other)
    if taps:
        assert with_parts.taps is not None and alone.taps is not None
        assert torch.equal(with_parts.taps, alone.taps)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_what_is_pooled_beside_a_norm(dtype: torch.dtype, device: str) -> None:
    """Beside two blocks of channels, in float32 until it is rounded."""
    torch.manual_seed(0)
    maps = torch.randn(2, 70, 6, 14, device=device)
    rows = maps.permute(0, 2, 3, 1).reshape(-1, 70)
    pooling = Pooling.of(rows, 14, dtype)
    assert pooling.pooled is not None and pooling.programs > 2
    pooling.pooled.fill_(torch.nan)
    sums = Sums(torch.randn(3, 11, 18, device=device), 0)
    norm = torch.rand(5, 18, device=device) + 0.5
    taps = torch.randn(18, 9, device=device)
    norm_gradient(sums, norm, NormParameters(), None, taps, 7, True, False, None, pooling)
    expected = torch.nn.functional.avg_pool2d(maps.double(), 2).permute(0, 2, 3, 1).reshape(-1, 70)
    assert_close(pooling.pooled, expected, 1e-6 if dtype == torch.float32 else 4e-3)


def test_what_is_beside_a_norm_fits_a_grid(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of few channels and 2^27 pixels: all axes of a grid but the first end at 65535."""
    grids: list[tuple[int, ...]] = []
    monkeypatch.setattr(norm_kernels, "launch", lambda _, grid, *__, **___: grids.append(grid))
    with torch.device("meta"):
        pooling = Pooling.of(torch.empty(2**27, 16), 2**10, torch.bfloat16)
        sums, norm, taps = torch.empty(3, 11, 64), torch.empty(5, 64), torch.empty(64, 9)
    norm_gradient(
        *(Sums(sums, 0), norm, NormParameters(), None, taps, 7, True, False, None, pooling)
    )
    ((lines, blocks),) = grids
    assert blocks < 2**16 and lines * blocks >= pooling.programs + 10 * blocks
