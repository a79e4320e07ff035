"""Table files: what is written is read, and every damage is noticed."""

from __future__ import annotations

import struct
from collections.abc import Callable
from pathlib import Path

import pytest
from checkpoints.bundle_writer import block, entry, table, table_of_blocks, varint

from moat_kernels.checkpoints import CheckpointError
from moat_kernels.checkpoints.tensorflow_table import read_table

Read = Callable[[bytes], list[tuple[bytes, bytes]]]


@pytest.fixture
def read(tmp_path: Path) -> Read:
    def read_bytes(content: bytes) -> list[tuple[bytes, bytes]]:
        path = tmp_path / "some.index"
        path.write_bytes(content)
        return read_table(path)

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
        (varint(0) + varint(1 << 62) + varint(0), "bytes are announced where 0 are left"),
        (varint(0) + varint(1) + varint(1 << 40) + b"x", "bytes are announced where 0 are left"),
        (b"\x80", "cut off"),
    ],
)
def test_hostile_entries_with_valid_checksums(read: Read, entries: bytes, complaint: str) -> None:
    with pytest.raises(CheckpointError, match=complaint):
        read(table_of_blocks([entries + ONE_RESTART]))


def test_a_small_file_cannot_expand_without_end(read: Read) -> None:
    first = b"a" * 2000
    keys = [first + struct.pack(">I", number) for number in range(5000)]
    entries = entry(keys[0], b"") + b"".join(entry(key, b"", shared=2000) for key in keys[1:])
    with pytest.raises(CheckpointError, match="expand to more than 32 times"):
        read(table_of_blocks([entries + ONE_RESTART]))


def test_an_index_of_impossible_size_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "huge.index"
    with path.open("wb") as file:
        file.seek(1 << 30)
        file.write(table({})[-8:])
    with pytest.raises(CheckpointError, match="too many for the index of a checkpoint"):
        read_table(path)
