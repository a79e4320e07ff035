"""The activations a description may name, and their derivatives, in stock operations."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def activate(kind: str, x: Tensor) -> Tensor:
    """`kind` of `x`; "identity" returns `x` itself."""
    if kind == "gelu":
        return F.gelu(x)
    if kind == "gelu_tanh":
        return F.gelu(x, approximate="tanh")
    if kind == "silu":
        return F.silu(x)
    if kind == "relu":
        return F.relu(x)
    return x


def activate_backward(kind: str, grad: Tensor, x: Tensor) -> Tensor:
    """Gradient with respect to `x`, the input of `activate(kind, x)`."""
    if kind == "gelu":
        return torch.ops.aten.gelu_backward(grad, x)
    if kind == "gelu_tanh":
        return torch.ops.aten.gelu_backward(grad, x, approximate="tanh")
    if kind == "silu":
        return torch.ops.aten.silu_backward(grad, x)
    if kind == "relu":
        return torch.ops.aten.threshold_backward(grad, x, 0)
    return grad
