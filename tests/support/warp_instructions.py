"""How many instructions the warps of a launch issue, by following them through its machine code."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

from support.machine_code import Function, Instruction
from support.machine_run import THREAD, Program, Thread, UndecidedBranch

# Where the arguments of a kernel begin in its first constant bank. The sizes of block and grid, of
# three words each, stand at the beginning.
ARGUMENTS = {80: 0x160, 90: 0x210}

LANES = 32
# A branch that lanes take differently makes the warp go both ways. Of all lanes those are followed
# that differ from the first in one bit of their index, and the last.
FOLLOWED = (0, 1, 2, 4, 8, 16, 31)
# Blocks of a grid whose first thread is followed, spread over it; of smaller grids all.
MOST_BLOCKS = 512
_GOLDEN = (math.sqrt(5) - 1) / 2

_HGMMA = re.compile(r"^HGMMA\.64x(\d+)x(\d+)\.")
_HMMA = re.compile(r"^HMMA\.168(\d+)\.")


@dataclass(frozen=True)
class Count:
    """Of one launch, all warps together.

    instructions: issued; where branches depend on data, the shorter way. most: the longer way.
    tensor_flops: of the matrix products among them, the shorter way. blocks: whose first thread was
    followed.
    """

    instructions: int
    most: int
    tensor_flops: int
    blocks: int


def constants(
    architecture: int, threads: int, grid: Sequence[int], arguments: bytes
) -> dict[int, int]:
    """A kernel's first constant bank: sizes of the launch and `arguments`, by offset."""
    grid = (*grid, 1, 1)[:3]
    sizes = b"".join(size.to_bytes(4, "little") for size in (threads, 1, 1, *grid))
    first = ARGUMENTS[architecture]
    return dict(enumerate(sizes)) | {first + i: byte for i, byte in enumerate(arguments)}


def count(function: Function, bank: dict[int, int], threads: int, grid: Sequence[int]) -> Count:
    """What a launch of `grid` blocks of `threads` issues."""
    program = Program(function, bank)
    try:
        ways = [_count(program, threads, grid, None)]
    except UndecidedBranch:
        ways = [_count(program, threads, grid, unknown) for unknown in (False, True)]
    ways.sort(key=lambda way: way.instructions)
    return Count(ways[0].instructions, ways[-1].instructions, ways[0].tensor_flops, ways[0].blocks)


def _count(program: Program, threads: int, grid: Sequence[int], unknown: bool | None) -> Count:
    # Blocks whose first threads go the same way are taken for alike.
    blocks = math.prod(grid)
    alike: dict[tuple[int, ...], list[int]] = {}
    first = program.run(Thread(), unknown)
    # Who asks for no index of a block does the same in all.
    positions = _spread(blocks) if first.depends & ~THREAD else [0]
    for position in positions:
        way = program.run(_first_thread(position, grid), unknown).counts
        alike.setdefault(way, []).append(position)
    times = [0] * len(first.counts)
    for group in alike.values():
        counts = _follow_block(program, threads, _first_thread(group[0], grid), unknown)
        times = [total + len(group) * each for total, each in zip(times, counts, strict=True)]
    share = blocks / len(positions)
    code = program.function.instructions
    flops = sum(each * _flops(one) for each, one in zip(times, code, strict=True))
    issued = round(sum(times) * share)
    return Count(issued, issued, round(flops * share), len(positions))


def _spread(blocks: int) -> list[int]:
    """Positions in a grid, not at intervals that its own pattern could have."""
    if blocks <= MOST_BLOCKS:
        return list(range(blocks))
    return [int(i * _GOLDEN % 1 * blocks) for i in range(MOST_BLOCKS)]


def _first_thread(position: int, grid: Sequence[int]) -> Thread:
    """Of the block at a position of the grid."""
    width, height, _ = (*grid, 1, 1)[:3]
    return Thread(0, position % width, position // width % height, position // (width * height))


def _follow_block(
    program: Program, threads: int, block: Thread, unknown: bool | None
) -> Sequence[int]:
    """How often the warps of a block issue each instruction."""
    total = [0] * len(program.function.instructions)
    for first in range(0, threads, LANES):
        trace = program.run(replace(block, thread=first), unknown)
        counts = trace.counts
        for lane in FOLLOWED[1:] if trace.depends & THREAD else ():
            other = program.run(replace(block, thread=first + lane), unknown).counts
            if other is not counts:
                counts = tuple(map(max, counts, other))
        total = [a + b for a, b in zip(total, counts, strict=True)]
    return total


def _flops(one: Instruction) -> int:
    """Of the product that an instruction makes: a warp's share, where four make it together."""
    if product := _HGMMA.match(one.opcode):
        return 2 * 64 * int(product[1]) * int(product[2]) // 4
    if product := _HMMA.match(one.opcode):
        return 2 * 16 * 8 * int(product[1])
    return 0
