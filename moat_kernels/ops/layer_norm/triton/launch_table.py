"""How the Triton kernels of LayerNorm are launched: its launch table.

Chosen by counting registers and bytes in flight (docs/gpu_kernels.md has what each compiles to);
none was chosen by its time on a GPU. `python -m moat_kernels.tune` does that.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from moat_kernels.ops.triton_support.choice import choose
from moat_kernels.ops.triton_support.launch_table import (
    ANY_SIZE,
    STAGES,
    WARPS,
    LaunchTable,
    register_launch_table,
)


@dataclass(frozen=True)
class NormBlocks:
    """Elements of a tile, of as many whole rows as fit, at least one; warps and stages."""

    elements: int
    warps: int
    stages: int = 1

    def tile(self, channels: int) -> tuple[int, int]:
        """(rows, channels) of a tile, powers of 2."""
        covering = 1 << (channels - 1).bit_length()
        return max(self.elements // covering, 1), covering


# A row is held in registers whole.
LARGEST_ROW = 2048

LAUNCHES = register_launch_table(
    LaunchTable(
        "layer_norm",
        {
            ("forward", 2, ANY_SIZE): NormBlocks(2048, 4),
            ("forward", 4, ANY_SIZE): NormBlocks(2048, 4),
            ("backward", 2, ANY_SIZE): NormBlocks(2048, 4),
            ("backward", 4, ANY_SIZE): NormBlocks(2048, 4),
        },
        choices={"elements": (512, 1024, 2048, 4096, 8192), "warps": WARPS, "stages": STAGES},
        # What the table has above spills registers there.
        exceptions={8: {("backward", 4, ANY_SIZE): NormBlocks(4096, 8)}},
    )
)

# Programs of the backward pass, each with sums of its own to write: enough for several on each
# multiprocessor of any GPU, but with at least so many rows each that the sums, 8 bytes for each of
# a program's channels, stay small beside them. Not in the table: of the shape alone, so that the
# order of summation hardly depends on the GPU.
PROGRAMS = 512
FEWEST_ROWS = 16


def norm_blocks(kernel: str, x: Tensor, rows: int, channels: int) -> NormBlocks:
    """The tile of `kernel` ("forward" or "backward"), for x of a dtype."""
    blocks: NormBlocks = choose(LAUNCHES, kernel, x, (rows, channels))
    return blocks


def rows_of_a_program(rows: int, block_rows: int) -> int:
    """How many rows a program of the backward pass sums over, a multiple of those of a tile."""
    share = max(-(-rows // PROGRAMS), FEWEST_ROWS)
    return -(-share // block_rows) * block_rows
