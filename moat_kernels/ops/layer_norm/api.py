"""`branch_layer_norm`: choice of the backend, operator schema and autograd."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from moat_kernels.ops.common.autocast import autocast_dtype
from moat_kernels.ops.common.backends import choose_backend, is_exporting, requested_backend
from moat_kernels.ops.common.registration import define_op, is_watched
from moat_kernels.ops.layer_norm import cpu, reference
from moat_kernels.ops.layer_norm.contract import Backend
from moat_kernels.ops.layer_norm.triton import backend as triton_backend

BACKENDS: Mapping[str, Backend] = {"cpu": cpu, "triton": triton_backend}


def _choose(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> str:
    if is_exporting():
        return "reference"
    return choose_backend(
        "layer_norm",
        x.device,
        BACKENDS,
        lambda candidate: candidate.unsupported(x, weight, bias),
        optional=requested_backend() != "triton",  # on a CPU stock does as well
    )


def covers(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> bool:
    """Whether kernels compute `branch_layer_norm` of this call; stock PyTorch does otherwise.

    Falling back from a backend that was asked for gives a FallbackWarning.
    """
    return _choose(x, weight, bias) != "reference"


def branch_layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """(LayerNorm over the last axis, x): start of a residual branch, and what it is added to.

    x: [..., C], any strides; weight, bias: [C]. Whoever uses the returned x instead of x has its
    gradient added in the norm's own backward pass, which then needs no further one. Where kernels
    compute it (`covers`) the norm has autocast's dtype, if that is on: one rounding, as of stock
    LayerNorm's float32 result in the product that follows. Not differentiable twice.
    """
    backend = _choose(x, weight, bias)
    if backend == "reference":
        return reference.branch_layer_norm(x, weight, bias, eps)
    dtype = autocast_dtype(x) or x.dtype
    if torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad or bias.requires_grad):
        return _BranchLayerNorm.apply(x, weight, bias, eps, dtype, backend)
    if is_watched():
        operator = torch.ops.moat_kernels.layer_norm_evaluate
        return operator(x, weight, bias, eps, dtype, backend), x
    return BACKENDS[backend].evaluate(x, weight, bias, eps, dtype), x


class _BranchLayerNorm(torch.autograd.Function):
    """Saves x, the weight, and float32 mean and 1 / standard deviation of each row."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor,
        eps: float,
        dtype: torch.dtype,
        backend: str,
    ) -> tuple[Tensor, Tensor]:
        if is_watched():
            normalized, *saved = torch.ops.moat_kernels.layer_norm_forward(
                x, weight, bias, eps, dtype, backend
            )
        else:
            normalized, saved = BACKENDS[backend].forward(x, weight, bias, eps, dtype)
        ctx.save_for_backward(x, weight, *saved)
        ctx.bias_dtype, ctx.backend = bias.dtype, backend
        ctx.set_materialize_grads(False)
        return normalized, x.view_as(x)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(
        ctx: Any, grad: Tensor | None, grad_residual: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        if grad is None:
            return grad_residual, *(None,) * 5
        x, weight, *saved = ctx.saved_tensors
        needs_x, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        arguments = (grad, grad_residual, x, weight, saved, needs_weight or needs_bias)
        if is_watched():
            gradients = torch.ops.moat_kernels.layer_norm_backward(*arguments, ctx.backend)
        else:
            gradients = BACKENDS[ctx.backend].backward(*arguments)
        return (
            gradients[0] if needs_x else None,
            gradients[1].to(weight.dtype) if needs_weight else None,
            gradients[2].to(ctx.bias_dtype) if needs_bias else None,
            *(None,) * 3,
        )


def _evaluate_operator(
    x: Tensor, weight: Tensor, bias: Tensor, eps: float, dtype: torch.dtype, backend: str
) -> Tensor:
    return BACKENDS[backend].evaluate(x, weight, bias, eps, dtype)


def _forward_operator(
    x: Tensor, weight: Tensor, bias: Tensor, eps: float, dtype: torch.dtype, backend: str
) -> list[Tensor]:
    result = BACKENDS[backend].forward(x, weight, bias, eps, dtype)
    return [result.output, *result.saved]


def _backward_operator(
    grad: Tensor,
    grad_residual: Tensor | None,
    x: Tensor,
    weight: Tensor,
    saved: list[Tensor],
    needs_parameters: bool,
    backend: str,
) -> list[Tensor]:
    return BACKENDS[backend].backward(grad, grad_residual, x, weight, saved, needs_parameters)


_CALL = "Tensor x, Tensor weight, Tensor bias, float eps, ScalarType dtype, str backend"

define_op(f"layer_norm_evaluate({_CALL}) -> Tensor", _evaluate_operator, _evaluate_operator)
# -> [normalised, what backward needs ...]
define_op(f"layer_norm_forward({_CALL}) -> Tensor[]", _forward_operator, _forward_operator)
# -> [gradient of x, and if needed those of weight and bias in float32]
define_op(
    "layer_norm_backward(Tensor grad, Tensor? grad_residual, Tensor x, Tensor weight, "
    "Tensor[] saved, bool needs_parameters, str backend) -> Tensor[]",
    _backward_operator,
    _backward_operator,
)
