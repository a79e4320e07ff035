"""Table files: what is written is read, and every damage is noticed."""

from __future__ import annotations

import struct
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from checkpoints.bundle_writer import (
    block,
    entry,
    finished,
    sealed,
    table,
    table_of_blocks,
    varint,
)

from moat_kernels.checkpoints import CheckpointError, tensorflow_table
from moat_kernels.checkpoints.tensorflow_table import read_table

Read = Callable[[bytes], list[tuple[bytes, bytes]]]


@pytest.fixture
def read(tmp_path: Path) -> Read:
    def read_bytes(content: bytes) -> list[tuple[bytes, bytes]]:
        path = tmp_path / "some.index"
        path.write_bytes(content)
        return list(read_table(path))

    return read_bytes


def test_keys_with_shared_prefixes_over_several_blocks(read: Read) -> None:
    entries = {f"moat/block_{i:02d}/kernel".encode(): bytes([i]) * i for i in range(45)}
    assert read(table(entries)) == sorted(entries.items())


def test_an_empty_table(read: Read) -> None:
    assert read(table({})) == []


def test_every_cut_is_noticed(read: Read) -> None:
    content = table({b"key": b"value", b"other": b"thing"})
    for size in range(len(content)):
        with pytest.raises(CheckpointError, match=r"some\.index: not a TensorFlow table"):
            read(content[:size])


def test_flipped_bits_are_noticed_or_harmless(read: Read) -> None:
    entries = {b"key": b"value", b"other": b"thing"}
    content = table(entries)
    harmless = 0
    for bit in range(0, 8 * len(content), 3):
        damaged = bytearray(content)
        damaged[bit // 8] ^= 1 << bit % 8
        try:
            assert read(bytes(damaged)) == sorted(entries.items())
            harmless += 1
        except CheckpointError as error:
            assert "some.index" in str(error)
    # Nothing but the zeros that fill up the 40 bytes of the footer's two positions may change.
    assert harmless <= 3 * 40


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (b"", "0 bytes, less than the 48-byte footer"),
        (b"\x89PNG\r\n\x1a\n" + bytes(1000), "magic number at its end is missing"),
        (struct.pack("<Q", 2) + b"{}" + bytes(100), "magic number"),
        (table_of_blocks([block([(b"k", b"v")])], compression=1), "snappy-compressed"),
        (table_of_blocks([block([(b"k", b"v")])], compression=9), "unknown compression 9"),
        (table_of_blocks([block([(b"b", b""), (b"a", b"")])]), "b'a' is out of order behind b'b'"),
        (table_of_blocks([block([(b"a", b"")])] * 2), "out of order"),
        (table_of_blocks([b"\0"]), "a block of 1 bytes is too short"),
        (table_of_blocks([struct.pack("<I", 1 << 31)]), "announces 2147483648 restart points"),
    ],
    ids=lambda value: value if isinstance(value, str) else "file",
)
def test_unsupported_and_foreign_files(read: Read, content: bytes, complaint: str) -> None:
    with pytest.raises(CheckpointError, match=complaint):
        read(content)


ONE_RESTART = struct.pack("<II", 0, 1)


@pytest.mark.parametrize(
    ("entries", "complaint"),
    [
        (varint(5) + varint(1) + varint(0) + b"x", "shares 5 bytes with a key of 0 bytes"),
        (varint(0) + varint(9) + varint(0), "9 bytes are announced where 0 are left"),
        (varint(0) + varint(1 << 62) + varint(0), "at most 1024 and 65536 are read"),
        (varint(0) + varint(1) + varint(9) + b"x", "9 bytes are announced where 0 are left"),
        (varint(0) + varint(1) + varint(1 << 40) + b"x", "at most 1024 and 65536 are read"),
        (b"\x80", "cut off"),
        (b"\xff" * 100, "more than 64 bits"),
        (entry(b"k" * 1025, b""), "a key of 1025 and a value of 0 bytes; at most 1024 and 65536"),
        (entry(b"k", bytes(65537)), "a key of 1 and a value of 65537 bytes"),
    ],
)
def test_hostile_entries_with_valid_checksums(read: Read, entries: bytes, complaint: str) -> None:
    with pytest.raises(CheckpointError, match=complaint):
        read(table_of_blocks([entries + ONE_RESTART]))


def test_a_small_file_cannot_expand_without_end(read: Read) -> None:
    first = b"a" * 1000
    keys = [first + struct.pack(">I", number) for number in range(5000)]
    entries = entry(keys[0], b"") + b"".join(entry(key, b"", shared=1000) for key in keys[1:])
    with pytest.raises(CheckpointError, match="expand to more than 8 times"):
        read(table_of_blocks([entries + ONE_RESTART]))


def table_of_handles(blocks: Sequence[bytes], handles: Sequence[tuple[int, int]]) -> bytes:
    """A table of ``blocks`` whose index block names (block, bytes left out at its front)."""
    content, places = b"", []
    for data in blocks:
        places.append((len(content), len(data)))
        content += sealed(data)
    entries = []
    for number, (chosen, omitted) in enumerate(handles):
        offset, size = places[chosen]
        handle = varint(offset + omitted) + varint(size - omitted)
        entries.append((struct.pack(">I", number), handle))
    return finished(content, block(entries))


@pytest.mark.parametrize(
    ("handles", "complaint"),
    [
        ([(0, 0), (0, 0)], "the block of 17 bytes at 0 overlaps the one before it, .* ends at 22"),
        ([(0, 0), (0, 1)], "the block of 16 bytes at 1 overlaps"),
        ([(1, 0), (0, 0)], "the block of 17 bytes at 0 overlaps"),
    ],
)
def test_every_block_is_read_once(
    read: Read, handles: list[tuple[int, int]], complaint: str
) -> None:
    blocks = [block([(key, b"value")]) for key in (b"1", b"2")]
    assert len(blocks[0]) == 17
    assert read(table_of_handles(blocks, [(0, 0), (1, 0)])) == [(b"1", b"value"), (b"2", b"value")]
    with pytest.raises(CheckpointError, match=complaint):
        read(table_of_handles(blocks, handles))


def test_a_block_named_many_times_costs_no_time(read: Read) -> None:
    """An index block of 0.5 MB, and 256 KB of restart points without entries."""
    restarts = struct.pack("<65536I", *range(65535), 65535)
    content = table_of_handles([restarts], [(0, 0)] * 30_000)
    start = time.process_time()
    with pytest.raises(CheckpointError, match="a block without entries"):
        read(content)
    assert time.process_time() - start < 5


def test_the_index_block_is_no_data_block(read: Read) -> None:
    index = block([(b"0", varint(0) + varint(18))])
    with pytest.raises(CheckpointError, match="lies beyond the end"):
        read(finished(b"", index))


def test_no_more_entries_than_a_checkpoint_can_have(
    read: Read, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = table({bytes([number]): b"" for number in range(11)}, entries_per_block=1)
    monkeypatch.setattr(tensorflow_table, "_MAXIMUM_ENTRIES", 10)
    with pytest.raises(CheckpointError, match="more than 10 keys"):
        read(content)
    monkeypatch.setattr(tensorflow_table, "_MAXIMUM_BLOCKS", 9)
    with pytest.raises(CheckpointError, match="more than 9 blocks"):
        read(content)


def test_an_index_of_impossible_size_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "huge.index"
    with path.open("wb") as file:
        file.seek(1 << 30)
        file.write(table({})[-8:])
    with pytest.raises(CheckpointError, match="too many for the index of a checkpoint"):
        list(read_table(path))
