"""docs/issue_time.csv is of these kernels and launches, and counts what they issue."""

from __future__ import annotations

import re

import pytest

pytest.importorskip("triton")

from support.issue import Recorded, compiler, count_launches, recorded
from support.issue_table import Issue, read_file

# What the assertions below say when they fail.
OUTDATED = "the kernels or their launches changed: run benchmarks/issue.py, then roofline.py"
# Kernels in which a branch depends on data; the first two centre x where its pilot is not zero, in
# the others it is a division's slow path.
DATA_BRANCHES = {
    *("expand_products_kernel", "expand_input_kernel"),
    *("depthwise_forward_kernel", "finish_moments_kernel"),
}


def numbers(text: str) -> dict[str, int]:
    return {name: int(number) for name, number in re.findall(r"(\w+)=(\d+)", text)}


def test_the_file_has_what_a_step_launches() -> None:
    launched = {one.launch.key: (one.cuda, one.triton) for one in recorded()}
    assert launched == {row.key: (row.cuda, row.triton) for row in read_file()}, OUTDATED


def some() -> list[Recorded]:
    """Of a kernel with tensor cores, and of one whose blocks do different things."""
    first = {one.launch.key[0]: one for one in reversed(recorded())}
    return [first["expand_kernel"], first["norm_and_cast_kernel"]]


def test_what_is_counted_today_is_in_the_file() -> None:
    listed = {row.key: row for row in read_file()}
    chosen = some()
    assert all(one.launch.key in listed for one in chosen), OUTDATED
    if any(listed[one.launch.key].compiler != compiler(one.launch) for one in chosen):
        pytest.skip("the file was made by another compiler")
    for row in count_launches(chosen, report=lambda _: None):
        assert row == listed[row.key], OUTDATED


def test_only_known_branches_depend_on_data() -> None:
    assert {row.kernel for row in read_file() if row.most > row.instructions} == DATA_BRANCHES


def products(row: Issue) -> int:
    """FLOP of a product [count, depth] x [depth, columns], padded to whole tiles.

    The depth of `project` is E, and behind it the shortcut's channels where that is projected.
    """
    sizes, blocks = numbers(row.numbers), numbers(row.constants)

    def padded(size: str, block: str) -> int:
        return -(-sizes.get(size, 0) // blocks[block]) * blocks[block]

    rows = padded("count", "BLOCK_ROWS")
    if row.kernel == "expand_kernel":
        return 2 * rows * padded("wide", "BLOCK_WIDE") * padded("channels", "BLOCK_C")
    depth = padded("wide", "BLOCK_WIDE") + padded("shortcut_channels", "BLOCK_WIDE")
    return 2 * rows * padded("channels", "BLOCK_C") * depth


def test_the_products_counted_are_those_of_whole_tiles() -> None:
    """Where the tensor cores' instructions are all there, the loops ran as often as they do."""
    rows = [row for row in read_file() if row.kernel in ("expand_kernel", "project_kernel")]
    whole = [row for row in rows if "gate_ptr=None" in row.constants or row.kernel[0] == "e"]
    assert len(whole) > 8
    for row in whole:
        assert row.tensor_flops == products(row), row
    # The others' tiles end with the image that they are of, or are padded in more than one way.
    for row in read_file():
        if row.tensor_flops:
            assert 0.98 * row.flops <= row.tensor_flops <= 2 * row.flops, row
