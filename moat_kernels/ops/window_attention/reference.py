"""Window attention in plain PyTorch: the specification in code of `window_attention`."""

from __future__ import annotations

import torch
from torch import Tensor

from moat_kernels.ops.window_attention.algebra.partition import padding_mask, partition, reverse
from moat_kernels.ops.window_attention.algebra.position_bias import gather_bias
from moat_kernels.ops.window_attention.description import WindowAttentionDescription


def split_heads(windows: Tensor, description: WindowAttentionDescription) -> Tensor:
    """[windows, tokens, 3*heads*head_dim] -> [3, windows, heads, tokens, head_dim]."""
    heads, head_dim = description.heads, description.head_dim
    if description.qkv_layout == "qkv_heads":
        return windows.unflatten(-1, (3, heads, head_dim)).permute(2, 0, 3, 1, 4)
    return windows.unflatten(-1, (heads, 3, head_dim)).permute(3, 0, 2, 1, 4)


def window_attention(
    qkv: Tensor, bias_table: Tensor | None, description: WindowAttentionDescription
) -> Tensor:
    """[B, H, W, 3*heads*head_dim] -> [B, H, W, heads*head_dim]; softmax in float32 or wider."""
    batch, height, width, _ = qkv.shape
    window = description.window_for(height, width)
    windows = partition(qkv, window, description.partition)
    query, key, value = split_heads(windows, description)
    scores = (query * description.scale_or_default()) @ key.transpose(-1, -2)
    if bias_table is not None:
        scores = scores + gather_bias(bias_table, window).to(scores.dtype)
    mask = padding_mask((batch, height, width), window, description.partition, like=scores)
    if mask is not None:
        scores = scores + mask[:, None, None, :]
    dtype = torch.float64 if scores.dtype == torch.float64 else torch.float32
    weights = torch.softmax(scores, -1, dtype=dtype).to(scores.dtype)
    output = (weights @ value).transpose(-3, -2).flatten(-2)
    return reverse(output, (batch, height, width), window, description.partition)
