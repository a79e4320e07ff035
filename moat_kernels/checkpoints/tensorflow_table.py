"""Reader of TensorFlow's table files, a LevelDB-style sorted map from bytes to bytes.

Layout, from the end: a 48-byte footer (the positions of the metaindex block and of the index block
as variable-length integers, zero padding, an 8-byte magic number); the index block, whose values
are the positions of the data blocks, in the order of the file; the data blocks, none of them empty.
Each block is followed by one byte that says how it is compressed and by the masked CRC-32C of the
block and that byte. Inside a block the keys are sorted and share prefixes: (shared length, own
length, value length, own key bytes, value), then the array of restart positions (uint32 each) and
their number (uint32).

Every block is read at most once, and what a file may announce is limited, so that time and memory
are linear in its size.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from .crc32c import masked_crc32c
from .errors import CheckpointError
from .files import open_regular
from .wire import read_varint, take_bytes

_FOOTER_BYTES = 48
_MAGIC = 0xDB4775248B80FB57
_TRAILER_BYTES = 5
_NOT_COMPRESSED, _SNAPPY = 0, 1
# A checkpoint's index has some hundred bytes per tensor: a file beyond this is not one.
_MAXIMUM_FILE_BYTES = 1 << 24
# Beyond every real checkpoint: tensors and blocks in a file, bytes of a name and of a record.
_MAXIMUM_ENTRIES = 1 << 17
_MAXIMUM_BLOCKS = 1 << 14
_MAXIMUM_KEY_BYTES = 1 << 10
_MAXIMUM_VALUE_BYTES = 1 << 16
# Shared prefixes let a small hostile file announce keys without end; real ones expand about
# twofold.
_MAXIMUM_EXPANSION = 8


def read_table(path: Path) -> Iterator[tuple[bytes, bytes]]:
    """All (key, value) pairs of the table in ``path``, in the order of their keys.

    Raises:
        CheckpointError: the file is truncated, damaged, compressed, or not a table.
    """
    with open_regular(path) as file:
        try:
            yield from _entries_of_table(_read_file(file))
        except CheckpointError as error:
            raise CheckpointError(f"{path}: {error}") from None


def _read_file(file: BinaryIO) -> bytes:
    size = file.seek(0, os.SEEK_END)
    if size < _FOOTER_BYTES:
        raise CheckpointError(
            f"not a TensorFlow table: {size} bytes, less than the {_FOOTER_BYTES}-byte footer"
        )
    # Looked at before the rest, so that a large foreign file is not read in vain.
    file.seek(size - 8)
    if file.read(8) != struct.pack("<Q", _MAGIC):
        raise CheckpointError(
            "not a TensorFlow table, or truncated: the magic number at its end is missing"
        )
    if size > _MAXIMUM_FILE_BYTES:
        raise CheckpointError(f"{size} bytes are too many for the index of a checkpoint")
    file.seek(0)
    return file.read()


def _entries_of_table(data: bytes) -> Iterator[tuple[bytes, bytes]]:
    body, footer = memoryview(data)[:-_FOOTER_BYTES], data[-_FOOTER_BYTES:]
    metaindex_offset, position = read_varint(footer, 0)
    metaindex_size, position = read_varint(footer, position)
    index_offset, position = read_varint(footer, position)
    index_size, _ = read_varint(footer, position)
    # TensorFlow writes no metaindex entries, but a position that leads astray is damage all the
    # same.
    _read_block(body, metaindex_offset, metaindex_size)
    index = _read_block(body, index_offset, index_size)
    previous, count, remaining = None, 0, _MAXIMUM_EXPANSION * len(data)
    for block in _data_blocks(body[: min(metaindex_offset, index_offset)], index):
        before = count
        for key, value in _entries_of_block(block):
            if previous is not None and key <= previous:
                raise CheckpointError(f"key {key!r} is out of order behind {previous!r}")
            previous = key
            count += 1
            remaining -= len(key) + len(value)
            if count > _MAXIMUM_ENTRIES or remaining < 0:
                raise CheckpointError(
                    f"it has more than {_MAXIMUM_ENTRIES} keys, or they expand to more than "
                    f"{_MAXIMUM_EXPANSION} times the size of the file"
                )
            yield key, value
        # Each costs the time of a checksum, and TensorFlow writes none.
        if count == before:
            raise CheckpointError("it has a block without entries")


def _data_blocks(body: memoryview, index: bytes) -> Iterator[bytes]:
    """The blocks that ``index`` names; ``body`` is what lies before the index."""
    begin = 0
    for count, (_, handle) in enumerate(_entries_of_block(index)):
        if count >= _MAXIMUM_BLOCKS:
            raise CheckpointError(f"it has more than {_MAXIMUM_BLOCKS} blocks")
        offset, position = read_varint(handle, 0)
        size, _ = read_varint(handle, position)
        if offset < begin:
            raise CheckpointError(
                f"the block of {size} bytes at {offset} overlaps the one before it, "
                f"which ends at {begin}"
            )
        yield _read_block(body, offset, size)
        begin = offset + size + _TRAILER_BYTES


def _read_block(body: memoryview, offset: int, size: int) -> bytes:
    end = offset + size
    if end + _TRAILER_BYTES > len(body):
        raise CheckpointError(
            f"a block of {size} bytes at {offset} lies beyond the end of the file "
            "(truncated or damaged)"
        )
    (stored,) = struct.unpack_from("<I", body, end + 1)
    if masked_crc32c(body[offset : end + 1]) != stored:
        raise CheckpointError(f"the checksum of the block of {size} bytes at {offset} is wrong")
    compression = body[end]
    if compression == _SNAPPY:
        raise CheckpointError(f"the block at {offset} is snappy-compressed, which is not supported")
    if compression != _NOT_COMPRESSED:
        raise CheckpointError(f"the block at {offset} has the unknown compression {compression}")
    return bytes(body[offset:end])


def _entries_of_block(block: bytes) -> Iterator[tuple[bytes, bytes]]:
    if len(block) < 4:
        raise CheckpointError(f"a block of {len(block)} bytes is too short")
    (restarts,) = struct.unpack_from("<I", block, len(block) - 4)
    end = len(block) - 4 - 4 * restarts
    if end < 0:
        raise CheckpointError(f"a block of {len(block)} bytes announces {restarts} restart points")
    entries = block[:end]
    key, position = b"", 0
    while position < end:
        shared, position = read_varint(entries, position)
        own_size, position = read_varint(entries, position)
        value_size, position = read_varint(entries, position)
        if shared > len(key):
            raise CheckpointError(f"an entry shares {shared} bytes with a key of {len(key)} bytes")
        if shared + own_size > _MAXIMUM_KEY_BYTES or value_size > _MAXIMUM_VALUE_BYTES:
            raise CheckpointError(
                f"an entry has a key of {shared + own_size} and a value of {value_size} bytes; at "
                f"most {_MAXIMUM_KEY_BYTES} and {_MAXIMUM_VALUE_BYTES} are read"
            )
        own, position = take_bytes(entries, position, own_size)
        value, position = take_bytes(entries, position, value_size)
        key = key[:shared] + own
        yield key, value
