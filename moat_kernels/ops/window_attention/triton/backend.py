"""Window attention by Triton kernels, on NVIDIA (and, not tried, AMD) GPUs.

Reads windows from the packed map in place, by strides; saves the log-sum-exp of every query.
Accumulates in float32; float32 products are exact unless PyTorch's own are TF32.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from moat_kernels.ops.triton_support.launching import (
    launch,
    multiplies_as_tf32,
    tunable,
    unsupported_tensor,
)
from moat_kernels.ops.triton_support.replay import replayed
from moat_kernels.ops.triton_support.traffic import Part
from moat_kernels.ops.window_attention.algebra.partition import window_counts
from moat_kernels.ops.window_attention.algebra.position_bias import table_size
from moat_kernels.ops.window_attention.contract import Forward
from moat_kernels.ops.window_attention.description import WindowAttentionDescription
from moat_kernels.ops.window_attention.triton.launch_table import (
    BIAS_GRADIENT_PROGRAMS,
    GRADIENT_PROGRAMS,
    GROUP_PROGRAMS,
    LARGEST_SPREAD,
    AttentionBlocks,
    attention_blocks,
    in_one,
    is_held,
    next_power_of_2,
    padded_tokens,
    window_splits,
)

HEAD_DIMS = (16, 32, 64)

# Of slabs at most, of a window's columns and of the table's: so many are read at a time by the
# kernel that folds slabs into the table's gradient.
FOLD_SPLITS, FOLD_COLUMNS, FOLD_OFFSETS = 8, 16, 32


def unsupported(
    qkv: Tensor, bias_table: Tensor | None, description: WindowAttentionDescription
) -> str:
    """Why this backend does not cover a call; empty: it does."""
    if description.head_dim not in HEAD_DIMS:
        return f"head_dim {description.head_dim}"
    return unsupported_tensor(qkv)


def empty_tiles(table: Tensor | None, dtype: torch.dtype, window: tuple[int, int]) -> Tensor | None:
    """Memory for the bias of every pair of tokens, see kernels/position_bias.py.

    None where there is no bias, or it is looked up in the table: the tiles of large windows would
    be many. dtype: of qkv.
    """
    tokens = window[0] * window[1]
    if table is None or tokens > LARGEST_SPREAD:
        return None
    padded = padded_tokens(tokens)
    # float16 has three bits more than the weights will be rounded to, and half the bytes.
    kept = torch.float16 if dtype == torch.bfloat16 else torch.float32
    return table.new_empty(len(table), padded, padded, dtype=kept)


def spread_block(tiles: Tensor) -> int:
    """Elements of the bias that a program spreads out: a power of 2 that divides 16 rows of a tile.

    With more of them each takes fewer instructions.
    """
    rows = 16 * tiles.shape[2]
    return min(8192 // tiles.element_size(), rows & -rows)


def fold_blocks(splits: int) -> dict[str, int]:
    """The blocks of a kernel that folds `splits` slabs into the table's gradient."""
    return {
        "BLOCK_SPLITS": min(FOLD_SPLITS, next_power_of_2(max(1, splits))),
        "BLOCK_COLUMNS": FOLD_COLUMNS,
        "BLOCK_OFFSETS": FOLD_OFFSETS,
    }


def fold_programs(window: tuple[int, int]) -> tuple[int, int]:
    """Programs that fold a head's slabs: rows of the table by blocks of its columns."""
    rows, columns = table_size(window)
    return rows, -(-columns // FOLD_OFFSETS)


def _spread(table: Tensor, tiles: Tensor, window: tuple[int, int]) -> None:
    from moat_kernels.ops.window_attention.triton.kernels.position_bias import spread_bias_kernel

    block = spread_block(tiles)
    launch(
        spread_bias_kernel,
        (tiles.numel() // block,),
        *(table, tiles, *window),
        reads=(table,),
        writes=(tiles,),
        PADDED=tiles.shape[1],
        BLOCK=block,
        num_warps=4,
    )


class _Call:
    """What the kernels of one call have in common. tiles: of the table, if they are filled."""

    def __init__(
        self,
        qkv: Tensor,
        bias_table: Tensor | None,
        description: WindowAttentionDescription,
        tiles: Tensor | None = None,
    ) -> None:
        batch, height, width, _ = qkv.shape
        heads, head_dim = description.heads, description.head_dim
        self.qkv = qkv if qkv.stride(3) == 1 else qkv.contiguous()
        self.batch, self.heads, self.head_dim = batch, heads, head_dim
        self.map = (height, width)
        self.window = description.window_for(height, width)
        self.tokens = self.window[0] * self.window[1]
        self.padded = padded_tokens(self.tokens)
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
        ends = ((height - 1) * self.qkv.stride(1) + width * self.qkv.stride(2), height * width)
        longest = max(ends[0], ends[1] * 3 * heads * head_dim)
        self.constants: dict[str, Any] = {
            "GRID": description.partition == "grid",
            "RAGGED": height % self.window[0] != 0 or width % self.window[1] != 0,
            "LONG": longest >= 2**31,
            "PADDED": self.padded,
            "HEAD_DIM": head_dim,
            "PRECISION": "tf32" if multiplies_as_tf32() else "ieee",
        }
        self.has_table = bias_table is not None
        self.bias, self.constants["BIAS"] = self._bias(bias_table, tiles)

    def _bias(self, table: Tensor | None, tiles: Tensor | None) -> tuple[Tensor, str]:
        """What kernels add to scores, and what it is."""
        if table is None:
            return self.qkv, ""  # any pointer
        if tiles is None:
            tiles = empty_tiles(table, self.qkv.dtype, self.window)
            if tiles is None:
                return table.contiguous(), "table"
            _spread(table.contiguous(), tiles, self.window)
        return tiles, "tiles"

    def configure(self, kernel: str) -> tuple[AttentionBlocks, dict[str, Any]]:
        """A kernel's launch, and the same as its options."""
        chosen = attention_blocks(
            *(kernel, self.qkv, self.windows, self.tokens, self.heads, self.head_dim)
        )
        # A tile has no more rows and columns than there are of the bias.
        chosen = replace(
            chosen, queries=min(chosen.queries, self.padded), keys=min(chosen.keys, self.padded)
        )
        return chosen, {
            **self.constants,
            "BLOCK_QUERIES": chosen.queries,
            "BLOCK_KEYS": chosen.keys,
            "num_warps": chosen.warps,
            "num_stages": chosen.stages,
        }

    def walk(self, block: int) -> dict[str, Any]:
        """Options of a kernel that walks over a window's tokens, a block at a time."""
        rest = self.tokens % block
        held = is_held(self.qkv, self.tokens, block)
        return {"REST": rest and max(16, next_power_of_2(rest)), "HELD": held}

    def blocks(self, size: int) -> int:
        """Blocks of `size` tokens in a window."""
        return -(-self.tokens // size)

    def groups(self, size: int) -> int:
        """Over how many programs a window's blocks of `size` tokens go: enough for any GPU."""
        return min(self.blocks(size), -(-GROUP_PROGRAMS // max(1, self.windows * self.heads)))

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

    def slabs(self, splits: int) -> Tensor:
        """Empty ones, see `PartialGradients`."""
        shape = (splits, self.heads, self.padded, self.padded)
        whole = self.qkv.new_empty(shape, dtype=torch.float32)
        return whole[:, :, : self.tokens, : self.tokens]

    def statistic(self) -> Tensor:
        """An empty float32 per query, [B, heads, H, W]."""
        return self.qkv.new_empty(self.batch, self.heads, *self.map, dtype=torch.float32)


def evaluate(
    qkv: Tensor, bias_table: Tensor | None, description: WindowAttentionDescription
) -> Tensor:
    """The output [B, H, W, heads*head_dim]."""
    return forward(qkv, bias_table, description).output


@replayed()
@tunable
def forward(
    qkv: Tensor,
    bias_table: Tensor | None,
    description: WindowAttentionDescription,
    tiles: Tensor | None = None,
) -> Forward:
    """The output and the log2-sum-exp of every query, [B, heads, H, W].

    tiles: `empty_tiles`, if somebody else spread the table there.
    """
    from moat_kernels.ops.window_attention.triton.kernels.forward import forward_kernel

    call = _Call(qkv, bias_table, description, tiles)
    output = qkv.new_empty(*qkv.shape[:3], description.heads * description.head_dim)
    log_sum_exp = call.statistic()
    chosen, options = call.configure("forward")
    launch(
        forward_kernel,
        (call.windows, call.heads, call.groups(chosen.queries)),
        call.qkv,
        call.bias,
        output,
        log_sum_exp,
        *call.geometry,
        reads=(call.qkv, call.bias),
        writes=(output, log_sum_exp),
        flops=call.product_flops(2),
        **call.walk(chosen.keys),
        **options,
    )
    return Forward(output, [log_sum_exp])


@replayed()
def backward(
    grad: Tensor,
    qkv: Tensor,
    bias_table: Tensor | None,
    description: WindowAttentionDescription,
    output: Tensor,
    saved: list[Tensor],
    needs_table: bool,
) -> tuple[Tensor, Tensor | None]:
    """Gradients of qkv and, in its dtype, of the bias table."""
    call = _Call(qkv, bias_table, description)
    partial = _partial_gradients(call, grad, output, saved, needs_table, needs_sums=False)
    if bias_table is None or partial.slabs is None:
        return partial.qkv, None
    return partial.qkv, _fold_table(call, partial.slabs, bias_table.dtype)


@dataclass(frozen=True)
class Summands:
    """What a sum is of, along the first axis: how many there are depends on the launch."""

    parts: Tensor

    def whole(self) -> Tensor:
        """What tuning compares."""
        return self.parts.sum(0)


class PartialGradients(NamedTuple):
    """The gradient of qkv, and what the other gradients are sums of, along the first axis.

    slabs: [splits, heads, tokens, tokens], float32, of the scores, query by key, in memory
        [splits, heads, padded, padded] (`padded_tokens`); None: not needed.
    sums: [splits, 3 * heads * head_dim], float32, of qkv's gradient over all tokens; None likewise.
    """

    qkv: Tensor
    slabs: Tensor | None
    sums: Tensor | None


def partial_gradients(
    grad: Tensor,
    qkv: Tensor,
    bias_table: Tensor | None,
    description: WindowAttentionDescription,
    output: Tensor,
    saved: list[Tensor],
    needs_table: bool,
    tiles: Tensor | None = None,
) -> PartialGradients:
    """`backward`, for who adds the slabs up in a kernel of its own, and qkv's sums with them.

    tiles: as of `forward`.
    """
    call = _Call(qkv, bias_table, description, tiles)
    return _partial_gradients(call, grad, output, saved, needs_table, needs_sums=True)


def _partial_gradients(
    call: _Call,
    grad: Tensor,
    output: Tensor,
    saved: list[Tensor],
    needs_table: bool,
    needs_sums: bool,
) -> PartialGradients:
    grad = grad.contiguous()
    (log_sum_exp,) = saved
    needs_table = needs_table and call.has_table
    if in_one(call.qkv, call.tokens):
        return _gradient(call, grad, output, log_sum_exp, needs_table, needs_sums)
    grad_qkv = call.qkv.new_empty(call.qkv.shape)
    _, delta, sums = _query_gradient(call, grad, output, log_sum_exp, grad_qkv, needs_sums)
    _key_value_gradient(call, grad, log_sum_exp, delta, grad_qkv)
    slabs = _score_sums(call, grad, log_sum_exp, delta).parts if needs_table else None
    return PartialGradients(grad_qkv, slabs, None if sums is None else sums.parts)


@tunable
def _gradient(
    call: _Call,
    grad: Tensor,
    output: Tensor,
    log_sum_exp: Tensor,
    needs_table: bool,
    needs_sums: bool,
) -> PartialGradients:
    """All of it in one kernel."""
    from moat_kernels.ops.window_attention.triton.kernels.gradient import gradient_kernel

    _, options = call.configure("gradient")
    options["BLOCK_QUERIES"] = call.padded  # the whole window
    splits = call.windows
    if needs_table or needs_sums:
        splits = window_splits(call.windows, call.heads, GRADIENT_PROGRAMS)
    grad_qkv = call.qkv.new_empty(call.qkv.shape)
    slabs = sums = None
    if needs_table:
        slabs = call.slabs(splits)
    if needs_sums:
        sums = log_sum_exp.new_empty(splits, call.qkv.shape[3])
    launch(
        gradient_kernel,
        (splits, call.heads),
        grad,
        output,
        log_sum_exp,
        call.qkv,
        call.bias,
        grad_qkv,
        slabs,
        sums,
        *call.geometry,
        call.batch,
        reads=(grad, output, log_sum_exp, call.qkv, call.bias),
        writes=(grad_qkv, slabs, sums),
        flops=call.product_flops(5),
        enable_fp_fusion=False,
        **options,
    )
    return PartialGradients(grad_qkv, slabs, sums)


@tunable
def _query_gradient(
    call: _Call,
    grad: Tensor,
    output: Tensor,
    log_sum_exp: Tensor,
    grad_qkv: Tensor,
    needs_sums: bool,
) -> tuple[Tensor, Tensor, Summands | None]:
    """(gradient of the queries, written into grad_qkv, delta of every query, qkv's sums)."""
    from moat_kernels.ops.window_attention.triton.kernels import backward as kernels

    delta = call.statistic()
    chosen, options = call.configure("query")
    programs = call.blocks(chosen.queries) * call.windows
    sums = delta.new_empty(programs, call.qkv.shape[3]) if needs_sums else None
    launch(
        kernels.query_gradient_kernel,
        (programs, call.heads),
        grad,
        output,
        log_sum_exp,
        call.qkv,
        call.bias,
        grad_qkv,
        delta,
        sums,
        *call.geometry,
        reads=(grad, output, log_sum_exp, call.qkv, call.bias),
        writes=(Part(grad_qkv, 1, 3), delta, sums),
        flops=call.product_flops(3),
        **call.walk(chosen.keys),
        **options,
    )
    return call.part(grad_qkv, 0), delta, None if sums is None else Summands(sums)


@tunable
def _key_value_gradient(
    call: _Call, grad: Tensor, log_sum_exp: Tensor, delta: Tensor, grad_qkv: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradients of keys and values, written into grad_qkv."""
    from moat_kernels.ops.window_attention.triton.kernels import backward as kernels

    chosen, options = call.configure("key_value")
    launch(
        kernels.key_value_gradient_kernel,
        (call.windows, call.heads, call.groups(chosen.keys)),
        grad,
        log_sum_exp,
        delta,
        call.qkv,
        call.bias,
        grad_qkv,
        *call.geometry,
        reads=(grad, log_sum_exp, delta, call.qkv, call.bias),
        writes=(Part(grad_qkv, 2, 3),),
        flops=call.product_flops(4),
        **call.walk(chosen.queries),
        **options,
    )
    return call.part(grad_qkv, 1), call.part(grad_qkv, 2)


@tunable
def _score_sums(call: _Call, grad: Tensor, log_sum_exp: Tensor, delta: Tensor) -> Summands:
    """Each summed in a fixed order."""
    from moat_kernels.ops.window_attention.triton.kernels import backward as kernels

    chosen, options = call.configure("bias")
    tiles = call.blocks(chosen.queries) * call.blocks(chosen.keys)
    splits = max(1, min(call.windows, BIAS_GRADIENT_PROGRAMS // (tiles * call.heads)))
    slabs = call.slabs(splits)
    launch(
        kernels.bias_gradient_kernel,
        (tiles, call.heads, splits),
        grad,
        log_sum_exp,
        delta,
        call.qkv,
        call.bias,
        slabs,
        *call.geometry,
        call.batch,
        reads=(grad, log_sum_exp, delta, call.qkv, call.bias),
        writes=(slabs,),
        flops=call.product_flops(2),
        **options,
    )
    return Summands(slabs)


def _fold_table(call: _Call, slabs: Tensor, dtype: torch.dtype) -> Tensor:
    """[heads, 2*wh-1, 2*ww-1] in `dtype`, summed in a fixed order."""
    from moat_kernels.ops.window_attention.triton.kernels.backward import fold_table_kernel

    rows, columns = table_size(call.window)
    grad_table = slabs.new_empty(call.heads, rows, columns, dtype=dtype)
    launch(
        fold_table_kernel,
        (*fold_programs(call.window), call.heads),
        slabs,
        grad_table,
        len(slabs),
        call.heads,
        *call.window,
        reads=(slabs,),
        writes=(grad_table,),
        **fold_blocks(len(slabs)),
        num_warps=4,
    )
    return grad_table
