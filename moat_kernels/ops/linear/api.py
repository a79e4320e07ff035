"""Whether a linear layer is computed natively, and its autograd function."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from moat_kernels.ops.common.autocast import autocast_dtype
from moat_kernels.ops.common.backends import (
    backend_status,
    is_eager,
    is_exporting,
    requested_backend,
)
from moat_kernels.ops.common.checks import check_devices
from moat_kernels.ops.linear.cpu import backward, forward, unsupported


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x weight^T + bias; native where cpu_backend.py covers it."""
    if not _is_native(x, weight, bias):
        check_devices("linear", x, {"weight": weight, "bias": bias})
        return F.linear(x, weight, bias)
    tensors = (x, weight, bias)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors):
        return _Linear.apply(*tensors)
    return forward(*tensors)


def _is_native(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    return (
        backend_status()["cpu"].usable
        and requested_backend() in (None, "cpu")
        and autocast_dtype(x) is None
        and (is_eager() or torch.compiler.is_compiling())
        and not is_exporting()
        and not unsupported(x, weight, bias)
    )


class _Linear(torch.autograd.Function):
    """Saves x and the weight, as stock does."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return forward(x, weight, bias)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        needs_x, needs_weight, needs_bias = ctx.needs_input_grad
        gradients = backward(grad, x, weight, needs_x, needs_weight or needs_bias)
        needs = (needs_x, needs_weight, needs_bias)
        return tuple(g if needed else None for g, needed in zip(gradients, needs, strict=True))
