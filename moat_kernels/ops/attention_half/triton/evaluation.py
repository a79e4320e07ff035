"""The attention half without gradients on NVIDIA GPUs: as in training, and nothing is kept."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from moat_kernels.ops.attention_half.description import Half, Layers
from moat_kernels.ops.attention_half.triton import backend
from moat_kernels.ops.common.autocast import autocast_dtype
from moat_kernels.ops.common.backends import is_exporting
from moat_kernels.ops.common.registration import is_watched
from moat_kernels.ops.window_attention.algebra.position_bias import resize_table
from moat_kernels.ops.window_attention.api import clamp_window
from moat_kernels.ops.window_attention.description import WindowAttentionDescription


def unsupported(
    y: Tensor, tensors: Sequence[Tensor | None], description: WindowAttentionDescription
) -> str:
    """Why this backend does not cover a call; empty: it does. tensors: as `attention_half`'s."""
    if is_exporting():
        return "an export"
    given = (tensor for tensor in (y, *tensors) if tensor is not None)
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in given):
        return "gradients"
    *layers, table = tensors
    return backend.unsupported(y, layers, table, description)


def evaluate(
    y: Tensor,
    tensors: Sequence[Tensor | None],
    eps: float,
    description: WindowAttentionDescription,
) -> Tensor:
    """See api.attention_half."""
    *layers, table = tensors
    if table is not None:
        table = resize_table(table, description.window_for(*y.shape[2:]))
    description, table = clamp_window(y.shape[2:], table, description)
    dtype = autocast_dtype(y) or y.dtype
    if is_watched():
        output, *_ = torch.ops.moat_kernels.attention_half_forward(
            y, layers, table, None, description.encode(), eps, 1.0, dtype
        )
        return output
    half = Half(description, eps, 1.0, dtype)
    return backend.forward(y, Layers(*layers), table, None, half).output  # type: ignore[arg-type]
