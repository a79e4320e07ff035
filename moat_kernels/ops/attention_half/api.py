"""The attention half of a MOAT block in one operator: whether one computes it, and the call."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from moat_kernels.ops.attention_half import cpu
from moat_kernels.ops.attention_half.triton import evaluation
from moat_kernels.ops.common.backends import choose_backend
from moat_kernels.ops.window_attention.description import WindowAttentionDescription

BACKENDS: Mapping[str, Any] = {"cpu": cpu, "triton": evaluation}


def covering(
    y: Tensor, tensors: Sequence[Tensor | None], description: WindowAttentionDescription
) -> str:
    """The backend that computes `attention_half` of this call: inference, shapes that fit.

    Empty if none does. tensors: as `attention_half` takes them.
    """
    backend = choose_backend(
        "attention_half",
        y.device,
        BACKENDS,
        lambda candidate: candidate.unsupported(y, tensors, description),
        optional=True,
    )
    return "" if backend == "reference" else backend


def attention_half(
    y: Tensor,
    tensors: Sequence[Tensor | None],
    eps: float,
    description: WindowAttentionDescription,
    backend: str,
) -> Tensor:
    """y + proj(attention(qkv(layer_norm(y)))): [B, C, H, W] -> [B, C, H, W] in channels_last.

    tensors: weight [C] and bias of the norm, weight [3 * heads * head_dim, C] and bias of qkv,
        weight [C, heads * head_dim] and bias of proj, and the position table [heads, ., .], which
        is resized to the windows. All but the two matrices may be None.
    backend: what `covering` said.
    """
    output: Tensor = BACKENDS[backend].evaluate(y, tensors, eps, description)
    return output
