"""The attention half in plain PyTorch: the specification in code of `attention_half`."""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor

from moat_kernels.ops.window_attention import reference as window_attention
from moat_kernels.ops.window_attention.description import WindowAttentionDescription


def attention_half(
    y: Tensor,
    tensors: Sequence[Tensor | None],
    eps: float,
    description: WindowAttentionDescription,
    scale: Tensor | None,
) -> Tensor:
    """y + scale * proj(attention(qkv(layer_norm(y)))): [B, C, H, W] -> the same.

    tensors: as api.attention_half takes them, the table of the windows' size. scale: [B] or None.
    """
    norm_weight, norm_bias, qkv_weight, qkv_bias, proj_weight, proj_bias, table = tensors
    assert qkv_weight is not None and proj_weight is not None
    rows = y.permute(0, 2, 3, 1)
    normalized = F.layer_norm(rows, rows.shape[-1:], norm_weight, norm_bias, eps)
    qkv = F.linear(normalized, qkv_weight, qkv_bias)
    attended = window_attention.window_attention(qkv, table, description)
    branch = F.linear(attended, proj_weight, proj_bias)
    if scale is not None:
        branch = branch * scale.view(-1, 1, 1, 1)
    return (rows + branch).permute(0, 3, 1, 2)
