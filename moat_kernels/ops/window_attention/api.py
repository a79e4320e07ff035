"""`window_attention`: argument checks, choice of the backend, operator schema and autograd."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor

from moat_kernels.ops.common.autocast import autocast_dtype, without_autocast
from moat_kernels.ops.common.backends import choose_backend, is_exporting
from moat_kernels.ops.common.checks import FLOATING, check_tensor
from moat_kernels.ops.common.registration import define_op, is_watched
from moat_kernels.ops.window_attention import reference
from moat_kernels.ops.window_attention.algebra.position_bias import crop_table, table_size
from moat_kernels.ops.window_attention.cpu import backend as cpu_backend
from moat_kernels.ops.window_attention.description import WindowAttentionDescription
from moat_kernels.ops.window_attention.torch import backend as torch_backend
from moat_kernels.ops.window_attention.triton import backend as triton_backend

IMPLEMENTATIONS = {"torch": torch_backend, "cpu": cpu_backend, "triton": triton_backend}


def window_attention(
    qkv: Tensor, bias_table: Tensor | None, description: WindowAttentionDescription
) -> Tensor:
    """softmax(scale * Q K^T + bias) V inside windows of a map (MOAT paper, section 3.2).

    qkv: [B, H, W, 3 * heads * head_dim], packed as `description.qkv_layout` says; float64/32/16 or
        bfloat16, read by strides.
    bias_table: [heads, 2*wh-1, 2*ww-1] for windows of wh x ww, in the orientation key - query
        (flip both axes of a Swin table), or None for no bias. Resize it with `resize_table`.
    Returns [B, H, W, heads * head_dim], contiguous. The softmax is computed in float32 or wider;
    the gradient of the table is summed in a fixed order. Not differentiable twice.
    """
    _check(qkv, bias_table, description)
    dtype = autocast_dtype(qkv)
    if dtype is not None:
        qkv = qkv.to(dtype)
    description, bias_table = _clamp_window(qkv, bias_table, description)
    backend = choose_backend(
        "window_attention",
        qkv.device,
        IMPLEMENTATIONS,
        lambda implementation: implementation.unsupported(qkv, bias_table, description),
    )
    if backend == "reference":
        return reference.window_attention(qkv, bias_table, description)
    choices = (description.encode(), backend)
    if is_exporting():  # to operators that exist without Python
        return _forward_op(qkv, bias_table, *choices)[0]
    if _needs_gradient(qkv, bias_table):
        output, *_ = _WindowAttention.apply(qkv, bias_table, *choices)
    else:
        output, *_ = _forward(qkv, bias_table, *choices)
    return output


def _needs_gradient(qkv: Tensor, bias_table: Tensor | None) -> bool:
    table_requires_grad = bias_table is not None and bias_table.requires_grad
    return torch.is_grad_enabled() and (qkv.requires_grad or table_requires_grad)


def _check(qkv: Tensor, bias_table: Tensor | None, description: WindowAttentionDescription) -> None:
    if not isinstance(description, WindowAttentionDescription):
        raise TypeError(
            f"description must be a WindowAttentionDescription, got {type(description).__name__}"
        )
    check_tensor("qkv", qkv, "[B, H, W, 3*heads*head_dim]")
    channels = 3 * description.heads * description.head_dim
    if qkv.shape[3] != channels or qkv.shape[1] < 1 or qkv.shape[2] < 1:
        raise ValueError(
            f"qkv must be [B, H, W, {channels}] with H, W >= 1 for {description.heads} heads of "
            f"{description.head_dim}, got {tuple(qkv.shape)}"
        )
    if bias_table is None:
        return
    window = description.window_for(qkv.shape[1], qkv.shape[2])
    shape = (description.heads, *table_size(window))
    if not isinstance(bias_table, Tensor) or tuple(bias_table.shape) != shape:
        found = tuple(bias_table.shape) if isinstance(bias_table, Tensor) else bias_table
        raise ValueError(
            f"bias_table must be {shape} for windows of {window[0]} x {window[1]}, got {found}; "
            "resize_table makes a table of another size fit"
        )
    if bias_table.dtype not in FLOATING:
        raise TypeError(f"bias_table must be floating point, got {bias_table.dtype}")
    if bias_table.device != qkv.device:
        raise ValueError(f"bias_table is on {bias_table.device} but qkv is on {qkv.device}")


def _clamp_window(
    qkv: Tensor, bias_table: Tensor | None, description: WindowAttentionDescription
) -> tuple[WindowAttentionDescription, Tensor | None]:
    """A window beyond the map cut to the map: the same result without computing on padding."""
    if description.window_size is None or description.partition == "grid":
        return description, bias_table
    window = (
        min(description.window_size[0], qkv.shape[1]),
        min(description.window_size[1], qkv.shape[2]),
    )
    if window == description.window_size:
        return description, bias_table
    if bias_table is not None:
        bias_table = crop_table(bias_table, window)
    return dataclasses.replace(description, window_size=window), bias_table


def _forward(
    qkv: Tensor, bias_table: Tensor | None, description: str, backend: str
) -> list[Tensor]:
    """[output, what backward needs ...]"""
    if is_watched():
        return torch.ops.moat_kernels.window_attention_forward(
            qkv, bias_table, description, backend
        )
    return _forward_op(qkv, bias_table, description, backend)


class _WindowAttention(torch.autograd.Function):
    """Saves qkv, the table, the output, and what the backend asks for; one operator each way."""

    @staticmethod
    def forward(
        ctx: Any, qkv: Tensor, bias_table: Tensor | None, description: str, backend: str
    ) -> tuple[Tensor, ...]:
        output, *saved = _forward(qkv, bias_table, description, backend)
        ctx.save_for_backward(qkv, bias_table, output, *saved)
        ctx.choices = (description, backend)
        ctx.mark_non_differentiable(*saved)
        ctx.set_materialize_grads(False)
        return (output, *saved)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
        if grad is None:
            return None, None, None, None
        qkv, bias_table, output, *saved = ctx.saved_tensors
        needs_table = ctx.needs_input_grad[1]
        arguments = (grad, qkv, bias_table, output, saved, *ctx.choices, needs_table)
        if is_watched():
            grads = torch.ops.moat_kernels.window_attention_backward(*arguments)
        else:
            grads = _backward_op(*arguments)
        return grads[0], grads[1] if needs_table else None, None, None


@without_autocast
def _forward_op(
    qkv: Tensor, bias_table: Tensor | None, description: str, backend: str
) -> list[Tensor]:
    output, saved = IMPLEMENTATIONS[backend].forward(
        qkv, bias_table, WindowAttentionDescription.decode(description)
    )
    return [output, *saved]


@without_autocast
def _backward_op(
    grad: Tensor,
    qkv: Tensor,
    bias_table: Tensor | None,
    output: Tensor,
    saved: list[Tensor],
    description: str,
    backend: str,
    needs_table: bool,
) -> list[Tensor]:
    grad_qkv, grad_table = IMPLEMENTATIONS[backend].backward(
        grad,
        qkv,
        bias_table,
        WindowAttentionDescription.decode(description),
        output,
        saved,
        needs_table,
    )
    if grad_table is None or bias_table is None:
        return [grad_qkv]
    return [grad_qkv, grad_table.to(bias_table.dtype)]


# -> [output, what backward needs ...]
define_op(
    "window_attention_forward(Tensor qkv, Tensor? bias_table, str description, str backend)"
    " -> Tensor[]",
    _forward_op,
    _forward_op,
)
# -> [gradient of qkv, gradient of the table if needed]
define_op(
    "window_attention_backward(Tensor grad, Tensor qkv, Tensor? bias_table, Tensor output, "
    "Tensor[] saved, str description, str backend, bool needs_table) -> Tensor[]",
    _backward_op,
    _backward_op,
)
