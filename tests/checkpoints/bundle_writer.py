"""Writes small TensorFlow V2 checkpoints and table files, whole or deliberately wrong."""

from __future__ import annotations

import struct
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np

from moat_kernels.checkpoints.crc32c import masked_crc32c

TABLE_MAGIC = 0xDB4775248B80FB57
DTYPE_CODES = {"float32": 1, "float64": 2, "int32": 3, "int64": 9, "float16": 19}
BFLOAT16, STRING = 14, 7


def varint(value: int) -> bytes:
    result = bytearray()
    while value > 0x7F:
        result.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes(result) + bytes([value])


def integer_field(number: int, value: int) -> bytes:
    return varint(number << 3) + varint(value % (1 << 64))


def fixed32_field(number: int, value: int) -> bytes:
    return varint(number << 3 | 5) + struct.pack("<I", value)


def bytes_field(number: int, content: bytes) -> bytes:
    return varint(number << 3 | 2) + varint(len(content)) + content


def header_record(shards: int = 1, big_endian: bool = False, min_consumer: int = 0) -> bytes:
    versions = integer_field(1, 1) + integer_field(2, min_consumer)
    return integer_field(1, shards) + integer_field(2, int(big_endian)) + bytes_field(3, versions)


def tensor_record(
    dtype: int, shape: Sequence[int], data: bytes | memoryview, *, shard: int = 0, offset: int = 0
) -> bytes:
    dimensions = b"".join(bytes_field(2, integer_field(1, size)) for size in shape)
    return (
        integer_field(1, dtype)
        + bytes_field(2, dimensions)
        + integer_field(3, shard)
        + integer_field(4, offset)
        + integer_field(5, len(data))
        + fixed32_field(6, masked_crc32c(data))
    )


def entry(key: bytes, value: bytes, shared: int = 0) -> bytes:
    return varint(shared) + varint(len(key) - shared) + varint(len(value)) + key[shared:] + value


def block(entries: Iterable[tuple[bytes, bytes]]) -> bytes:
    """A table block with shared prefixes and one restart point."""
    content, previous = b"", b""
    for key, value in entries:
        shared = 0
        while shared < min(len(key), len(previous)) and key[shared] == previous[shared]:
            shared += 1
        content += entry(key, value, shared)
        previous = key
    return content + struct.pack("<II", 0, 1)


def sealed(content: bytes, compression: int = 0) -> bytes:
    """A block with its trailer: compression byte and checksum."""
    content += bytes([compression])
    return content + struct.pack("<I", masked_crc32c(content))


def table_of_blocks(blocks: Sequence[bytes], compression: int = 0) -> bytes:
    """A table file of the given data blocks, which may hold anything."""
    content, handles = b"", []
    for number, data in enumerate(blocks):
        handles.append((struct.pack(">I", number), varint(len(content)) + varint(len(data))))
        content += sealed(data, compression)
    return finished(content, block(handles))


def finished(content: bytes, index: bytes) -> bytes:
    """``content``, sealed blocks, with the metaindex, the block ``index`` and the footer."""
    footer = b""
    for data in (block([]), index):
        footer += varint(len(content)) + varint(len(data))
        content += sealed(data)
    return content + footer.ljust(40, b"\0") + struct.pack("<Q", TABLE_MAGIC)


def table(entries: Mapping[bytes, bytes], entries_per_block: int = 10) -> bytes:
    pairs = sorted(entries.items())
    starts = range(0, len(pairs), entries_per_block)
    return table_of_blocks([block(pairs[start : start + entries_per_block]) for start in starts])


def write_bundle(
    folder: Path,
    tensors: Mapping[str, np.ndarray],
    *,
    shards: int = 1,
    prefix: str = "model",
    extra_records: Mapping[bytes, bytes] | None = None,
) -> Path:
    """Write ``tensors``, dealt out over the shards, and return the checkpoint's prefix."""
    records = {b"": header_record(shards), **(extra_records or {})}
    data = [b""] * shards
    for number, (name, array) in enumerate(sorted(tensors.items())):
        shard, content = number % shards, np.ascontiguousarray(array).tobytes()
        records[name.encode()] = tensor_record(
            DTYPE_CODES[array.dtype.name],
            array.shape,
            content,
            shard=shard,
            offset=len(data[shard]),
        )
        data[shard] += content
    return write_raw_bundle(folder, records, data, prefix=prefix)


def write_raw_bundle(
    folder: Path, records: Mapping[bytes, bytes], data: Sequence[bytes], *, prefix: str = "model"
) -> Path:
    (folder / f"{prefix}.index").write_bytes(table(records))
    for shard, content in enumerate(data):
        path = folder / f"{prefix}.data-{shard:05d}-of-{len(data):05d}"
        path.write_bytes(content)
    return folder / prefix
