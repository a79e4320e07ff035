"""`branch_layer_norm`: choice of the backend, operator schema and autograd."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from moat_kernels.ops.common.autocast import autocast_dtype
from moat_kernels.ops.common.backends import (
    backend_status,
    is_eager,
    is_exporting,
    requested_backend,
    warn_once,
)
from moat_kernels.ops.common.registration import define_op, is_watched
from moat_kernels.ops.layer_norm import reference
from moat_kernels.ops.layer_norm.triton import backend as triton_backend


def covers(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> bool:
    """Whether kernels compute `branch_layer_norm` of this call; stock PyTorch does otherwise.

    Falling back from a backend that was asked for gives a FallbackWarning.
    """
    requested = requested_backend()
    if requested is None:
        if x.device.type != "cuda" or not backend_status()["triton"].usable:
            return False
    elif requested != "triton":
        return False
    if not (is_eager() or torch.compiler.is_compiling()) or is_exporting():
        return False
    reason = triton_backend.unsupported(x, weight, bias)
    if reason and requested is not None:
        warn_once(
            f"layer_norm: backend 'triton' does not cover {reason}; falling back to 'reference'"
        )
    return not reason


def branch_layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """(LayerNorm over the last axis, x): start of a residual branch, and what it is added to.

    x: [..., C], any strides; weight, bias: [C]. Whoever uses the returned x instead of x has its
    gradient added in the norm's own backward pass, which then needs no further one. Where kernels
    compute it (`covers`) the norm has autocast's dtype, if that is on: one rounding, as of stock
    LayerNorm's float32 result in the product that follows. Not differentiable twice.
    """
    if not covers(x, weight, bias):
        return reference.branch_layer_norm(x, weight, bias, eps)
    dtype = autocast_dtype(x) or x.dtype
    if torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad or bias.requires_grad):
        return _BranchLayerNorm.apply(x, weight, bias, eps, dtype)
    return _forward(x, weight, bias, eps, dtype)[0], x


def _forward(
    x: Tensor, weight: Tensor, bias: Tensor, eps: float, dtype: torch.dtype
) -> list[Tensor]:
    """[normalized, mean, 1 / standard deviation]"""
    if is_watched():
        return torch.ops.moat_kernels.layer_norm_forward(x, weight, bias, eps, dtype)
    return triton_backend.forward(x, weight, bias, eps, dtype)


class _BranchLayerNorm(torch.autograd.Function):
    """Saves x, the weight, and float32 mean and 1 / standard deviation of each row."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, eps: float, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor]:
        normalized, mean, rstd = _forward(x, weight, bias, eps, dtype)
        ctx.save_for_backward(x, weight, mean, rstd)
        ctx.bias_dtype = bias.dtype
        ctx.set_materialize_grads(False)
        return normalized, x.view_as(x)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(
        ctx: Any, grad: Tensor | None, grad_residual: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        if grad is None:
            return grad_residual, None, None, None, None
        x, weight, mean, rstd = ctx.saved_tensors
        needs_x, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        arguments = (grad, grad_residual, x, weight, mean, rstd, needs_weight or needs_bias)
        if is_watched():
            gradients = torch.ops.moat_kernels.layer_norm_backward(*arguments)
        else:
            gradients = triton_backend.backward(*arguments)
        return (
            gradients[0] if needs_x else None,
            gradients[1].to(weight.dtype) if needs_weight else None,
            gradients[2].to(ctx.bias_dtype) if needs_bias else None,
            None,
            None,
        )


# -> [normalized, mean, 1 / standard deviation]
define_op(
    "layer_norm_forward(Tensor x, Tensor weight, Tensor bias, float eps, ScalarType dtype)"
    " -> Tensor[]",
    triton_backend.forward,
    triton_backend.forward,
)
# -> [gradient of x, and if needed those of weight and bias in float32]
define_op(
    "layer_norm_backward(Tensor grad, Tensor? grad_residual, Tensor x, Tensor weight, Tensor mean, "
    "Tensor rstd, bool needs_parameters) -> Tensor[]",
    triton_backend.backward,
    triton_backend.backward,
)
