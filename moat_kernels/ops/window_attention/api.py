"""`window_attention`: the function that users and modules call, and its autograd function."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from moat_kernels.ops.common.autocast import autocast_dtype, autocast_off
from moat_kernels.ops.common.backends import choose_backend, is_exporting
from moat_kernels.ops.common.registration import is_watched
from moat_kernels.ops.common.symbols import is_certain
from moat_kernels.ops.window_attention import operators, reference
from moat_kernels.ops.window_attention.algebra.position_bias import crop_table
from moat_kernels.ops.window_attention.checks import check_window_attention
from moat_kernels.ops.window_attention.description import WindowAttentionDescription
from moat_kernels.ops.window_attention.operators import BACKENDS


def window_attention(
    qkv: Tensor, bias_table: Tensor | None, description: WindowAttentionDescription
) -> Tensor:
    """softmax(scale * Q K^T + bias) V inside windows of a map (MOAT paper, section 3.2).

    qkv: [B, H, W, 3 * heads * head_dim], packed as `description.qkv_layout` says; float64/32/16 or
        bfloat16, read by strides.
    bias_table: [heads, 2*wh-1, 2*ww-1] for windows of wh x ww, in the orientation key - query
        (flip both axes of a Swin table), or None for no bias. Resize it with `resize_table`.
    Returns [B, H, W, heads * head_dim], contiguous. The softmax is computed in float32 or wider;
    the gradient of the table is summed in a fixed order. Not differentiable twice. Raises
    ValueError or TypeError naming the argument.
    """
    check_window_attention(qkv, bias_table, description)
    dtype = autocast_dtype(qkv)
    if dtype is not None:
        qkv = qkv.to(dtype)
    description, bias_table = clamp_window(qkv.shape[1:3], bias_table, description)
    backend = choose_backend(
        "window_attention",
        qkv.device,
        BACKENDS,
        lambda candidate: candidate.unsupported(qkv, bias_table, description),
    )
    exported = is_exporting()  # to operators that exist without Python
    # The torch backend goes by chunks of windows, whose number an export may hold open.
    if backend == "reference" or (exported and backend == "torch"):
        return reference.window_attention(qkv, bias_table, description)
    if _needs_gradient(qkv, bias_table) and not exported:
        return _WindowAttention.apply(qkv, bias_table, description, backend)
    if is_watched() and not exported:
        return torch.ops.moat_kernels.window_attention_evaluate(
            qkv, bias_table, description.encode(), backend
        )
    with autocast_off(qkv):
        return BACKENDS[backend].evaluate(qkv, bias_table, description)


def _needs_gradient(qkv: Tensor, bias_table: Tensor | None) -> bool:
    table_requires_grad = bias_table is not None and bias_table.requires_grad
    return torch.is_grad_enabled() and (qkv.requires_grad or table_requires_grad)


def clamp_window(
    size: Sequence[int], bias_table: Tensor | None, description: WindowAttentionDescription
) -> tuple[WindowAttentionDescription, Tensor | None]:
    """A window beyond the map cut to the map: the same result without computing on padding.

    size: the map's height and width; where these are symbols, nothing is cut.
    """
    if description.window_size is None or description.partition == "grid":
        return description, bias_table
    sides = zip(description.window_size, size, strict=True)
    height, width = [size if is_certain(size < side) else side for side, size in sides]
    window = (height, width)
    if window == description.window_size:
        return description, bias_table
    if bias_table is not None:
        bias_table = crop_table(bias_table, window)
    return dataclasses.replace(description, window_size=window), bias_table


class _WindowAttention(torch.autograd.Function):
    """Saves qkv, the table, the output, and what the backend asks for."""

    @staticmethod
    def forward(
        ctx: Any,
        qkv: Tensor,
        bias_table: Tensor | None,
        description: WindowAttentionDescription,
        backend: str,
    ) -> Tensor:
        if is_watched():
            output, *saved = torch.ops.moat_kernels.window_attention_forward(
                qkv, bias_table, description.encode(), backend
            )
        else:
            with autocast_off(qkv):
                result = BACKENDS[backend].forward(qkv, bias_table, description)
            output, saved = result.output, result.saved
        ctx.save_for_backward(qkv, bias_table, output, *saved)
        ctx.description, ctx.backend = description, backend
        ctx.set_materialize_grads(False)
        return output

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor | None) -> tuple[Tensor | None, ...]:
        if grad is None:
            return None, None, None, None
        qkv, bias_table, output, *saved = ctx.saved_tensors
        needs_table = ctx.needs_input_grad[1]
        tensors, description = (grad, qkv, bias_table, output, saved), ctx.description
        if is_watched():
            grads = torch.ops.moat_kernels.window_attention_backward(
                *tensors, description.encode(), ctx.backend, needs_table
            )
        else:
            grads = operators.backward(*tensors, description, ctx.backend, needs_table)
        return grads[0], grads[1] if needs_table else None, None, None
