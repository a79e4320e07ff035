"""The attention half of a MOAT block in one operator: whether one computes it, and the call."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from moat_kernels.ops.attention_half import cpu
from moat_kernels.ops.common.backends import choose_backend
from moat_kernels.ops.window_attention.description import WindowAttentionDescription


def covers(
    y: Tensor, tensors: Sequence[Tensor | None], description: WindowAttentionDescription
) -> bool:
    """Whether `attention_half` computes this call: inference on a CPU, shapes that fit.

    tensors: as `attention_half` takes them.
    """
    backend = choose_backend(
        "attention_half",
        y.device,
        {"cpu": cpu},
        lambda candidate: candidate.unsupported(y, tensors, description),
        optional=True,
    )
    return backend != "reference"


def attention_half(
    y: Tensor,
    tensors: Sequence[Tensor | None],
    eps: float,
    description: WindowAttentionDescription,
) -> Tensor:
    """y + proj(attention(qkv(layer_norm(y)))): [B, C, H, W] -> [B, C, H, W] in channels_last.

    tensors: weight [C] and bias of the norm, weight [3 * heads * head_dim, C] and bias of qkv,
        weight [C, heads * head_dim] and bias of proj, and the position table [heads, ., .], which
        is resized to the windows. All but the two matrices may be None.
    """
    return cpu.evaluate(y, tensors, eps, description)
