"""Window attention by native CPU kernels (csrc/cpu): one operator each way, saving log-sum-exps.

Windows are read from and written to the maps in place. Arithmetic is float32, whatever the dtype.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from moat_kernels.extension import load_extension
from moat_kernels.ops.common.flops import register_flops
from moat_kernels.ops.common.registration import register_fake
from moat_kernels.ops.window_attention.contract import Forward
from moat_kernels.ops.window_attention.description import WindowAttentionDescription
from moat_kernels.ops.window_attention.flops import native_backward, native_forward

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def unsupported(
    qkv: Tensor, bias_table: Tensor | None, description: WindowAttentionDescription
) -> str:
    """Why this backend does not cover a call; empty: it does."""
    if qkv.device.type != "cpu":
        return f"tensors on {qkv.device}"
    if qkv.dtype not in DTYPES:
        return f"dtype {qkv.dtype}"
    return ""


def evaluate(
    qkv: Tensor, bias_table: Tensor | None, description: WindowAttentionDescription
) -> Tensor:
    """The output [B, H, W, heads*head_dim]."""
    return forward(qkv, bias_table, description).output


def forward(
    qkv: Tensor, bias_table: Tensor | None, description: WindowAttentionDescription
) -> Forward:
    """The output and the log-sum-exp of every query, [B, heads, H, W]."""
    output, log_sum_exp = torch.ops.moat_kernels.cpu_window_attention_forward(
        _dense_channels(qkv), _as_float(bias_table), *_arguments(qkv, description)
    )
    return Forward(output, [log_sum_exp])


def backward(
    grad: Tensor,
    qkv: Tensor,
    bias_table: Tensor | None,
    description: WindowAttentionDescription,
    output: Tensor,
    saved: list[Tensor],
    needs_table: bool,
) -> tuple[Tensor, Tensor | None]:
    """Gradients of qkv and of the bias table."""
    grad_qkv, grad_table = torch.ops.moat_kernels.cpu_window_attention_backward(
        _dense_channels(grad),
        _dense_channels(qkv),
        _as_float(bias_table),
        output,
        *saved,
        *_arguments(qkv, description),
        needs_table,
    )
    if bias_table is None or not needs_table:
        return grad_qkv, None
    return grad_qkv, grad_table.view(bias_table.shape)


def _arguments(qkv: Tensor, description: WindowAttentionDescription) -> tuple[Any, ...]:
    """The description as the native ops take it."""
    return (
        description.heads,
        description.head_dim,
        *description.window_for(qkv.shape[1], qkv.shape[2]),
        description.scale_or_default(),
        description.qkv_layout == "heads_qkv",
        description.partition == "grid",
    )


def _dense_channels(x: Tensor) -> Tensor:
    """The kernels read the first three axes by their strides."""
    return x if x.stride(3) == 1 else x.contiguous()


def _as_float(table: Tensor | None) -> Tensor | None:
    return None if table is None else table.float().contiguous()


def _fake_forward(
    qkv: Tensor, bias_table: Tensor | None, heads: int, head_dim: int, *choices: Any
) -> tuple[Tensor, Tensor]:
    return (
        qkv.new_empty(*qkv.shape[:3], heads * head_dim),
        qkv.new_empty(qkv.shape[0], heads, *qkv.shape[1:3], dtype=torch.float32),
    )


def _fake_backward(
    grad: Tensor, qkv: Tensor, bias_table: Tensor | None, *rest: Any
) -> tuple[Tensor, Tensor]:
    needs_table = rest[-1]
    count = bias_table.numel() if bias_table is not None and needs_table else 0
    return qkv.new_empty(qkv.shape), qkv.new_empty(count, dtype=torch.float32)


# The shapes of the native ops' results, for torch.compile, and their FLOPs.
if load_extension().usable:
    register_fake("cpu_window_attention_forward", _fake_forward)
    register_fake("cpu_window_attention_backward", _fake_backward)
    register_flops("cpu_window_attention_forward", native_forward)
    register_flops("cpu_window_attention_backward", native_backward)
