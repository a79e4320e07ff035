"""Argument checks of `window_attention`: errors name the argument, what it was, what is allowed."""

from __future__ import annotations

from torch import Tensor

from moat_kernels.ops.common.checks import FLOATING, check_tensor
from moat_kernels.ops.window_attention.algebra.position_bias import table_size
from moat_kernels.ops.window_attention.description import WindowAttentionDescription


def check_window_attention(
    qkv: Tensor, bias_table: Tensor | None, description: WindowAttentionDescription
) -> None:
    """Raise TypeError or ValueError unless `window_attention` can compute the call."""
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
