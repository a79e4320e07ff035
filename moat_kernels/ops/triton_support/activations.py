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


# GELU(x) = relu(x) - t Phi(-t) with t = |x|. The logarithm of Phi(-t) is nearly a parabola, so a
# polynomial of low degree and one exponential, which a GPU has a unit of its own for, follow it: a
# dozen instructions, where erf takes 35 and stencils evaluate it several times for each element.
# Fitted on [0, 5.6] for the least absolute error of the result; beyond, t Phi(-t) is below 1e-7
# and is held constant.


@triton.jit
def _gelu(x):
    """Absolute error 7e-7. NaN for NaN, and for -infinity, where PyTorch multiplies it by 0."""
    t = tl.minimum(tl.abs(x), 5.6)
    q = -0.000473294089 * t + 0.00708446186
    q = q * t - 0.05182717
    q = q * t - 0.459992647
    q = q * t - 1.15078783
    q = q * t - 1.00003767
    return tl.where(x < 0.0, 0.0 * x, x) - t * tl.exp2(q)


@triton.jit
def _gelu_derivative(x):
    """Absolute error 7e-7. Phi(-t) - t phi(t) at |x|, or 1 minus it, as Phi(-t) r(t)."""
    t = tl.minimum(tl.abs(x), 5.6, propagate_nan=tl.PropagateNan.ALL)
    q = 3.37791753e-05 * t - 0.000770813029
    r = 0.000116587165 * t - 0.00251528877
    q = q * t + 0.00806683395
    r = r * t + 0.0220142119
    q = q * t - 0.0533514209
    r = r * t - 0.110618733
    q = q * t - 0.458854467
    r = r * t - 0.636213005
    q = q * t - 1.15115941
    r = r * t - 0.797917426
    q = q * t - 0.999998748
    r = r * t + 1.00000024
    slope = r * tl.exp2(q)
    return tl.where(x > 0.0, 1.0 - slope, slope)


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
