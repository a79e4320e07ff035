"""Inputs of `functional.window_attention`, and what a backend makes of them."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

from moat_kernels import FallbackWarning, use_backend
from moat_kernels.functional import WindowAttentionDescription, window_attention


def make_inputs(
    description: WindowAttentionDescription,
    shape: tuple[int, int, int],
    bias: bool = True,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
) -> tuple[Tensor, Tensor | None]:
    """(qkv, table) for a map (B, H, W)."""
    qkv = torch.randn(*shape, 3 * description.heads * description.head_dim).to(device, dtype)
    if not bias:
        return qkv, None
    height, width = description.window_for(*shape[1:])
    table = torch.randn(description.heads, 2 * height - 1, 2 * width - 1)
    return qkv, table.to(device, dtype)


def run(
    backend: str,
    qkv: Tensor,
    table: Tensor | None,
    description: WindowAttentionDescription,
    dtype: torch.dtype = torch.float32,
) -> dict[str, Tensor]:
    """Output and gradients by a backend, for copies of the arguments in `dtype`."""
    qkv = qkv.detach().to(dtype, copy=True).requires_grad_()
    table = None if table is None else table.detach().to(dtype, copy=True).requires_grad_()
    with use_backend(backend), warnings.catch_warnings():
        warnings.simplefilter("error", FallbackWarning)
        output = window_attention(qkv, table, description)
        generator = torch.Generator().manual_seed(1)
        cotangent = torch.randn(output.shape, generator=generator)
        output.backward(cotangent.to(output.device, dtype))
    assert output.dtype == dtype
    assert output.is_contiguous()
    results = {"output": output.detach(), "qkv": qkv.grad}
    return results if table is None else results | {"table": table.grad}
