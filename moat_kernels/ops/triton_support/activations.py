"""The activations of ops/activations.py and their derivatives, for use inside Triton kernels.

Arguments and results are float32. Importing this imports triton.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _tanh(x):
    # exp overflows to infinity or vanishes, and the quotient is right in both cases.
    return 1.0 - 2.0 / (tl.exp(2.0 * x) + 1.0)


@triton.jit
def _sigmoid(x):
    return 1.0 / (1.0 + tl.exp(-x))


@triton.jit
def _gelu_tanh_inner(x):
    """sqrt(2/pi) (x + 0.044715 x^3)"""
    return 0.7978845608028654 * (x + 0.044715 * x * x * x)


# GELU(x) = relu(x) - t Phi(-t) with t = |x|. The 16th root of Phi(-t) is nearly a straight line,
# so a polynomial of low degree raised to the 16th power follows it: a dozen instructions, where erf
# takes 35 and the stencils evaluate it several times for each element. The fits are those of
# csrc/cpu/isa/activation.h; beyond 5.6 the product is below 1e-7 and is held constant.


@triton.jit
def _gelu(x):
    """Absolute error 5e-7. NaN for NaN, and for -infinity, where PyTorch multiplies it by 0."""
    t = tl.minimum(tl.abs(x), 5.6)
    q = -1.17588206e-06 * t - 3.52191528e-05
    q = q * t + 0.000658403849
    q = q * t - 0.00134401256
    q = q * t - 0.0178059563
    q = q * t - 0.0477672964
    q = q * t + 0.957604408
    q = q * q
    q = q * q
    q = q * q
    q = q * q
    return tl.where(x < 0.0, 0.0 * x, x) - t * q


@triton.jit
def _gelu_derivative(x):
    """Absolute error 9e-7. With h(t) = t q^16, h' = q^15 r and r = q + 16 t q'."""
    t = tl.minimum(tl.abs(x), 5.6)
    q = 6.17843966e-07 * t - 8.13178212e-06
    r = 6.981636816e-05 * t - 7.887828656e-04
    q = q * t - 4.58297382e-06
    r = r * t - 3.712208794e-04
    q = q * t + 0.0005910084
    r = r * t + 0.038415546
    q = q * t - 0.00126567588
    r = r * t - 0.06201811812
    q = q * t - 0.0178526528
    r = r * t - 0.5891375424
    q = q * t - 0.0477546751
    r = r * t - 0.8118294767
    q = q * t + 0.957603335
    r = r * t + 0.957603335
    q2 = q * q
    q4 = q2 * q2
    slope = r * (q4 * q4 * q4 * q2 * q)
    slope = tl.where(x > 0.0, 1.0 - slope, slope)
    return tl.where(x == x, slope, x)


@triton.jit
def activate(x, KIND: tl.constexpr):
    """The activation called `KIND`, of x."""
    if KIND == "gelu":
        return _gelu(x)
    elif KIND == "gelu_tanh":
        return 0.5 * x * (1.0 + _tanh(_gelu_tanh_inner(x)))
    elif KIND == "silu":
        return x * _sigmoid(x)
    elif KIND == "relu":
        # A comparison with NaN is false, and NaN stays.
        return tl.where(x <= 0.0, 0.0, x)
    else:
        tl.static_assert(KIND == "identity")
        return x


@triton.jit
def activation_derivative(x, KIND: tl.constexpr):
    """The derivative of `activate(x, KIND)` by x."""
    if KIND == "gelu":
        return _gelu_derivative(x)
    elif KIND == "gelu_tanh":
        tanh = _tanh(_gelu_tanh_inner(x))
        inner_derivative = 0.7978845608028654 * (1.0 + 0.134145 * x * x)
        return 0.5 * (1.0 + tanh) + 0.5 * x * (1.0 - tanh * tanh) * inner_derivative
    elif KIND == "silu":
        sigmoid = _sigmoid(x)
        return sigmoid * (1.0 + x * (1.0 - sigmoid))
    elif KIND == "relu":
        return tl.where(x <= 0.0, 0.0, 1.0)
    else:
        tl.static_assert(KIND == "identity")
        return tl.full(x.shape, 1.0, tl.float32)
