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
# The Triton kernels take statistics and gradients through a covariance (see FOLDED_GRADIENT); the
# worst that was seen is 2.2e-5.
GOLDEN_TRITON_GRADIENT = 4e-5
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

# A whole model in float32: what ten blocks add up. The worst case that was seen: 1.02e-5, on an
# Intel Xeon with AMX, whose sums are in another order than those of the AMD CPUs that were tried.
BACKEND_MODEL_OUTPUT = 2e-5

# Some gradients are zero in exact arithmetic (biases before a norm that measures the batch): what
# is left is the rounding of a sum of some hundred terms of order 10. Absolute, for float32.
BACKEND_ZERO_GRADIENT = 1e-3

# Error of a variance taken from the covariance, for float32 inputs, relative to (variance + eps).
# Products are summed in float32 over a tile of rows: about 1e-7 of the covariance's entries. Where
# channels cancel to 1e-4 of their variance that is 1e-3 of what is left, damped by eps.
FOLDED_VARIANCE = 3e-4
# What a float32 gradient through the covariance may lose beyond twice eager's error.
FOLDED_GRADIENT = 2e-5
# The same for channels that are 99.99 % one signal: the gradient is a small difference of large
# C x C terms.
FOLDED_GRADIENT_CORRELATED = 2e-3

# Error of a mean, in standard deviations, and of a variance, relative to it, of some hundred rows
# at 100 standard deviations from 0, beyond LOW_PRECISION_FACTOR times eager's: PyTorch's own sums
# of a channels_last map lose up to 3e-6, of a contiguous one a tenth of that.
MEASURED_MOMENTS = 5e-6

# Low precision is judged by its distance from the float64 result: at most this many times as far
# as stock PyTorch modules in that dtype (which round after every step, as we do after fewer).
LOW_PRECISION_FACTOR = 2.0
# Units in the last place that are allowed on top: one for the result's own rounding; more where the
# norms are frozen, as their weights are folded and then rounded, the same for every pixel, so that
# sums over few pixels do not average it out (on an H200 3.04e-2 where stock's is 0.70e-2, over 144
# pixels in bfloat16: 2.1 units beyond twice stock's).
LOW_PRECISION_ROUNDING = 1
FOLDED_ROUNDING = 3
# Error of models and blocks frozen in int8: `freeze` allows 0.015 on the calibration, root mean
# square over the results'; the largest of single values, of other images and sizes, is some three
# times that, and bfloat16's own comes on top.
INT8_ERROR = 0.06
# A step in int8 against its own arithmetic: half a unit in the last place of bfloat16 (2^-8) for
# the result, as much again for bytes that differ by one from those of float64, as norms and
# activations that lie near the middle between two are rounded to 2^-11.
INT8_STEP = 2.0**-7

# The same factor over eight inputs to a model that magnifies rounding at random: of one tensor
# (0.7 to 2.0 by the interpreter, so many inputs tell it to a half), and in the median over all
# (0.8 and 1.0).
RANDOM_FACTOR, TYPICAL_FACTOR = 3.0, 1.25

# What storing a float32 result in another dtype adds: one rounding, half a unit in the last place,
# and the same of the stored output that attention's backward reads.
STORED_ROUNDING = {
    dtype: 0.0 if dtype is torch.float32 else torch.finfo(dtype).eps
    for dtype in (torch.float32, torch.bfloat16, torch.float16)
}

# GELU of the native kernels in float32, a polynomial to the 16th power: the largest absolute error
# is 2.9e-7, one unit in the last place at 4; relative to results of |x| <= 1 it is 1.6e-6, what 16
# factors are rounded by; that of the derivative is 7.8e-7. Of the polynomial, on a grid.
NATIVE_GELU = 4e-7
NATIVE_GELU_OF_SMALL_VALUES = 2e-6
NATIVE_GELU_SLOPE = 1e-6
# A CUDA stencil kernel in float32 against float64: GELU by a polynomial is within 9e-7, then sums
# of nine products, or of the products of all pixels in float32 partial sums.
CUDA_KERNEL = 1e-5
# Mean and squared deviations, against those of the very tensor that was stored.
STORED_MOMENTS = 1e-5
# Whole small models in float32 in other runtimes, which choose their own convolution algorithms
# (Winograd) and approximations of erf and exp.
EXPORTED_OUTPUT = 1e-4
# A model whose blocks were fused against the untouched one, in float64: the backends' tolerance.
FUSED_MODEL = 1e-9


def relative_error(actual: Tensor, expected: Tensor, floor: float = 1e-30) -> float:
    """max |actual - expected| / max(floor, max |expected|); infinite if shapes or NaNs differ."""
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
    return float(difference / expected[finite].abs().max().clamp(min=floor))


def assert_close(
    actual: Tensor, expected: Tensor, tolerance: float, name: str = "", floor: float = 1e-30
) -> None:
    """Assert that the relative error is within `tolerance`."""
    error = relative_error(actual, expected, floor)
    assert error <= tolerance, f"{name}: relative error {error:.2e} > {tolerance:.0e}"
