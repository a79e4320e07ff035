"""The largest batch whose training step fits a memory."""

from __future__ import annotations

from collections.abc import Callable


def largest_batch(peak: Callable[[int], int], capacity: int) -> int:
    """The largest batch with peak(batch) <= capacity; 0: not even one image fits.

    peak: bytes of a step at a batch size, growing with it. It is nearly affine, so that a line
    through two points leads to the answer, or close to it; the answer and the next larger batch
    have both been tried.
    """
    sizes = {1: peak(1)}
    if sizes[1] > capacity:
        return 0
    fits, too_large = 1, None
    guess = 8
    while too_large is None or too_large - fits > 1:
        sizes[guess] = peak(guess)
        if sizes[guess] <= capacity:
            fits = guess
        else:
            too_large = guess
        guess = _next_guess(sizes, fits, too_large, capacity)
    return fits


def _next_guess(sizes: dict[int, int], fits: int, too_large: int | None, capacity: int) -> int:
    """A batch between `fits` and `too_large`, near where the line through the last two leads."""
    (first, first_size), (last, last_size) = list(sizes.items())[-2:]
    slope = max(1.0, (last_size - first_size) / (last - first))
    guess = last + int((capacity - last_size) // slope)
    return max(fits + 1, guess if too_large is None else min(guess, too_large - 1))
