"""The attention half of a MOAT block in training: whether kernels compute it, operators, autograd.

`api.py` has the half without gradients.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from moat_kernels.ops.attention_half.description import Half, Layers
from moat_kernels.ops.attention_half.triton import backend
from moat_kernels.ops.common.autocast import autocast_dtype
from moat_kernels.ops.common.backends import choose_backend, is_exporting
from moat_kernels.ops.common.flops import Shape, linear_flops
from moat_kernels.ops.common.registration import define_op, is_watched
from moat_kernels.ops.window_attention.api import clamp_window
from moat_kernels.ops.window_attention.description import WindowAttentionDescription
from moat_kernels.ops.window_attention.flops import attention_flops


def covers(
    y: Tensor,
    tensors: Sequence[Tensor | None],
    table: Tensor | None,
    description: WindowAttentionDescription,
) -> bool:
    """Whether `attention_half` computes this call: training on a GPU, layers that fit.

    tensors: of the norm, qkv and proj, as `Layers` has them.
    """
    if is_exporting() or not torch.is_grad_enabled():
        return False
    if not any(tensor is not None and tensor.requires_grad for tensor in (y, *tensors)):
        return False
    chosen = choose_backend(
        "attention_half",
        y.device,
        {"triton": backend},
        lambda candidate: candidate.unsupported(y, tensors, table, description),
        optional=True,
    )
    return chosen != "reference"


def attention_half(
    y: Tensor,
    layers: Layers,
    table: Tensor | None,
    eps: float,
    description: WindowAttentionDescription,
    kept: Tensor | None,
    factor: float,
) -> Tensor:
    """y + factor * kept * proj(attention(qkv(layer_norm(y)))): [B, C, H, W] -> the same.

    table: [heads, 2*wh-1, 2*ww-1], or None. kept: [B], 1 or 0 for each sample, or None for all,
    without the factor. Products are in autocast's dtype, the sum is in the wider one. Not
    differentiable twice, nor with respect to `kept`.
    """
    description, table = clamp_window(y.shape[2:], table, description)
    half = Half(description, eps, factor, autocast_dtype(y) or y.dtype)
    return _AttentionHalf.apply(y, *layers, table, kept, half)


class _AttentionHalf(torch.autograd.Function):
    """Saves y, the layers, the table and the draw, and what the backend asks for."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, *arguments: Any) -> Tensor:
        *tensors, table, kept, half = arguments
        if is_watched():
            output, *saved = torch.ops.moat_kernels.attention_half_forward(
                *(y, tensors, table, kept, half.description.encode()),
                *(half.eps, half.factor, half.dtype),
            )
        else:
            output, saved = backend.forward(y, Layers(*tensors), table, kept, half)
        ctx.save_for_backward(y, table, kept, *tensors, *saved)
        ctx.half = half
        return output

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        y, table, kept, *rest = ctx.saved_tensors
        count, half = len(Layers._fields), ctx.half
        tensors, saved = rest[:count], rest[count:]
        needed = list(ctx.needs_input_grad[: count + 2])
        if is_watched():
            found = torch.ops.moat_kernels.attention_half_backward(
                *(grad, y, tensors, table, kept, saved, half.description.encode()),
                *(half.eps, half.factor, half.dtype, needed),
            )
        else:
            found = backend.backward(grad, y, Layers(*tensors), table, kept, half, saved, needed)
        gradients = iter(found)
        return (*(next(gradients) if each else None for each in needed), None, None)


def _half(description: str, eps: float, factor: float, dtype: torch.dtype) -> Half:
    return Half(WindowAttentionDescription.decode(description), eps, factor, dtype)


def _forward_operator(
    y: Tensor,
    layers: list[Tensor],
    table: Tensor | None,
    kept: Tensor | None,
    *settings: Any,
) -> list[Tensor]:
    result = backend.forward(y, Layers(*layers), table, kept, _half(*settings))
    return [result.output, *result.saved]


def _backward_operator(
    grad: Tensor,
    y: Tensor,
    layers: list[Tensor],
    table: Tensor | None,
    kept: Tensor | None,
    saved: list[Tensor],
    *settings: Any,
) -> list[Tensor]:
    *described, needed = settings
    half = _half(*described)
    return backend.backward(grad, y, Layers(*layers), table, kept, half, saved, needed)


def _forward_flops(
    y: Shape, layers: Sequence[Shape], table: Any, kept: Any, description: str, *_: Any, **__: Any
) -> int:
    decoded = WindowAttentionDescription.decode(description)
    map_size, given = (y[0], y[2], y[3]), Layers(*layers)  # type: ignore[arg-type]
    qkv, proj = given.qkv_weight, given.proj_weight
    window = decoded.window_for(*map_size[1:])
    return (
        linear_flops((*map_size, qkv[1]), qkv)  # type: ignore[arg-type]
        + attention_flops(map_size, decoded.heads, decoded.head_dim, window)
        + linear_flops((*map_size, proj[1]), proj)  # type: ignore[arg-type]
    )


def _backward_flops(
    grad: Any, y: Shape, layers: Any, table: Any, kept: Any, saved: Any, *settings: Any, **_: Any
) -> int:
    return 2 * _forward_flops(y, layers, table, kept, settings[0])


_CALL = "Tensor y, Tensor[] layers, Tensor? table, Tensor? kept"
_SETTINGS = "str description, float eps, float factor, ScalarType dtype"

# -> [output, what backward needs ...]
define_op(
    f"attention_half_forward({_CALL}, {_SETTINGS}) -> Tensor[]",
    _forward_operator,
    _forward_operator,
    _forward_flops,
)
# -> [those of the gradients of y, of the layers and of the table that are needed]
define_op(
    f"attention_half_backward(Tensor grad, {_CALL}, Tensor[] saved, {_SETTINGS}, bool[] needed) "
    "-> Tensor[]",
    _backward_operator,
    _backward_operator,
    _backward_flops,
)
