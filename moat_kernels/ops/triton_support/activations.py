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


@triton.jit
def activate(x, KIND: tl.constexpr):
    """The activation called `KIND`, of x."""
    if KIND == "gelu":
        return 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
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
        density = 0.3989422804014327 * tl.exp(-0.5 * x * x)
        return 0.5 * (1.0 + tl.erf(x * 0.7071067811865476)) + x * density
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
