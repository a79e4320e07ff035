"""Window attention by Triton kernels, on NVIDIA (and, not tried, AMD) GPUs.

Reads windows from the packed map in place, by strides; saves the log-sum-exp of every query.
Accumulates in float32; float32 products are exact unless PyTorch's own are TF32.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from moat_kernels.ops.triton_support.launching import (
    launch,
    multiplies_as_tf32,
    tunable,
    unsupported_tensor,
)
from moat_kernels.ops.triton_support.traffic import Part
from moat_kernels.ops.window_attention.algebra.partition import window_counts
from moat_kernels.ops.window_attention.algebra.position_bias import table_size
from moat_kernels.ops.window_attention.contract import Forward
from moat_kernels.ops.window_attention.description import WindowAttentionDescription
from moat_kernels.ops.window_attention.triton.launch_table import (
    BIAS_GRADIENT_PROGRAMS,
    AttentionBlocks,
    attention_blocks,
)

HEAD_DIMS = (16, 32, 64)


def unsupported(
    qkv: Tensor, bias_table: Tensor | None, description: WindowAttentionDescription
) -> str:
    """Why this backend does not cover a call; empty: it does."""
    if description.head_dim not in HEAD_DIMS:
        return f"head_dim {description.head_dim}"
    return unsupported_tensor(qkv)


class _Call:
    """What the kernels of one call have in common."""

    def __init__(
        self, qkv: Tensor, bias_table: Tensor | None, description: WindowAttentionDescription
    ) -> None:
        batch, height, width, _ = qkv.shape
        heads, head_dim = description.heads, description.head_dim
        self.qkv = qkv if qkv.stride(3) == 1 else qkv.contiguous()
        # Kernels without a table take any pointer in its place.
        self.table = self.qkv if bias_table is None else bias_table.contiguous()
        self.batch, self.heads, self.head_dim = batch, heads, head_dim
        self.map = (height, width)
        self.window = description.window_for(height, width)
        self.tokens = self.window[0] * self.window[1]
        rows, columns = window_counts(height, width, self.window)
        self.windows = batch * rows * columns
        self.parts_first = description.qkv_layout == "qkv_heads"
        # Strides of (q, k, v) and of heads.
        packed = (heads * head_dim, head_dim) if self.parts_first else (head_dim, 3 * head_dim)
        self.geometry = (
            *self.qkv.stride()[:3],
            *packed,
            description.scale_or_default(),
            heads,
            height,
            width,
            *self.window,
        )
        self.constants = {
            "GRID": description.partition == "grid",
            "HEAD_DIM": head_dim,
            "PRECISION": "tf32" if multiplies_as_tf32() else "ieee",
        }
        self.has_table = bias_table is not None

    def configure(self, kernel: str) -> tuple[AttentionBlocks, dict[str, Any]]:
        """A kernel's launch, and the same as its options."""
        chosen = attention_blocks(
            *(kernel, self.qkv, self.windows, self.tokens, self.heads, self.head_dim)
        )
        return chosen, {
            **self.constants,
            "BLOCK_QUERIES": chosen.queries,
            "BLOCK_KEYS": chosen.keys,
            "num_warps": chosen.warps,
            "num_stages": chosen.stages,
        }

    def blocks(self, size: int) -> int:
        """Blocks of `size` tokens in a window."""
        return -(-self.tokens // size)

    def product_flops(self, products: int) -> int:
        """Of so many products of two matrices for each window, [tokens, head_dim, tokens]."""
        pairs = self.windows * self.heads * self.tokens**2
        return 2 * products * pairs * self.head_dim

    def part(self, packed: Tensor, index: int) -> Tensor:
        """q, k or v (index 0, 1 or 2) of every head in a map packed as qkv is."""
        shape = (3, self.heads) if self.parts_first else (self.heads, 3)
        return packed.unflatten(3, (*shape, self.head_dim)).select(
            3 if self.parts_first else 4, index
        )

    def statistic(self) -> Tensor:
        """An empty float32 per query, [B, heads, H, W]."""
        return self.qkv.new_empty(self.batch, self.heads, *self.map, dtype=torch.float32)


def evaluate(
    qkv: Tensor, bias_table: Tensor | None, description: WindowAttentionDescription
) -> Tensor:
    """The output [B, H, W, heads*head_dim]."""
    return forward(qkv, bias_table, description).output


@tunable
def forward(
    qkv: Tensor, bias_table: Tensor | None, description: WindowAttentionDescription
) -> Forward:
    """The output and the log2-sum-exp of every query, [B, heads, H, W]."""
    from moat_kernels.ops.window_attention.triton.kernels.forward import forward_kernel

    call = _Call(qkv, bias_table, description)
    output = qkv.new_empty(*qkv.shape[:3], description.heads * description.head_dim)
    log_sum_exp = call.statistic()
    chosen, options = call.configure("forward")
    launch(
        forward_kernel,
        (call.blocks(chosen.queries) * call.windows, call.heads),
        call.qkv,
        call.table,
        output,
        log_sum_exp,
        *call.geometry,
        reads=(call.qkv, call.table),
        writes=(output, log_sum_exp),
        flops=call.product_flops(2),
        HAS_TABLE=call.has_table,
        **options,
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
    call = _Call(qkv, bias_table, description)
    grad = grad.contiguous()
    (log_sum_exp,) = saved
    grad_qkv = qkv.new_empty(qkv.shape)
    _, delta = _query_gradient(call, grad, output, log_sum_exp, grad_qkv)
    _key_value_gradient(call, grad, log_sum_exp, delta, grad_qkv)
    if bias_table is None or not needs_table:
        return grad_qkv, None
    return grad_qkv, _table_gradient(call, grad, log_sum_exp, delta)


@tunable
def _query_gradient(
    call: _Call, grad: Tensor, output: Tensor, log_sum_exp: Tensor, grad_qkv: Tensor
) -> tuple[Tensor, Tensor]:
    """(gradient of the queries, written into grad_qkv, and delta of every query)."""
    from moat_kernels.ops.window_attention.triton.kernels import backward as kernels

    delta = call.statistic()
    chosen, options = call.configure("query")
    launch(
        kernels.query_gradient_kernel,
        (call.blocks(chosen.queries) * call.windows, call.heads),
        grad,
        output,
        log_sum_exp,
        call.qkv,
        call.table,
        grad_qkv,
        delta,
        *call.geometry,
        reads=(grad, output, log_sum_exp, call.qkv, call.table),
        writes=(Part(grad_qkv, 1, 3), delta),
        flops=call.product_flops(3),
        HAS_TABLE=call.has_table,
        **options,
    )
    return call.part(grad_qkv, 0), delta


@tunable
def _key_value_gradient(
    call: _Call, grad: Tensor, log_sum_exp: Tensor, delta: Tensor, grad_qkv: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradients of keys and values, written into grad_qkv."""
    from moat_kernels.ops.window_attention.triton.kernels import backward as kernels

    chosen, options = call.configure("key_value")
    launch(
        kernels.key_value_gradient_kernel,
        (call.blocks(chosen.keys) * call.windows, call.heads),
        grad,
        log_sum_exp,
        delta,
        call.qkv,
        call.table,
        grad_qkv,
        *call.geometry,
        reads=(grad, log_sum_exp, delta, call.qkv, call.table),
        writes=(Part(grad_qkv, 2, 3),),
        flops=call.product_flops(4),
        HAS_TABLE=call.has_table,
        **options,
    )
    return call.part(grad_qkv, 1), call.part(grad_qkv, 2)


@tunable
def _table_gradient(call: _Call, grad: Tensor, log_sum_exp: Tensor, delta: Tensor) -> Tensor:
    """[heads, 2*wh-1, 2*ww-1], float32, summed in a fixed order."""
    from moat_kernels.ops.window_attention.triton.kernels import backward as kernels

    chosen, options = call.configure("bias")
    tiles = call.blocks(chosen.queries) * call.blocks(chosen.keys)
    splits = max(1, min(call.windows, BIAS_GRADIENT_PROGRAMS // (tiles * call.heads)))
    slabs = delta.new_empty(splits, call.heads, call.tokens, call.tokens)
    launch(
        kernels.bias_gradient_kernel,
        (tiles, call.heads, splits),
        grad,
        log_sum_exp,
        delta,
        call.qkv,
        call.table,
        slabs,
        *call.geometry,
        call.batch,
        reads=(grad, log_sum_exp, delta, call.qkv, call.table),
        writes=(slabs,),
        flops=call.product_flops(2),
        **options,
    )
    rows, columns = table_size(call.window)
    grad_table = delta.new_empty(call.heads, rows, columns)
    launch(
        kernels.fold_table_kernel,
        (rows, -(-columns // 32), call.heads),
        slabs,
        grad_table,
        splits,
        call.heads,
        *call.window,
        reads=(slabs,),
        writes=(grad_table,),
        BLOCK_COLUMNS=16,
        BLOCK_OFFSETS=32,
        num_warps=4,
    )
    return grad_table
