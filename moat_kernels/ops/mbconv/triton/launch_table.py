"""How the kernels of `mbconv` are launched: its launch table.

The entries were chosen so that the compiled kernels spill no registers and fit the shared memory of
sm_80 to sm_120. Those of Hopper (9) that say so were measured on an H200, the others on no GPU:
`python -m moat_kernels.tune` does that.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch
from torch import Tensor

from moat_kernels.ops.mbconv.algebra.geometry import Stencil
from moat_kernels.ops.triton_support.choice import choose
from moat_kernels.ops.triton_support.launch_table import (
    ANY_SIZE,
    STAGES,
    WARPS,
    LaunchTable,
    register_launch_table,
)
from moat_kernels.ops.triton_support.launching import architecture, multiplies_as_tf32


@dataclass(frozen=True)
class GemmBlocks:
    """Tile [rows, columns] of a product and the depth of one step; warps and pipeline stages."""

    rows: int
    columns: int
    depth: int
    warps: int
    stages: int


@dataclass(frozen=True)
class StencilBlocks:
    """Tile of a pass over a map: pixels along a row x channels, and how many rows it walks down."""

    width: int
    channels: int
    band: int
    warps: int
    stages: int = 1


@dataclass(frozen=True)
class Implementation:
    """Whose kernels compute a pass: "triton", or "cuda" (csrc/cuda, where they are built)."""

    kernels: str


# A thread needs more registers for stride 2: nine taps without neighbours to share, or four pixels.
STRIDE_1, STRIDE_2 = "stride 1", "stride 2"

# Of products, rows and columns are those of the kernel's result, depth is what is summed over.
LAUNCHES = register_launch_table(
    LaunchTable(
        "mbconv",
        {
            ("expand", 2, ANY_SIZE): GemmBlocks(128, 128, 32, 8, 3),
            ("expand", 4, ANY_SIZE): GemmBlocks(64, 64, 16, 4, 2),
            ("project", 2, ANY_SIZE): GemmBlocks(128, 128, 32, 8, 2),
            ("project", 4, ANY_SIZE): GemmBlocks(64, 64, 32, 4, 2),
            ("project_input", 2, ANY_SIZE): GemmBlocks(128, 64, 32, 8, 3),
            ("project_input", 4, ANY_SIZE): GemmBlocks(64, 64, 32, 4, 2),
            ("project_weight", 2, ANY_SIZE): GemmBlocks(64, 64, 64, 8, 2),
            ("project_weight", 4, ANY_SIZE): GemmBlocks(64, 64, 16, 8, 2),
            ("expand_products", 2, ANY_SIZE): GemmBlocks(64, 64, 64, 4, 2),
            ("expand_products", 4, ANY_SIZE): GemmBlocks(64, 64, 32, 4, 2),
            ("expand_input", 2, ANY_SIZE): GemmBlocks(128, 128, 32, 8, 3),
            ("expand_input", 4, ANY_SIZE): GemmBlocks(64, 64, 16, 8, 2),
            ("depthwise", 2, STRIDE_1): StencilBlocks(8, 64, 16, 8),
            ("depthwise", 2, STRIDE_2): StencilBlocks(8, 64, 16, 8),
            ("depthwise", 4, STRIDE_1): StencilBlocks(8, 64, 16, 8),
            ("depthwise", 4, STRIDE_2): StencilBlocks(8, 64, 16, 8),
            ("depthwise_backward", 2, STRIDE_1): StencilBlocks(8, 64, 16, 8),
            ("depthwise_backward", 2, STRIDE_2): StencilBlocks(8, 64, 16, 16),
            ("depthwise_backward", 4, STRIDE_1): StencilBlocks(8, 64, 16, 8),
            ("depthwise_backward", 4, STRIDE_2): StencilBlocks(8, 64, 16, 16),
            ("pool", 2, ANY_SIZE): StencilBlocks(32, 64, 512, 4),
            ("pool", 4, ANY_SIZE): StencilBlocks(32, 64, 512, 4),
            # Passes that CUDA C++ kernels cover too (passes.py): Triton's until a GPU has
            # been seen to be faster with the others.
            **{
                (name, size, ANY_SIZE): Implementation("triton")
                for name in (
                    "depthwise_pass",
                    "depthwise_backward_pass",
                    "expand_depthwise_pass",
                )
                for size in (2, 4)
            },
        },
        choices={
            "rows": (16, 32, 64, 128, 256),
            "columns": (16, 32, 64, 128, 256),
            "depth": (16, 32, 64, 128),
            "width": (4, 8, 16, 32, 64),
            "channels": (16, 32, 64, 128, 256),
            "band": (2, 4, 8, 16, 32, 64, 128, 256, 512),
            "warps": WARPS,
            "stages": STAGES,
            "kernels": ("triton", "cuda"),
        },
        # Without a word to the contrary, what the table has above spills registers there.
        exceptions={
            8: {
                ("depthwise", 4, STRIDE_1): StencilBlocks(8, 64, 16, 16),
                ("depthwise", 4, STRIDE_2): StencilBlocks(8, 64, 16, 16),
                ("project_input", 4, ANY_SIZE): GemmBlocks(64, 64, 16, 4, 2),
                ("project_weight", 2, ANY_SIZE): GemmBlocks(64, 64, 32, 8, 3),
                ("expand_products", 4, ANY_SIZE): GemmBlocks(64, 64, 16, 4, 2),
                ("expand_input", 2, ANY_SIZE): GemmBlocks(128, 64, 32, 8, 4),
            },
            9: {
                ("pool", 4, ANY_SIZE): StencilBlocks(32, 64, 512, 8),
                # Measured on an H200, see docs/launch_tables.md.
                ("expand", 2, ANY_SIZE): GemmBlocks(128, 64, 64, 4, 2),
                ("depthwise", 2, STRIDE_1): StencilBlocks(4, 64, 16, 4, 2),
                ("depthwise", 2, STRIDE_2): StencilBlocks(4, 64, 16, 8),
                ("project", 2, ANY_SIZE): GemmBlocks(64, 128, 32, 4, 4),
                ("project_weight", 2, ANY_SIZE): GemmBlocks(128, 64, 64, 8, 4),
                ("project_input", 2, ANY_SIZE): GemmBlocks(64, 64, 64, 4, 3),
                ("depthwise_backward", 2, STRIDE_1): StencilBlocks(4, 64, 16, 4),
                ("depthwise_backward", 2, STRIDE_2): StencilBlocks(8, 64, 16, 4),
                ("expand_products", 2, ANY_SIZE): GemmBlocks(128, 128, 64, 8, 4),
                ("expand_input", 2, ANY_SIZE): GemmBlocks(128, 128, 64, 8, 3),
                ("depthwise_pass", 2, ANY_SIZE): Implementation("cuda"),
                ("depthwise_backward_pass", 2, ANY_SIZE): Implementation("cuda"),
            },
            10: {
                ("depthwise", 2, STRIDE_2): StencilBlocks(8, 64, 16, 16),
                ("project_input", 4, ANY_SIZE): GemmBlocks(64, 64, 16, 4, 2),
                ("expand_products", 4, ANY_SIZE): GemmBlocks(64, 64, 16, 4, 2),
                ("project", 2, ANY_SIZE): GemmBlocks(64, 128, 16, 8, 3),
                ("project", 4, ANY_SIZE): GemmBlocks(64, 64, 32, 8, 2),
                ("project_weight", 2, ANY_SIZE): GemmBlocks(64, 32, 32, 8, 2),
                ("project_weight", 4, ANY_SIZE): GemmBlocks(64, 64, 32, 8, 2),
                ("expand_input", 2, ANY_SIZE): GemmBlocks(64, 64, 16, 16, 2),
            },
            12: {
                ("expand", 4, ANY_SIZE): GemmBlocks(64, 64, 16, 8, 2),
                ("depthwise", 2, STRIDE_2): StencilBlocks(4, 64, 16, 4),
                # With two elements for each thread Triton 3.6 crashes (LLVM, packed float32).
                ("depthwise_backward", 4, STRIDE_1): StencilBlocks(8, 32, 16, 8),
                ("project", 2, ANY_SIZE): GemmBlocks(64, 128, 16, 8, 2),
                ("project", 4, ANY_SIZE): GemmBlocks(64, 64, 32, 8, 2),
                ("project_input", 2, ANY_SIZE): GemmBlocks(64, 64, 32, 4, 3),
                ("project_input", 4, ANY_SIZE): GemmBlocks(64, 64, 16, 4, 2),
                ("project_weight", 2, ANY_SIZE): GemmBlocks(64, 64, 16, 8, 2),
                ("expand_products", 2, ANY_SIZE): GemmBlocks(64, 64, 32, 4, 3),
                ("expand_products", 4, ANY_SIZE): GemmBlocks(64, 64, 16, 4, 2),
                ("expand_input", 2, ANY_SIZE): GemmBlocks(128, 64, 32, 8, 3),
            },
        },
    )
)

# A product of two 16-bit or TF32 tiles takes at least 16 along each axis.
_SMALLEST = 16
# Programs that keep every multiprocessor of a large GPU busy in a reduction over rows; and so many
# that each has about one.
_REDUCTION_PROGRAMS, _PROGRAMS = 512, 128


def gemm_blocks(kernel: str, like: Tensor, rows: int, columns: int, depth: int) -> GemmBlocks:
    """The tile for a [rows, columns] result summed over `depth`, in the dtype of `like`."""
    blocks = choose(LAUNCHES, kernel, like, (rows, columns, depth))
    return GemmBlocks(
        _fit(blocks.rows, rows),
        _fit(blocks.columns, columns),
        _fit(blocks.depth, depth),
        blocks.warps,
        blocks.stages,
    )


def depthwise_blocks(kernel: str, like: Tensor, channels: int, stencil: Stencil) -> StencilBlocks:
    """The tile of a stencil over maps of `channels`, in the dtype of `like`."""
    size = STRIDE_1 if stencil.stride == 1 else STRIDE_2
    sizes = (channels, *stencil.sizes)
    return _fit_channels(choose(LAUNCHES, kernel, like, sizes, size), channels)


def pool_blocks(like: Tensor, channels: int, batch: int, pixels: int) -> StencilBlocks:
    """The tile of a sum over the pixels of maps of `channels`, in the dtype of `like`."""
    return _fit_channels(choose(LAUNCHES, "pool", like, (channels, batch, pixels)), channels)


def _fit_channels(blocks: StencilBlocks, channels: int) -> StencilBlocks:
    return dataclasses.replace(blocks, channels=_fit(blocks.channels, channels))


def _fit(block: int, size: int) -> int:
    """`block`, halved while half of it still covers `size`."""
    while block > _SMALLEST and block // 2 >= size:
        block //= 2
    return block


def reduction_splits(count: int, tiles: int, step: int) -> tuple[int, int]:
    """(splits, rows per split, a multiple of `step`) of a sum over `count` rows by `tiles` tiles.

    A function of the shape alone, so that results do not depend on the device.
    """
    wanted = max(1, _REDUCTION_PROGRAMS // tiles)
    chunk = -(-max(count, 1) // (wanted * step)) * step
    return -(-count // chunk), chunk


def bias_splits(count: int, columns: int) -> tuple[int, int]:
    """(splits, rows per split) of the sum over `count` rows of `columns` channels."""
    return reduction_splits(count, -(-columns // 64), 64)


def weight_tile(rows: int, columns: int) -> int:
    """Rows of a tile of a product that is as small as a weight, [rows, columns].

    A large tile reads less and issues fewer instructions for each product, where there are enough.
    """
    return 64 if -(-rows // 64) * -(-columns // 64) >= _PROGRAMS else 32


def sum_splits(partial: Tensor) -> Tensor:
    """The sum over the first axis, in PyTorch's fixed order."""
    return partial[0] if partial.shape[0] == 1 else partial.sum(0)


def dot_precision(like: Tensor) -> str:
    """How float32 tiles are multiplied: as PyTorch would, or by three TF32 products for each.

    16-bit tiles are multiplied in one way only. AMD's GPUs have no TF32: there it is exact.
    """
    if like.dtype != torch.float32:
        return "ieee"
    if multiplies_as_tf32():
        return "tf32"
    return "tf32x3" if architecture(like.device) else "ieee"


def statistics_precision(like: Tensor) -> str:
    """How float32 factors are multiplied in what stands beside products in the dtype of `like`."""
    if like.dtype == torch.float32:
        return dot_precision(like)
    return "tf32" if architecture(like.device) else "ieee"


def statistics_depth(like: Tensor) -> int:
    """The depth of a step of such products: three of TF32 for each take more registers."""
    return 16 if like.dtype == torch.float32 else 32
