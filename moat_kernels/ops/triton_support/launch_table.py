"""Launch tables: the blocks, warps and pipeline stages that an op's kernels are launched with.

Every op has one static `LaunchTable`, written to be read: by kernel, bytes of an element and size
of the problem, with the exceptions of an architecture beside it. What `python -m moat_kernels.tune`
measured on a GPU (user_table.py) goes before it; choice.py asks both.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields
from typing import Any

import torch

# A launch: a frozen dataclass of an op's own, such as GemmBlocks. Those of kernels have `warps` and
# `stages` beside the sizes of their tile.
Blocks = Any
# Kernel, bytes of an element, and which sizes of the problem, in the op's words.
Key = tuple[str, int, str]

ANY_SIZE = "any"
WARPS = (1, 2, 4, 8, 16)
STAGES = (1, 2, 3, 4, 5)


@dataclass(frozen=True)
class Problem:
    """What a launch is measured for: a kernel on tensors of a dtype, sizes up to a power of 2."""

    op: str
    kernel: str
    dtype: torch.dtype
    sizes: tuple[int, ...]


@dataclass(frozen=True)
class LaunchTable:
    """The launches of an op's kernels.

    launches: for every architecture that has no exception.
    exceptions: by the major number of the compute capability, where it needs another launch.
    choices: the values that each field of a launch may have, in order: what tuning tries.
    """

    op: str
    launches: Mapping[Key, Blocks]
    choices: Mapping[str, tuple[Any, ...]]
    exceptions: Mapping[int, Mapping[Key, Blocks]]

    def static_launch(self, kernel: str, element_size: int, size: str, architecture: int) -> Blocks:
        """The launch for elements of so many bytes; architecture: 10 * major + minor."""
        key = (kernel, element_size, size)
        return self.exceptions.get(architecture // 10, {}).get(key) or self.launches[key]

    def example(self, kernel: str) -> Blocks | None:
        """A launch of `kernel`, to know its fields by; None: the op has no such kernel."""
        return next((blocks for key, blocks in self.launches.items() if key[0] == kernel), None)

    def neighbours(self, blocks: Blocks) -> Iterator[Blocks]:
        """The launches that differ from `blocks` by one step of one field."""
        values = {field.name: getattr(blocks, field.name) for field in fields(blocks)}
        for name, value in values.items():
            allowed = self.choices[name]
            index = allowed.index(value)
            for other in allowed[max(0, index - 1) : index + 2]:
                if other != value:
                    yield type(blocks)(**{**values, name: other})


# The launch of a problem, given the static table's.
Chooser = Callable[[Problem, Blocks], Blocks]

# The tables of all ops, by the op's name: each registers itself where it is defined.
LAUNCH_TABLES: dict[str, LaunchTable] = {}


def register_launch_table(table: LaunchTable) -> LaunchTable:
    """Make a table known to the tuner and to user_table.py; returns it."""
    LAUNCH_TABLES[table.op] = table
    return table
