"""How the Triton kernels of window attention are launched: its launch table.

Chosen by counting instructions, registers and shared memory (docs/gpu_kernels.md has what each
compiles to), and measured on no GPU: `python -m moat_kernels.tune` does that.
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
# Windows of up to so many tokens have the bias of every pair of tokens in memory: at most 2 MiB for
# each head in 16 bits. Beyond, kernels look it up in the table.
LARGEST_SPREAD = 1024
SMALL, LARGE, HUGE = "small window", "large window", "bias looked up"

# A program keeps its block of queries and walks over keys, of "key_value" the other way round. For
# "gradient" (of small windows) a block of queries is the whole window, whatever stands here.
LAUNCHES = register_launch_table(
    LaunchTable(
        "window_attention",
        {
            ("forward", 2, SMALL): AttentionBlocks(64, 32, 4, 1),
            ("forward", 2, LARGE): AttentionBlocks(64, 32, 4, 1),
            ("forward", 2, HUGE): AttentionBlocks(64, 32, 4, 1),
            ("query", 2, SMALL): AttentionBlocks(64, 32, 4, 1),
            ("query", 2, LARGE): AttentionBlocks(64, 32, 4, 1),
            ("query", 2, HUGE): AttentionBlocks(64, 32, 4, 1),
            ("key_value", 2, SMALL): AttentionBlocks(64, 32, 4, 1),
            ("key_value", 2, LARGE): AttentionBlocks(64, 32, 4, 1),
            ("key_value", 2, HUGE): AttentionBlocks(64, 32, 4, 1),
            ("bias", 2, SMALL): AttentionBlocks(64, 64, 4, 1),
            ("bias", 2, LARGE): AttentionBlocks(64, 64, 4, 1),
            ("bias", 2, HUGE): AttentionBlocks(64, 64, 4, 1),
            ("gradient", 2, SMALL): AttentionBlocks(64, 64, 4, 1),
            ("forward", 4, SMALL): AttentionBlocks(64, 16, 8, 1),
            ("forward", 4, LARGE): AttentionBlocks(64, 16, 8, 1),
            ("forward", 4, HUGE): AttentionBlocks(64, 16, 8, 1),
            ("query", 4, SMALL): AttentionBlocks(32, 32, 4, 2),
            ("query", 4, LARGE): AttentionBlocks(32, 32, 4, 2),
            ("query", 4, HUGE): AttentionBlocks(32, 16, 4, 2),
            ("key_value", 4, SMALL): AttentionBlocks(32, 32, 4, 1),
            ("key_value", 4, LARGE): AttentionBlocks(32, 32, 4, 1),
            ("key_value", 4, HUGE): AttentionBlocks(32, 16, 4, 1),
            ("bias", 4, SMALL): AttentionBlocks(32, 32, 4, 1),
            ("bias", 4, LARGE): AttentionBlocks(32, 32, 4, 1),
            ("bias", 4, HUGE): AttentionBlocks(32, 32, 4, 1),
            # Where nothing is compiled, in tests: its registers would spill, see `in_one`.
            ("gradient", 4, SMALL): AttentionBlocks(64, 16, 8, 1),
        },
        choices={
            "queries": (16, 32, 64, 128),
            "keys": (16, 32, 64, 128),
            "warps": WARPS,
            "stages": STAGES,
        },
        exceptions={
            8: {  # with fewer warps, or more keys, registers spill
                ("query", 4, SMALL): AttentionBlocks(32, 16, 4, 2),
                ("query", 4, LARGE): AttentionBlocks(32, 16, 4, 2),
                ("key_value", 4, SMALL): AttentionBlocks(32, 32, 8, 1),
                ("key_value", 4, LARGE): AttentionBlocks(32, 32, 8, 1),
            },
            9: {  # registers allow larger tiles
                ("forward", 2, SMALL): AttentionBlocks(64, 64, 4, 1),
                ("forward", 2, LARGE): AttentionBlocks(64, 64, 4, 1),
                ("query", 2, SMALL): AttentionBlocks(64, 64, 4, 1),
                ("query", 2, LARGE): AttentionBlocks(64, 64, 4, 1),
                ("key_value", 2, SMALL): AttentionBlocks(64, 64, 4, 1),
                ("key_value", 2, LARGE): AttentionBlocks(64, 64, 4, 1),
            },
            10: {  # with one stage, and "gradient" with fewer warps, registers spill
                ("forward", 2, SMALL): AttentionBlocks(64, 64, 4, 2),
                ("forward", 2, LARGE): AttentionBlocks(64, 64, 4, 2),
                ("query", 2, SMALL): AttentionBlocks(64, 64, 4, 1),
                ("query", 2, LARGE): AttentionBlocks(64, 64, 4, 1),
                ("key_value", 2, SMALL): AttentionBlocks(64, 64, 4, 1),
                ("key_value", 2, LARGE): AttentionBlocks(64, 64, 4, 1),
                ("key_value", 2, HUGE): AttentionBlocks(32, 32, 4, 1),
                ("gradient", 2, SMALL): AttentionBlocks(64, 64, 8, 1),
            },
            12: {  # with one stage, in float32 with more keys, registers spill
                ("gradient", 2, SMALL): AttentionBlocks(64, 64, 4, 2),
                ("query", 4, SMALL): AttentionBlocks(32, 16, 4, 2),
                ("query", 4, LARGE): AttentionBlocks(32, 16, 4, 2),
                ("key_value", 4, SMALL): AttentionBlocks(32, 16, 4, 1),
                ("key_value", 4, LARGE): AttentionBlocks(32, 16, 4, 1),
            },
        },
    )
)

# Windows of up to so many tokens have one backward kernel in 16 bits.
LARGEST_IN_ONE = SMALL_WINDOW

# Windows of up to so many tokens are held in shared memory.
LARGEST_HELD = 256

# Programs among which the blocks of a window are shared out, if there are few windows: enough for
# several on each multiprocessor.
GROUP_PROGRAMS = 528

# Programs that sum the table's gradient, in a kernel of their own: enough for several on each
# multiprocessor of any GPU. A constant, so that the order of summation is the same on all of them.
BIAS_GRADIENT_PROGRAMS = 1024

# Likewise of the one backward kernel: twice what runs at a time on a large GPU; each has a slab.
GRADIENT_PROGRAMS = 528


def size_of(tokens: int) -> str:
    """The launch table's word for windows of so many tokens."""
    if tokens <= SMALL_WINDOW:
        return SMALL
    return LARGE if tokens <= LARGEST_SPREAD else HUGE


def next_power_of_2(size: int) -> int:
    """The smallest that is not below `size`."""
    return 1 << (size - 1).bit_length()


def padded_tokens(tokens: int) -> int:
    """`padded_tokens` of the kernels: rows and columns of the bias of a window's tokens."""
    return 64 if tokens <= 64 else -(-tokens // 128) * 128


def is_held(like: Tensor, tokens: int, block: int) -> bool:
    """Whether kernels keep a window's keys (or queries) in shared memory, and unroll over blocks.

    In float32 products are so many instructions that unrolling them takes too many.
    """
    return like.element_size() == 2 and tokens <= min(LARGEST_HELD, 8 * block)


def in_one(like: Tensor, tokens: int) -> bool:
    """Whether one kernel is the backward pass: in float32 its registers would spill."""
    return like.element_size() == 2 and tokens <= LARGEST_IN_ONE


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
