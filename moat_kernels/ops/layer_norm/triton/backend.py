"""LayerNorm of a residual branch by Triton kernels, in float32, bfloat16 and float16.

Bytes for each element of x that cross DRAM (and 8 for each row in each pass), as counted from what
stock modules launch:

                                                        bfloat16   autocast of a float32 x
    forward, stock: normalise; autocast copies                 4      8 + 6
    forward: x, normalised                                     4          6
    backward, stock: gradient copied to float32                           6
        gradient of x                                          6         12
        gradients of weight and bias                           4          8
        sum with the residual's gradient                       6         12
        all                                                   16         38
    backward: gradient, x, residual's gradient, x's            8         14
"""

from __future__ import annotations

import torch
from torch import Tensor

from moat_kernels.ops.layer_norm.contract import Forward
from moat_kernels.ops.layer_norm.triton.launch_table import (
    LARGEST_ROW,
    norm_blocks,
    rows_of_a_program,
)
from moat_kernels.ops.triton_support.launching import DTYPES, launch, tunable, unsupported_tensor
from moat_kernels.ops.triton_support.replay import replayed


def unsupported(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> str:
    """Why this backend does not cover a call; empty: it does."""
    reason = unsupported_tensor(x)
    if reason:
        return reason
    if weight is None or bias is None:
        return "a norm without weight or bias"
    if weight.device != x.device or bias.device != x.device:
        return "tensors on several devices"
    if weight.dim() != 1 or weight.shape != bias.shape or weight.shape[0] != x.shape[-1]:
        return f"a norm over {tuple(weight.shape)} of {tuple(x.shape)}"
    if x.shape[-1] > LARGEST_ROW:
        return f"rows of {x.shape[-1]} channels (at most {LARGEST_ROW})"
    if weight.dtype not in DTYPES or bias.dtype not in DTYPES:
        return f"weight and bias in {weight.dtype} and {bias.dtype}"
    return ""


def evaluate(x: Tensor, weight: Tensor, bias: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
    """[..., C] in `dtype`, contiguous."""
    return forward(x, weight, bias, eps, dtype).output


@replayed()
@tunable
def forward(x: Tensor, weight: Tensor, bias: Tensor, eps: float, dtype: torch.dtype) -> Forward:
    """[..., C] in `dtype`, contiguous; mean and 1 / standard deviation of each row, float32."""
    from moat_kernels.ops.layer_norm.triton.kernels import layer_norm_kernel

    x = x.contiguous()
    channels = x.shape[-1]
    count = x.numel() // channels
    normalized = torch.empty_like(x, dtype=dtype)
    mean, rstd = (x.new_empty(count, dtype=torch.float32) for _ in range(2))
    blocks = norm_blocks("forward", x, count, channels)
    rows, covering = blocks.tile(channels)
    weight, bias = weight.contiguous(), bias.contiguous()
    launch(
        layer_norm_kernel,
        (-(-count // rows),),
        x,
        weight,
        bias,
        normalized,
        mean,
        rstd,
        count,
        channels,
        eps,
        reads=(x, weight, bias),
        writes=(normalized, mean, rstd),
        BLOCK_ROWS=rows,
        BLOCK_CHANNELS=covering,
        num_warps=blocks.warps,
        num_stages=blocks.stages,
    )
    return Forward(normalized, [mean, rstd])


def backward(
    grad: Tensor,
    grad_residual: Tensor | None,
    x: Tensor,
    weight: Tensor,
    saved: list[Tensor],
    needs_parameters: bool,
) -> list[Tensor]:
    """[gradient of x, and if needed float32 ones of weight and bias, summed in a fixed order]."""
    grad_x, sums = partial_gradients(grad, grad_residual, x, weight, saved, needs_parameters)
    return [grad_x] if sums is None else [grad_x, *sums.sum(0)]


@replayed()
@tunable
def partial_gradients(
    grad: Tensor,
    grad_residual: Tensor | None,
    x: Tensor,
    weight: Tensor,
    saved: list[Tensor],
    needs_parameters: bool,
) -> tuple[Tensor, Tensor | None]:
    """(gradient of x, and if needed [programs, 2, C], float32: theirs of weight and bias)."""
    from moat_kernels.ops.layer_norm.triton.kernels import layer_norm_backward_kernel

    mean, rstd = saved
    grad, x, weight = grad.contiguous(), x.contiguous(), weight.contiguous()
    grad_residual = None if grad_residual is None else grad_residual.contiguous()
    channels = x.shape[-1]
    count = x.numel() // channels
    grad_x = torch.empty_like(x)
    blocks = norm_blocks("backward", x, count, channels)
    rows, covering = blocks.tile(channels)
    share = rows_of_a_program(count, rows)
    programs = -(-count // share)
    sums = x.new_empty(programs, 2, channels, dtype=torch.float32) if needs_parameters else None
    launch(
        layer_norm_backward_kernel,
        (programs,),
        grad,
        grad_residual,
        x,
        weight,
        mean,
        rstd,
        grad_x,
        sums,
        count,
        channels,
        share,
        reads=(grad, grad_residual, x, weight, mean, rstd),
        writes=(grad_x, sums),
        BLOCK_ROWS=rows,
        BLOCK_CHANNELS=covering,
        num_warps=blocks.warps,
        num_stages=blocks.stages,
    )
    return grad_x, sums
