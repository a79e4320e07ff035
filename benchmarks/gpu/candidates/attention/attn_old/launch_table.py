"""How the Triton kernels of window attention are launched: its launch table.

Chosen by counting registers and shared memory (docs/gpu_kernels.md has what each compiles to).
Those of Hopper (9) were measured on an H200, the others on no GPU:
`python -m moat_kernels.tune` does that.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from moat_kernels.ops.triton_support.choice import choose
from moat_kernels.ops.triton_support.launch_table import (
    STAGES,
    WARPS,
    LaunchTable,
    register_launch_table,
)


@dataclass(frozen=True)
class AttentionBlocks:
    """A program's tile of scores, [queries, keys]; warps and pipeline stages."""

    queries: int
    keys: int
    warps: int
    stages: int


# Of windows up to 64 tokens (7 x 7 and 8 x 8) one tile is the whole window.
SMALL_WINDOW = 64
SMALL, LARGE = "small window", "large window"

# A program keeps its block of queries and walks over keys, of "key_value" the other way round. That
# of "gradient" (of small windows) does both: it keeps as many keys as queries, and walks over as
# many.
LAUNCHES = register_launch_table(
    LaunchTable(
        "window_attention",
        {
            ("forward", 2, SMALL): AttentionBlocks(64, 32, 4, 2),
            ("forward", 2, LARGE): AttentionBlocks(128, 32, 8, 2),
            ("query", 2, SMALL): AttentionBlocks(64, 32, 4, 2),
            ("query", 2, LARGE): AttentionBlocks(128, 32, 8, 2),
            ("key_value", 2, SMALL): AttentionBlocks(32, 64, 4, 2),
            ("key_value", 2, LARGE): AttentionBlocks(32, 128, 8, 2),
            ("bias", 2, SMALL): AttentionBlocks(64, 32, 4, 2),
            ("bias", 2, LARGE): AttentionBlocks(64, 32, 4, 2),
            ("gradient", 2, SMALL): AttentionBlocks(64, 16, 4, 1),
            ("forward", 4, SMALL): AttentionBlocks(64, 16, 8, 1),
            ("forward", 4, LARGE): AttentionBlocks(64, 16, 8, 1),
            ("query", 4, SMALL): AttentionBlocks(32, 32, 4, 2),
            ("query", 4, LARGE): AttentionBlocks(32, 32, 4, 2),
            ("key_value", 4, SMALL): AttentionBlocks(32, 32, 4, 1),
            ("key_value", 4, LARGE): AttentionBlocks(32, 32, 4, 1),
            ("bias", 4, SMALL): AttentionBlocks(32, 32, 4, 1),
            ("bias", 4, LARGE): AttentionBlocks(32, 32, 4, 1),
            ("gradient", 4, SMALL): AttentionBlocks(64, 16, 8, 1),
        },
        choices={
            "queries": (16, 32, 64, 128),
            "keys": (16, 32, 64, 128),
            "warps": WARPS,
            "stages": STAGES,
        },
        exceptions={
            8: {  # with fewer warps registers spill under Triton 3.6
                ("key_value", 4, SMALL): AttentionBlocks(32, 32, 8, 1),
                ("key_value", 4, LARGE): AttentionBlocks(32, 32, 8, 1),
            },
            9: {  # measured on an H200, see docs/launch_tables.md
                ("forward", 2, SMALL): AttentionBlocks(64, 32, 4, 1),
                ("forward", 2, LARGE): AttentionBlocks(64, 16, 4, 1),
                ("query", 2, LARGE): AttentionBlocks(128, 16, 8, 1),
                ("key_value", 2, LARGE): AttentionBlocks(16, 64, 4, 1),
                ("bias", 2, LARGE): AttentionBlocks(64, 64, 4, 2),
                ("gradient", 2, SMALL): AttentionBlocks(64, 32, 4, 1),
            },
            10: {  # with two stages registers spill, those of "gradient" under Triton 3.6
                ("gradient", 2, SMALL): AttentionBlocks(64, 32, 8, 1),
                ("forward", 2, SMALL): AttentionBlocks(64, 32, 4, 1),
                ("key_value", 2, SMALL): AttentionBlocks(32, 64, 4, 1),
                ("key_value", 2, LARGE): AttentionBlocks(32, 128, 8, 1),
                ("bias", 2, SMALL): AttentionBlocks(64, 32, 4, 1),
                ("bias", 2, LARGE): AttentionBlocks(64, 32, 4, 1),
            },
        },
    )
)

# Windows of up to so many tokens have one backward kernel: each of its programs has a sum of tokens
# times tokens in the second-level cache, as many as there are programs at a time. Beyond, three
# kernels of more programs were faster on an H200.
LARGEST_IN_ONE = SMALL_WINDOW

# Programs that sum the table's gradient, in a kernel of their own: enough for several on each
# multiprocessor of any GPU. A constant, so that the order of summation is the same on all of them.
BIAS_GRADIENT_PROGRAMS = 1024

# Likewise of the one backward kernel: several rounds of what fits a GPU, for few to be idle in the
# last, but each has a slab.
GRADIENT_PROGRAMS = 1024


def size_of(tokens: int) -> str:
    """The launch table's word for windows of so many tokens."""
    return SMALL if tokens <= SMALL_WINDOW else LARGE


def row_slots(window_width: int) -> int:
    """In how many slots kernels count the tokens of a window's row.

    The next power of 2, which is cheap to divide by, if three quarters of the slots have a token.
    """
    power = 1 << (window_width - 1).bit_length()
    return power if 3 * power <= 4 * window_width else window_width


def window_splits(windows: int, heads: int, programs: int) -> int:
    """Over how many programs the windows of each head go, as evenly as `programs` in all allow."""
    rounds = -(-windows // max(1, programs // heads))
    return -(-windows // max(1, rounds))


def attention_blocks(
    kernel: str, like: Tensor, windows: int, tokens: int, heads: int, head_dim: int
) -> AttentionBlocks:
    """The tile of `kernel`, one of those in `LAUNCHES`, in `like`'s dtype."""
    sizes = (windows * heads, tokens, head_dim)
    blocks: AttentionBlocks = choose(LAUNCHES, kernel, like, sizes, size_of(tokens))
    return blocks
