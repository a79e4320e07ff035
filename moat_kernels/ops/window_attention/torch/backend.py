"""Window attention in stock PyTorch operations, on any device, saving only qkv for backward.

Works through the batch a few windows at a time, so that the scores [windows, heads, tokens,
tokens] exist for one chunk only (SCORE_ELEMENTS bounds it); the backward pass recomputes them.
Stock autograd saves the scores, the weights and copies of q, k, v of the whole batch.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from moat_kernels.ops.window_attention.algebra.partition import padding_mask, partition, reverse
from moat_kernels.ops.window_attention.algebra.position_bias import gather_bias, scatter_bias
from moat_kernels.ops.window_attention.contract import Forward
from moat_kernels.ops.window_attention.description import WindowAttentionDescription

# Scores held at a time: 2^21 float32 are 8 MiB. More would not be faster on a CPU (they leave the
# cache), and on a GPU still fills it at MOAT's sizes (54 windows and heads of 196 tokens).
SCORE_ELEMENTS = 2**21


def unsupported(
    qkv: Tensor, bias_table: Tensor | None, description: WindowAttentionDescription
) -> str:
    """Why this backend does not cover a call; empty: it does."""
    return ""


class _Windows:
    """The map cut into windows [windows, heads, tokens, head_dim], and their bias and mask."""

    def __init__(
        self, qkv: Tensor, bias_table: Tensor | None, description: WindowAttentionDescription
    ) -> None:
        batch, height, width, _ = qkv.shape
        self.shape = (batch, height, width)
        self.description = description
        self.scale = description.scale_or_default()
        self.window = description.window_for(height, width)
        cut = partition(qkv, self.window, description.partition)
        self.tokens = cut.shape[1]
        self.query, self.key, self.value = self.split(cut, 3)
        self.bias = None if bias_table is None else gather_bias(bias_table, self.window)
        mask = padding_mask(self.shape, self.window, description.partition, like=qkv)
        self.mask = None if mask is None else mask[:, None, None, :]

    def split(self, windows: Tensor, parts: int) -> tuple[Tensor, ...]:
        """[windows, tokens, parts*heads*head_dim] -> parts, [windows, heads, tokens, head_dim]."""
        heads, head_dim = self.description.heads, self.description.head_dim
        if self.description.qkv_layout == "qkv_heads" or parts == 1:
            split = windows.unflatten(-1, (parts, heads, head_dim)).permute(2, 0, 3, 1, 4)
        else:
            split = windows.unflatten(-1, (heads, parts, head_dim)).permute(3, 0, 2, 1, 4)
        return tuple(split.unbind())

    def merge(self, parts: list[Tensor]) -> Tensor:
        """The inverse of `split`, put back into a map [B, H, W, parts*heads*head_dim]."""
        stacked = torch.stack(parts)  # [parts, windows, heads, tokens, head_dim]
        if self.description.qkv_layout == "qkv_heads":
            windows = stacked.permute(1, 3, 0, 2, 4)
        else:
            windows = stacked.permute(1, 3, 2, 0, 4)
        return reverse(windows.flatten(2), self.shape, self.window, self.description.partition)

    def chunks(self) -> Iterator[slice]:
        """Slices of the windows whose scores fit SCORE_ELEMENTS."""
        per_window = self.description.heads * self.tokens * self.tokens
        step = max(1, SCORE_ELEMENTS // per_window)
        for start in range(0, self.query.shape[0], step):
            yield slice(start, start + step)

    def weights(self, chunk: slice) -> Tensor:
        """softmax(scale * Q K^T + bias + mask) of a chunk, computed in float32 or wider."""
        scores = (self.query[chunk] * self.scale) @ self.key[chunk].transpose(-1, -2)
        if self.bias is not None:
            scores += self.bias
        if self.mask is not None:
            scores += self.mask[chunk]
        dtype = torch.float64 if scores.dtype == torch.float64 else torch.float32
        return torch.softmax(scores, -1, dtype=dtype)


def evaluate(
    qkv: Tensor, bias_table: Tensor | None, description: WindowAttentionDescription
) -> Tensor:
    """The output [B, H, W, heads*head_dim]."""
    return forward(qkv, bias_table, description).output


def forward(
    qkv: Tensor, bias_table: Tensor | None, description: WindowAttentionDescription
) -> Forward:
    """The output; nothing else is saved."""
    windows = _Windows(qkv, bias_table, description)
    output = torch.empty_like(windows.query, memory_format=torch.contiguous_format)
    for chunk in windows.chunks():
        output[chunk] = windows.weights(chunk).to(qkv.dtype) @ windows.value[chunk]
    return Forward(windows.merge([output]), [])


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
    windows = _Windows(qkv, bias_table, description)
    cut = partition(grad, windows.window, description.partition)
    (grad_output,) = windows.split(cut, 1)
    grads = [torch.empty_like(grad_output, memory_format=torch.contiguous_format) for _ in range(3)]
    grad_query, grad_key, grad_value = grads
    grad_bias: Tensor | None = None
    if needs_table and windows.bias is not None:
        dtype = torch.promote_types(windows.bias.dtype, torch.float32)
        grad_bias = torch.zeros_like(windows.bias, dtype=dtype)
    for chunk in windows.chunks():
        weights = windows.weights(chunk)
        low = weights.to(qkv.dtype)
        grad_value[chunk] = low.transpose(-1, -2) @ grad_output[chunk]
        grad_weights = (grad_output[chunk] @ windows.value[chunk].transpose(-1, -2)).to(weights)
        grad_scores = torch._softmax_backward_data(grad_weights, weights, -1, weights.dtype)
        if grad_bias is not None:
            grad_bias += grad_scores.sum(0)
        low = grad_scores.to(qkv.dtype)
        grad_query[chunk] = (low @ windows.key[chunk]) * windows.scale
        grad_key[chunk] = low.transpose(-1, -2) @ (windows.query[chunk] * windows.scale)
    grad_table = None if grad_bias is None else scatter_bias(grad_bias, windows.window)
    return windows.merge(grads), grad_table
