"""The search for the largest batch."""

from __future__ import annotations

import pytest

from moat_kernels.plan import largest_batch


@pytest.mark.parametrize("slope", [3, 1000])
@pytest.mark.parametrize("capacity", [110, 1234, 50_000])
def test_it_fits_and_the_next_does_not(slope: int, capacity: int) -> None:
    def peak(batch: int) -> int:
        # Jumps, as where statistics change the way they are measured.
        return 100 + slope * batch + (40 if batch > 7 else 0) - batch % 3

    found = largest_batch(peak, capacity)
    assert found == max((b for b in range(20_000) if b and peak(b) <= capacity), default=0)


def test_few_trials_are_enough() -> None:
    tried = []

    def peak(batch: int) -> int:
        tried.append(batch)
        return 5_000_000 + 777_777 * batch + 512 * (batch % 5)

    assert largest_batch(peak, 10**9) == 1279
    assert len(tried) <= 6
