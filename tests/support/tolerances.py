"""Every tolerance of the test suite, with its reason.

Errors are relative to the largest absolute value of the expected tensor, unless said otherwise.
"""

from __future__ import annotations

import torch
from torch import Tensor

# Against the official TensorFlow results (float32). What a float64 computation of the same
# differs from them is TensorFlow's own rounding: outputs up to 1.4e-6, gradients up to 4e-6 in a
# block and 1.1e-5 in a whole model; ours comes on top.
GOLDEN_OUTPUT = 1e-5
GOLDEN_BLOCK_GRADIENT = 2e-5
GOLDEN_MODEL_GRADIENT = 5e-5
# Absolute, as the running statistics are of order one; the update is 1 % of the batch's.
GOLDEN_MOVING = 1e-6
# Gradients that are zero in exact arithmetic (spec: biases before a batch norm, key biases).
# Absolute: TensorFlow leaves 1e-10..1e-7 there, all others have a maximum above 5e-5.
GOLDEN_ZERO_GRADIENT = 1e-6

# Backends against the reference, both in the dtype under test. float64: sums of up to 1e5 terms
# of order one, reordered. float32: one rounding is 6e-8, sums of some hundred terms in another
# order and a fold of three factors into one weight cost two decimal digits.
BACKEND_OUTPUT = {torch.float64: 1e-11, torch.float32: 1e-5}
BACKEND_GRADIENT = {torch.float64: 1e-9, torch.float32: 5e-5}

# Low precision is judged by its distance from the float64 result: at most this many times as far
# as stock PyTorch modules in that dtype (which round after every step, as we do after fewer).
LOW_PRECISION_FACTOR = 2.0


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """max |actual - expected| / max |expected|; infinite if shapes or NaN patterns differ."""
    if actual.shape != expected.shape:
        return float("inf")
    if expected.numel() == 0:
        return 0.0
    actual, expected = actual.detach().double(), expected.detach().double()
    if not torch.equal(actual.isfinite(), expected.isfinite()):
        return float("inf")
    finite = expected.isfinite()
    if not finite.any():
        return 0.0
    difference = (actual - expected)[finite].abs().max()
    return float(difference / expected[finite].abs().max().clamp(min=1e-30))


def assert_close(actual: Tensor, expected: Tensor, tolerance: float, name: str = "") -> None:
    """Assert that the relative error is within `tolerance`."""
    error = relative_error(actual, expected)
    assert error <= tolerance, f"{name}: relative error {error:.2e} > {tolerance:.0e}"
