"""Window attention with position bias by itself: ours against what PyTorch offers.

Forward and backward, gradients of q, k, v and of the bias, bfloat16. SDPA gets its bias
materialised as [1, heads, N, N] from the same table in the same step, as stock MOAT does;
FlexAttention looks the table up for each score.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.gpu.bench import Bench, Skipped, Step
from benchmarks.gpu.journal import Row
from moat_kernels import use_backend
from moat_kernels.functional import WindowAttentionDescription, window_attention
from moat_kernels.ops.window_attention.algebra.partition import partition, reverse
from moat_kernels.ops.window_attention.algebra.position_bias import (
    gather_bias,
    relative_position_index,
)
from moat_kernels.ops.window_attention.reference import split_heads

# (batch, side of the map, heads, window or None): moat_0's stages, and the first in windows.
MAPS = {
    "14x14, 12 heads": (64, 14, 12, None),
    "7x7, 24 heads": (64, 7, 24, None),
    "28x28 in 14x14, 12 heads": (16, 28, 12, 14),
}
TINY_MAPS = {"4x4, 2 heads": (2, 4, 2, None)}
HEAD_DIM = 32


def steps(bench: Bench) -> list[Step]:
    maps = TINY_MAPS if bench.rehearsal else MAPS
    return [
        Step(f"{name}: {method}", partial(measure, bench, name, method, *maps[name]), limit)
        for name in maps
        for method, limit in (
            ("moat_kernels", 30.0),
            ("SDPA, bias materialised", 30.0),
            ("SDPA by cuDNN", 30.0),
            ("FlexAttention, compiled", 90.0),
        )
    ]


def measure(
    bench: Bench, name: str, method: str, batch: int, side: int, heads: int, window: int | None
) -> list[Row]:
    """Time of forward, and of forward and backward, and the peak of the latter."""
    torch.manual_seed(0)
    side_of_window = side if window is None else window
    table = torch.randn(heads, *[2 * side_of_window - 1] * 2, device=bench.device)
    qkv = torch.randn(
        batch, side, side, 3 * heads * HEAD_DIM, device=bench.device, dtype=torch.bfloat16
    )
    cut = None if window is None else (window, window)
    description = WindowAttentionDescription(heads, HEAD_DIM, cut)
    leaves = [table.requires_grad_(), qkv.requires_grad_()]
    attend = _METHODS[method](bench, table, qkv, description)
    cotangent = torch.randn_like(attend())

    def step() -> None:
        for leaf in leaves:
            leaf.grad = None
        attend().backward(cotangent)

    with torch.no_grad():
        forward = bench.time(attend)
    return [
        {
            "map": name,
            "attention": method,
            "forward, µs": 1e6 * forward,
            "with backward, µs": 1e6 * bench.time(step),
            "in CUDA graphs, µs": 1e6 * bench.time(bench.graph(step)),
            "error of the table's gradient": _table_error(table, qkv, description, cotangent, step),
        }
    ]


def _table_error(
    table: Tensor,
    qkv: Tensor,
    description: WindowAttentionDescription,
    cotangent: Tensor,
    step: Callable[[], None],
) -> float:
    """Largest difference from the reference in float32, of the largest element."""
    step()
    assert table.grad is not None
    exact_table, exact_qkv = (leaf.detach().float().requires_grad_() for leaf in (table, qkv))
    with use_backend("reference"):
        window_attention(exact_qkv, exact_table, description).backward(cotangent.float())
    assert exact_table.grad is not None
    return float((table.grad - exact_table.grad).abs().max() / exact_table.grad.abs().max())


Attend = Callable[[], Tensor]


def _ours(
    bench: Bench, table: Tensor, qkv: Tensor, description: WindowAttentionDescription
) -> Attend:
    def attend() -> Tensor:
        with use_backend("triton"):
            return window_attention(qkv, table, description)

    return attend


def _split(qkv: Tensor, description: WindowAttentionDescription) -> Tensor:
    """[3, B * windows, heads, tokens, head_dim] of a map."""
    window = description.window_for(*qkv.shape[1:3])
    return split_heads(partition(qkv, window, description.partition), description)


def _join(output: Tensor, qkv: Tensor, description: WindowAttentionDescription) -> Tensor:
    """The inverse, of the output: [B, H, W, heads * head_dim]."""
    batch, height, width, _ = qkv.shape
    windows = output.transpose(-3, -2).flatten(-2)
    window = description.window_for(height, width)
    return reverse(windows, (batch, height, width), window, description.partition)


def _sdpa(
    bench: Bench, table: Tensor, qkv: Tensor, description: WindowAttentionDescription
) -> Attend:
    window = description.window_for(*qkv.shape[1:3])

    def attend() -> Tensor:
        query, key, value = _split(qkv, description)
        bias = gather_bias(table, window).to(query.dtype)[None]
        output = F.scaled_dot_product_attention(query, key, value, attn_mask=bias)
        return _join(output, qkv, description)

    return attend


def _cudnn(
    bench: Bench, table: Tensor, qkv: Tensor, description: WindowAttentionDescription
) -> Attend:
    if bench.rehearsal:
        raise Skipped("cuDNN is for GPUs")
    from torch.nn.attention import SDPBackend, sdpa_kernel

    plain = _sdpa(bench, table, qkv, description)

    def attend() -> Tensor:
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            return plain()

    return attend


def _flex(
    bench: Bench, table: Tensor, qkv: Tensor, description: WindowAttentionDescription
) -> Attend:
    from torch.nn.attention.flex_attention import flex_attention

    if bench.rehearsal:
        raise Skipped("FlexAttention differentiates on GPUs only")
    compiled = torch.compile(flex_attention)
    window = description.window_for(*qkv.shape[1:3])
    index = relative_position_index(window, qkv.device)

    def attend() -> Tensor:
        query, key, value = _split(qkv, description)
        flat = table.flatten(1)

        def add_bias(score: Any, batch: Any, head: Any, query_at: Any, key_at: Any) -> Any:
            return score + flat[head, index[query_at, key_at]]

        return _join(compiled(query, key, value, score_mod=add_bias), qkv, description)

    return attend


_METHODS: dict[str, Callable[..., Attend]] = {
    "moat_kernels": _ours,
    "SDPA, bias materialised": _sdpa,
    "SDPA by cuDNN": _cudnn,
    "FlexAttention, compiled": _flex,
}
