"""How the Triton kernels of window attention are launched: block sizes, warps and stages.

Chosen by counting registers and shared memory (docs/gpu_kernels.md has what each compiles to);
none has been timed on a GPU.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Launch:
    """A program's tile of scores, and what it runs on."""

    block_queries: int
    block_keys: int
    num_warps: int
    num_stages: int


# Of windows up to 64 tokens (7 x 7 and 8 x 8) one tile is the whole window.
SMALL_WINDOW = 64

# By kernel, whether the dtype is float32, and whether the window is small. A program keeps its
# block of queries and walks over keys; of "key_value" it is the other way round.
_LAUNCHES: dict[tuple[str, bool, bool], Launch] = {
    ("forward", False, True): Launch(64, 32, 4, 2),
    ("forward", False, False): Launch(128, 32, 8, 2),
    ("query", False, True): Launch(64, 32, 4, 2),
    ("query", False, False): Launch(128, 32, 8, 2),
    ("key_value", False, True): Launch(32, 64, 4, 2),
    ("key_value", False, False): Launch(32, 128, 8, 2),
    ("bias", False, True): Launch(64, 32, 4, 2),
    ("bias", False, False): Launch(64, 32, 4, 2),
    ("forward", True, True): Launch(64, 32, 4, 1),
    ("forward", True, False): Launch(64, 32, 4, 1),
    ("query", True, True): Launch(32, 32, 4, 2),
    ("query", True, False): Launch(32, 32, 4, 2),
    ("key_value", True, True): Launch(32, 32, 4, 1),
    ("key_value", True, False): Launch(32, 32, 4, 1),
    ("bias", True, True): Launch(32, 32, 4, 1),
    ("bias", True, False): Launch(32, 32, 4, 1),
}

# By the same, where an architecture (its major number) needs another.
_EXCEPTIONS: dict[int, dict[tuple[str, bool, bool], Launch]] = {
    10: {  # with two stages a register spills
        ("key_value", False, True): Launch(32, 64, 4, 1),
        ("key_value", False, False): Launch(32, 128, 8, 1),
    },
}

# Programs that sum the table's gradient: enough for several on each multiprocessor of any GPU. A
# constant, so that the order of summation is the same on all of them.
BIAS_GRADIENT_PROGRAMS = 1024


def launch_for(kernel: str, dtype: torch.dtype, tokens: int, architecture: int) -> Launch:
    """The launch of `kernel` ("forward", "query", "key_value" or "bias") for a window's tokens.

    architecture: compute capability as 10 * major + minor.
    """
    key = (kernel, dtype == torch.float32, tokens <= SMALL_WINDOW)
    return _EXCEPTIONS.get(architecture // 10, {}).get(key) or _LAUNCHES[key]
