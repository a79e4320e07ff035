"""LayerNorm of a residual branch on a CPU, for maps in autocast's 16-bit dtype, by stock operators.

Autocast would copy such a map to float32, keep the copy, and give a result in float32 for the
product that follows to round. PyTorch's own operator reads and writes 16 bits beside float32
parameters and computes in float32, so that result is the same. Float32 maps are left to the stock
module: there is nothing to save.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moat_kernels.ops.common.autocast import autocast_dtype, without_autocast
from moat_kernels.ops.layer_norm.contract import Forward

DTYPES = (torch.bfloat16, torch.float16)


def unsupported(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> str:
    """Why this backend does not cover a call; empty if it does."""
    if x.device.type != "cpu":
        return f"tensors on {x.device}"
    if x.dtype not in DTYPES or autocast_dtype(x) != x.dtype:
        return f"{x.dtype} outside of autocast to that"
    if weight is None or bias is None:
        return "a norm without weight or bias"
    if {weight.dtype, bias.dtype} != {torch.float32}:
        return "parameters in another dtype than float32"
    if not x.numel():
        return "maps without elements"
    return ""


def evaluate(x: Tensor, weight: Tensor, bias: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
    """The output, where no backward pass will follow."""
    return forward(x, weight, bias, eps, dtype).output


@without_autocast
def forward(x: Tensor, weight: Tensor, bias: Tensor, eps: float, dtype: torch.dtype) -> Forward:
    """The output, in x's dtype, and the mean and 1 / standard deviation of each row."""
    output, *saved = torch.ops.aten.native_layer_norm(x, weight.shape, weight, bias, eps)
    return Forward(output, saved)


@without_autocast
def backward(
    grad: Tensor,
    grad_residual: Tensor | None,
    x: Tensor,
    weight: Tensor,
    saved: list[Tensor],
    needs_parameters: bool,
) -> list[Tensor]:
    """[gradient of x plus grad_residual, and if needed float32 ones of weight and bias]."""
    gradients = torch.ops.aten.native_layer_norm_backward(
        *(grad, x, weight.shape, *saved, weight, weight), [True, needs_parameters, needs_parameters]
    )
    grad_x = gradients[0]
    if grad_residual is not None:
        grad_x = grad_x.add_(grad_residual)
    return [grad_x, *gradients[1:]] if needs_parameters else [grad_x]
