"""The attention half of a MOAT block on NVIDIA GPUs, in few launches.

Under autocast, where the layers by themselves take 14 and 16:

    forward                             backward
    LayerNorm; casts; the bias'         gradient of the branch; sums for proj's bias; the bias'
    tiles                               tiles
    product: qkv                        products: gradients of proj's input, of its weight
    attention                           attention; sums for the table and for qkv's bias
    product: proj                       products: gradients of qkv's input, of its weight
    the drop path's draw                LayerNorm; sums for its weight and bias
    sum                                 all sums over programs

Without gradients it is the forward pass, of which nothing is kept. Windows too large for one
backward kernel of attention take 2 launches more. Gradients of float32 weights are not rounded to
16 bits.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from moat_kernels.ops.attention_half.description import Forward, Half, Layers
from moat_kernels.ops.common.autocast import autocast_dtype, without_autocast
from moat_kernels.ops.layer_norm.triton import backend as layer_norm
from moat_kernels.ops.layer_norm.triton.launch_table import norm_blocks, rows_of_a_program
from moat_kernels.ops.triton_support.launching import DTYPES, launch
from moat_kernels.ops.triton_support.products import weight_gradient
from moat_kernels.ops.triton_support.replay import replayed
from moat_kernels.ops.window_attention.description import WindowAttentionDescription
from moat_kernels.ops.window_attention.triton import backend as window_attention

# Elements of a parameter that one program casts.
BLOCK_CAST = 2048
# Of sums over programs, rows and columns that a program adds up at a time.
BLOCK_SUMS, BLOCK_SUM_COLUMNS = 64, 32


def unsupported(
    y: Tensor,
    tensors: Sequence[Tensor | None],
    table: Tensor | None,
    description: WindowAttentionDescription,
) -> str:
    """Why this backend does not cover a call; empty: it does. tensors: the six of `Layers`."""
    given = [tensor for tensor in tensors if tensor is not None]
    if len(given) < len(Layers._fields):
        return "layers without weight or bias"
    layers = Layers(*given)
    rows = y.permute(0, 2, 3, 1)
    channels, inner = y.shape[1], description.heads * description.head_dim
    reason = layer_norm.unsupported(rows, layers.norm_weight, layers.norm_bias)
    reason = reason or window_attention.unsupported(rows, table, description)
    if reason:
        return reason
    if y.numel() == 0:
        return "an empty batch"
    shapes = [(3 * inner, channels), (3 * inner,), (channels, inner), (channels,)]
    if [tuple(tensor.shape) for tensor in layers[2:]] != shapes:
        return "such an attention"
    if table is not None and (table.dim() != 3 or len(table) != description.heads):
        return f"a {tuple(table.shape)} as table"
    if table is not None and table.dtype not in DTYPES:
        return f"a table in {table.dtype}"
    if any(tensor.device != y.device for tensor in (*given, *([] if table is None else [table]))):
        return "tensors on several devices"
    dtypes = {tensor.dtype for tensor in layers[2:]}
    if len(dtypes) > 1 or (autocast_dtype(y) is None and dtypes != {y.dtype}):
        return "layers in several dtypes"
    if layers.qkv_weight.dtype not in DTYPES:
        return f"layers in {layers.qkv_weight.dtype}"
    return ""


@without_autocast
@replayed()
def forward(
    y: Tensor, layers: Layers, table: Tensor | None, kept: Tensor | None, half: Half
) -> Forward:
    """[B, C, H, W] -> the same; kept: [B], 1 or 0, or None for all."""
    rows = y.permute(0, 2, 3, 1)
    normalized, mean, rstd, low, tiles = _normalize(rows.contiguous(), layers, table, half)
    used = _in_low_precision(layers, low)
    qkv = torch.addmm(used.qkv_bias, normalized.flatten(0, 2), used.qkv_weight.t())
    qkv = qkv.view(*rows.shape[:3], -1)
    attended, (log_sum_exp,) = window_attention.forward(qkv, table, half.description, tiles)
    branch = torch.addmm(used.proj_bias, attended.flatten(0, 2), used.proj_weight.t())
    branch = branch.view(rows.shape)
    if kept is None:
        output = rows + branch
    else:
        output = torch.addcmul(rows, branch, kept.view(-1, 1, 1, 1), value=half.factor)
    saved = [normalized, mean, rstd, qkv, attended, log_sum_exp]
    return Forward(output.permute(0, 3, 1, 2), saved if low is None else [*saved, low])


def _normalize(
    x: Tensor, layers: Layers, table: Tensor | None, half: Half
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    """(x normalised, mean and 1 / standard deviation of its rows, the cast parameters, the tiles).

    The last two are None where there is nothing to cast, and where there are none.
    """
    from moat_kernels.ops.attention_half.triton.kernels import norm_and_cast_kernel

    weight, bias = layers.norm_weight.contiguous(), layers.norm_bias.contiguous()
    sources: list[Tensor | None] = [None] * 4
    sizes, low = [0] * 4, None
    if layers.qkv_weight.dtype != half.dtype:
        sources = [tensor.contiguous() for tensor in layers[2:]]
        sizes = [tensor.numel() for tensor in layers[2:]]
        low = x.new_empty(sum(map(_whole_blocks, sizes)), dtype=half.dtype)
    channels = x.shape[-1]
    count = x.numel() // channels
    normalized = torch.empty_like(x, dtype=half.dtype)
    mean, rstd = (x.new_empty(count, dtype=torch.float32) for _ in range(2))
    blocks = norm_blocks("forward", x, count, channels)
    rows, covering = blocks.tile(channels)
    norm_programs = -(-count // rows)
    cast_programs = 0 if low is None else len(low) // BLOCK_CAST
    spread = _Spread.of(table, half, x)
    launch(
        norm_and_cast_kernel,
        (norm_programs + cast_programs + spread.programs,),
        *(x, weight, bias, normalized, mean, rstd, *sources, low, spread.table, spread.tiles),
        *(count, channels, half.eps, norm_programs, cast_programs, *sizes, *spread.window),
        reads=(x, weight, bias, *sources, spread.table),
        writes=(normalized, mean, rstd, low, spread.tiles),
        **spread.blocks,
        BLOCK_ROWS=rows,
        BLOCK_CHANNELS=covering,
        BLOCK_CAST=BLOCK_CAST,
        num_warps=blocks.warps,
        num_stages=blocks.stages,
    )
    return normalized, mean, rstd, low, spread.tiles


class _Spread(NamedTuple):
    """The bias' tiles, filled by programs behind those of a kernel that does something else.

    table, tiles: None where there are none to fill. blocks: compile-time arguments.
    """

    table: Tensor | None
    tiles: Tensor | None
    window: tuple[int, int]
    programs: int
    blocks: dict[str, int]

    @staticmethod
    def of(table: Tensor | None, half: Half, x: Tensor) -> _Spread:
        """x: a map [B, H, W, C]."""
        window = half.description.window_for(*x.shape[1:3])
        tiles = window_attention.empty_tiles(table, half.dtype, window)
        if table is None or tiles is None:
            return _Spread(None, None, window, 0, {"PADDED": 0, "BLOCK_SPREAD": 0})
        block = window_attention.spread_block(tiles)
        blocks = {"PADDED": tiles.shape[1], "BLOCK_SPREAD": block}
        return _Spread(table.contiguous(), tiles, window, tiles.numel() // block, blocks)


def _whole_blocks(size: int) -> int:
    return -(-size // BLOCK_CAST) * BLOCK_CAST


def _in_low_precision(layers: Layers, low: Tensor | None) -> Layers:
    """The layers with the linear ones out of `low`, where they were cast."""
    if low is None:
        return layers
    cast, start = [], 0
    for tensor in layers[2:]:
        cast.append(low[start : start + tensor.numel()].view(tensor.shape))
        start += _whole_blocks(tensor.numel())
    return Layers(*layers[:2], *cast)


@without_autocast
@replayed()
def backward(
    grad: Tensor,
    y: Tensor,
    layers: Layers,
    table: Tensor | None,
    kept: Tensor | None,
    half: Half,
    saved: list[Tensor],
    needed: Sequence[bool],
) -> list[Tensor]:
    """Gradients of y, of the six layers' tensors and of the table: those that are needed.

    Each in its tensor's dtype, and summed in a fixed order.
    """
    normalized, mean, rstd, qkv, attended, log_sum_exp, *low = saved
    used = _in_low_precision(layers, low[0] if low else None)
    needs_table = needed[7] and table is not None
    x, grad = (t.permute(0, 2, 3, 1).contiguous() for t in (y, grad))

    grad_branch, branch_sums, tiles = _branch_gradient(grad, kept, table, half)
    flat = grad_branch.flatten(0, 2)
    grad_proj, grad_qkv = None, None
    if needed[5]:
        grad_proj = weight_gradient(flat, attended.flatten(0, 2), layers.proj_weight.dtype)
    partial = window_attention.partial_gradients(
        (flat @ used.proj_weight).view(attended.shape),
        *(qkv, table, half.description, attended, [log_sum_exp], needs_table, tiles),
    )
    flat = partial.qkv.flatten(0, 2)
    if needed[3]:
        grad_qkv = weight_gradient(flat, normalized.flatten(0, 2), layers.qkv_weight.dtype)
    grad_x, norm_sums = layer_norm.partial_gradients(
        (flat @ used.qkv_weight).view(x.shape), grad, x, layers.norm_weight, [mean, rstd], True
    )
    assert partial.sums is not None and norm_sums is not None  # they were asked for
    small = _fold(
        *(partial.sums, branch_sums, norm_sums, partial.slabs),
        *(layers, table, half.description, x.shape),
    )
    norm_weight, norm_bias, qkv_bias, proj_bias, grad_table = small
    grad_y = grad_x.permute(0, 3, 1, 2)
    norm = (norm_weight, norm_bias)
    found = (grad_y, *norm, grad_qkv, qkv_bias, grad_proj, proj_bias, grad_table)
    return [g for g, is_needed in zip(found, needed, strict=True) if is_needed and g is not None]


def _branch_gradient(
    grad: Tensor, kept: Tensor | None, table: Tensor | None, half: Half
) -> tuple[Tensor, Tensor, Tensor | None]:
    """grad * kept * factor in the products' dtype, its sums over rows, and the bias' tiles if any.

    The sums are [programs, C], float32.
    """
    from moat_kernels.ops.attention_half.triton.kernels import branch_gradient_kernel

    channels = grad.shape[-1]
    count = grad.numel() // channels
    blocks = norm_blocks("backward", grad, count, channels)
    rows, covering = blocks.tile(channels)
    share = rows_of_a_program(count, rows)
    programs = -(-count // share)
    grad_branch = torch.empty_like(grad, dtype=half.dtype)
    sums = grad.new_empty(programs, channels, dtype=torch.float32)
    spread = _Spread.of(table, half, grad)
    launch(
        branch_gradient_kernel,
        (programs + spread.programs,),
        *(grad, kept, grad_branch, sums, spread.table, spread.tiles, half.factor),
        *(count, channels, share, count // len(grad), programs, *spread.window),
        reads=(grad, kept, spread.table),
        writes=(grad_branch, sums, spread.tiles),
        **spread.blocks,
        BLOCK_ROWS=rows,
        BLOCK_CHANNELS=covering,
        num_warps=blocks.warps,
        num_stages=blocks.stages,
    )
    return grad_branch, sums, spread.tiles


def _fold(
    qkv_sums: Tensor,
    branch_sums: Tensor,
    norm_sums: Tensor,
    slabs: Tensor | None,
    layers: Layers,
    table: Tensor | None,
    description: WindowAttentionDescription,
    shape: Sequence[int],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]:
    """Gradients of the norm's weight and bias, of qkv's bias, of proj's, and of the table."""
    from moat_kernels.ops.attention_half.triton.kernels import fold_sums_kernel

    window = description.window_for(*shape[1:3])
    inner, channels, heads = qkv_sums.shape[1], shape[3], description.heads
    grad_table, table_blocks = None, 0
    splits = 0 if slabs is None else len(slabs)
    if slabs is not None and table is not None:
        grad_table = torch.empty_like(table, memory_format=torch.contiguous_format)
        table_blocks = math.prod(window_attention.fold_programs(window)) * heads
    norm_weight, norm_bias, qkv_bias, proj_bias = (
        torch.empty_like(tensor, memory_format=torch.contiguous_format)
        for tensor in (layers.norm_weight, layers.norm_bias, layers.qkv_bias, layers.proj_bias)
    )
    column_blocks = -(-inner // BLOCK_SUM_COLUMNS) + 3 * -(-channels // BLOCK_SUM_COLUMNS)
    launch(
        fold_sums_kernel,
        (column_blocks + table_blocks,),
        *(qkv_sums, branch_sums, norm_sums, slabs),
        *(qkv_bias, proj_bias, norm_weight, norm_bias, grad_table),
        *(len(qkv_sums), len(branch_sums), len(norm_sums), splits),
        *(inner, channels, heads, *window),
        reads=(qkv_sums, branch_sums, norm_sums, slabs),
        writes=(qkv_bias, proj_bias, norm_weight, norm_bias, grad_table),
        BLOCK_SUMS=BLOCK_SUMS,
        BLOCK_SUM_COLUMNS=BLOCK_SUM_COLUMNS,
        **window_attention.fold_blocks(splits),
        num_warps=4,
    )
    return norm_weight, norm_bias, qkv_bias, proj_bias, grad_table
