"""Reader of TensorFlow V2 checkpoints ("tensor bundles") that needs nothing but numpy.

A bundle is ``PREFIX.index``, a table (see ``tensorflow_table``) from tensor names to
protocol-buffer records (dtype, shape, shard, offset, size, checksum), and
``PREFIX.data-SSSSS-of-NNNNN``, the raw little-endian data. Message and field numbers are those of
TensorFlow's ``tensor_bundle.proto``, ``tensor_shape.proto``, ``types.proto`` and
``versions.proto``.
"""

from __future__ import annotations

import math
import os
import re
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np

from .crc32c import masked_crc32c
from .errors import CheckpointError
from .files import open_regular
from .tensorflow_table import read_table
from .wire import FIXED32, Message, read_varint, signed, take_bytes

_BFLOAT16 = 14
# DataType -> (name, numpy's dtype of the stored bytes).
_DTYPES = {
    1: ("float32", "<f4"),
    2: ("float64", "<f8"),
    3: ("int32", "<i4"),
    4: ("uint8", "|u1"),
    5: ("int16", "<i2"),
    6: ("int8", "|i1"),
    9: ("int64", "<i8"),
    _BFLOAT16: ("bfloat16", "<u2"),
    17: ("uint16", "<u2"),
    19: ("float16", "<f2"),
    22: ("uint32", "<u4"),
    23: ("uint64", "<u8"),
}
_STRING = 7
_UNSUPPORTED_DTYPES = {_STRING: "string", 8: "complex64", 10: "bool", 18: "complex128"}

_HEADER_KEY = b""
# Keys of the pieces of a partitioned tensor; no tensor's name begins with this byte.
_SLICE_MARK = b"\0"
_BUNDLE_VERSION = 1
_MAXIMUM_RANK = 32
_CHECKPOINT_FILE = "checkpoint"
# Within a SavedModel.
_SAVED_MODEL_PREFIX = Path("variables", "variables")


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """What the index says about one tensor; ``offset`` and ``size`` are bytes in its shard."""

    dtype: str
    shape: tuple[int, ...]
    shard: int
    offset: int
    size: int
    checksum: int
    storage_dtype: np.dtype
    partitioned: bool


class TensorBundle(Mapping[str, np.ndarray]):
    """A TensorFlow V2 checkpoint as a read-only mapping from tensor names to numpy arrays.

    The index is read and verified at once; a tensor's data is read, and its checksum verified, each
    time it is asked for: ``bundle["moat/stem/conv_0/kernel"]``. bfloat16 tensors are returned as
    float32, which represents them exactly.

    Args:
        path: the checkpoint's prefix (``.../model.ckpt-1234``), its ``.index`` file, or a folder
            with a ``checkpoint`` file that names the prefix, or a SavedModel or its ``variables``.

    Attributes:
        prefix: the checkpoint's prefix.
        entries: :class:`TensorEntry` of every tensor that can be read, by name.
        skipped: the names in the index that cannot be read (strings and the like), with the reason.

    Raises:
        CheckpointError: no such checkpoint, or its index is damaged or unsupported. Reading a
            tensor raises it if its data is missing or damaged, or if it is a partitioned variable.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.prefix = find_prefix(path)
        self.index_path = Path(f"{self.prefix}.index")
        self.entries: dict[str, TensorEntry] = {}
        self.skipped: dict[str, str] = {}
        self._strings: dict[str, TensorEntry] = {}
        table = read_table(self.index_path)
        self._shards = self._read_header(next(table, None))
        for key, value in table:
            if not key.startswith(_SLICE_MARK):
                self._read_entry(key, value)
        self._check_overlap()

    def __getitem__(self, name: str) -> np.ndarray:
        entry = self.entries[name]
        path = self._shard_path(entry.shard)
        if entry.partitioned:
            raise CheckpointError(
                f"{self.index_path}: {name!r} is stored in pieces (a partitioned variable), "
                "which is not supported"
            )
        data = _read_range(path, entry.offset, entry.size, name)
        if masked_crc32c(data) != entry.checksum:
            raise CheckpointError(f"{path}: the checksum of {name!r} is wrong: the file is damaged")
        values = data.view(entry.storage_dtype)
        if entry.dtype == "bfloat16":
            values = (values.astype("<u4") << 16).view("<f4")
        return values.reshape(entry.shape)

    def read_string(self, name: str, limit: int) -> bytes:
        """What the string tensor ``name`` holds, which must be a scalar of at most ``limit`` bytes.

        Raises:
            CheckpointError: there is no such scalar, it is longer, missing or damaged.
        """
        entry = self._strings.get(name)
        if entry is None or entry.shape or entry.partitioned:
            raise CheckpointError(f"{self.index_path}: it has no scalar string {name!r}")
        if entry.size > limit:
            raise CheckpointError(
                f"{self.index_path}: {name!r} has {entry.size} bytes, at most {limit} are read"
            )
        path = self._shard_path(entry.shard)
        data = _read_range(path, entry.offset, entry.size, name).tobytes()
        try:
            return _decode_scalar_string(data, entry.checksum)
        except CheckpointError as error:
            raise CheckpointError(f"{path}: {name!r}: {error}") from None

    def __contains__(self, name: object) -> bool:
        return name in self.entries

    def __iter__(self) -> Iterator[str]:
        return iter(self.entries)

    def __len__(self) -> int:
        return len(self.entries)

    def _shard_path(self, shard: int) -> Path:
        return Path(f"{self.prefix}.data-{shard:05d}-of-{self._shards:05d}")

    def _read_header(self, first: tuple[bytes, bytes] | None) -> int:
        """Check the header record; returns the number of shards."""
        if first is None or first[0] != _HEADER_KEY:
            raise CheckpointError(f"{self.index_path}: the header of a V2 checkpoint is missing")
        try:
            header = Message(first[1])
            shards, big_endian = header.integer(1), header.integer(2)
            versions = header.messages(3)
            required = max((version.integer(2) for version in versions), default=0)
        except CheckpointError as error:
            raise CheckpointError(
                f"{self.index_path}: not the header of a V2 checkpoint ({error}); "
                "V1 checkpoints are not supported"
            ) from None
        if big_endian:
            raise CheckpointError(f"{self.index_path}: big-endian checkpoints are not supported")
        if required > _BUNDLE_VERSION:
            raise CheckpointError(
                f"{self.index_path}: needs a reader of version {required}, "
                f"this one knows version {_BUNDLE_VERSION}"
            )
        if not 1 <= shards <= 99999:
            raise CheckpointError(f"{self.index_path}: {shards} is not a possible number of shards")
        return shards

    def _read_entry(self, key: bytes, value: bytes) -> None:
        try:
            name = key.decode("utf-8")
        except UnicodeDecodeError:
            raise CheckpointError(
                f"{self.index_path}: {key!r} is not the name of a tensor"
            ) from None
        try:
            record = Message(value)
            code = record.integer(1)
            if code in _DTYPES:
                self.entries[name] = _parse_entry(record, *_DTYPES[code], self._shards)
                return
            if code == _STRING:
                self._strings[name] = _parse_entry(record, "string", None, self._shards)
            dtype = _UNSUPPORTED_DTYPES.get(code, f"number {code}")
            self.skipped[name] = f"dtype {dtype} is not supported"
        except CheckpointError as error:
            raise CheckpointError(f"{self.index_path}: {name!r}: {error}") from None

    def _check_overlap(self) -> None:
        """No two tensors share bytes, or few of them could stand for any number of tensors."""
        places = sorted(
            (entry.shard, entry.offset, entry.offset + entry.size, name)
            for name, entry in (*self.entries.items(), *self._strings.items())
            if entry.size and not entry.partitioned
        )
        for (shard, _, end, name), (next_shard, begin, _, next_name) in pairwise(places):
            if next_shard == shard and begin < end:
                raise CheckpointError(
                    f"{self.index_path}: {next_name!r} begins at byte {begin} of shard {shard}, "
                    f"within {name!r}, which ends at {end}"
                )


def find_prefix(path: str | os.PathLike[str]) -> Path:
    """The prefix of the V2 checkpoint that ``path`` means (see :class:`TensorBundle`)."""
    path = Path(path)
    if path.is_dir():
        return _prefix_of_folder(path)
    prefix = path.with_suffix("") if path.suffix == ".index" else path
    if Path(f"{prefix}.index").exists():
        return prefix
    if path.exists():
        raise CheckpointError(
            f"{path}: not a TensorFlow V2 checkpoint; give its prefix (PREFIX.index and "
            "PREFIX.data-00000-of-00001 exist), its .index file, or its folder"
        )
    raise CheckpointError(f"{path}: no such checkpoint ({prefix}.index does not exist)")


def _prefix_of_folder(folder: Path) -> Path:
    state = folder / _CHECKPOINT_FILE
    if not state.exists():
        for prefix in (folder / _SAVED_MODEL_PREFIX, folder / _SAVED_MODEL_PREFIX.name):
            if Path(f"{prefix}.index").exists():
                return prefix
        found = ", ".join(sorted(file.name for file in folder.glob("*.index"))) or "none"
        raise CheckpointError(
            f"{folder}: no file {_CHECKPOINT_FILE!r} says which checkpoint to take; "
            f"give the prefix of one (index files here: {found})"
        )
    with open_regular(state) as file:
        text = file.read(1 << 20).decode("utf-8", errors="replace")
    match = re.search(r'^model_checkpoint_path:\s*"([^"\n\0]+)"', text, flags=re.MULTILINE)
    if match is None:
        raise CheckpointError(f'{state}: no line model_checkpoint_path: "..."')
    # An absolute path was right on the machine that trained; here the folder is what counts.
    for prefix in (folder / match[1], folder / Path(match[1]).name):
        if Path(f"{prefix}.index").exists():
            return prefix
    raise CheckpointError(f"{state}: names {match[1]!r}, whose .index file does not exist")


def _parse_entry(record: Message, dtype: str, storage: str | None, shards: int) -> TensorEntry:
    """``storage``: numpy's dtype of the stored bytes; None where their number varies."""
    entry = TensorEntry(
        dtype=dtype,
        shape=_parse_shape(record),
        shard=record.integer(3),
        offset=record.integer(4),
        size=record.integer(5),
        checksum=record.integer(6, FIXED32),
        storage_dtype=np.dtype(storage or np.uint8),
        partitioned=bool(record.messages(7)),
    )
    if entry.shard >= shards:
        raise CheckpointError(f"shard {entry.shard} of only {shards}")
    if storage is not None:
        _check_size(entry)
    return entry


def _parse_shape(record: Message) -> tuple[int, ...]:
    dimensions: list[Message] = []
    for message in record.messages(2):
        if message.integer(3):
            raise CheckpointError("its rank is unknown")
        dimensions += message.messages(2)
    if len(dimensions) > _MAXIMUM_RANK:
        raise CheckpointError(f"{len(dimensions)} dimensions are not a possible shape")
    shape = tuple(signed(dimension.integer(1)) for dimension in dimensions)
    extent = math.prod(max(size, 1) for size in shape)
    if min(shape, default=0) < 0 or extent >> 48:
        raise CheckpointError(f"{list(shape)} is not a possible shape")
    return shape


def _check_size(entry: TensorEntry) -> None:
    expected = math.prod(entry.shape) * entry.storage_dtype.itemsize
    if entry.size != expected and not entry.partitioned:
        raise CheckpointError(
            f"{entry.dtype} of shape {list(entry.shape)} takes {expected} bytes, "
            f"the index says {entry.size}"
        )


def _read_range(path: Path, offset: int, size: int, name: str) -> np.ndarray:
    try:
        with open_regular(path) as file:
            available = file.seek(0, os.SEEK_END)
            # Compared before anything is allocated.
            if offset + size > available:
                raise CheckpointError(
                    f"{path}: truncated: {name!r} ends at byte {offset + size}, "
                    f"the file at {available}"
                )
            file.seek(offset)
            return np.fromfile(file, dtype=np.uint8, count=size)
    except FileNotFoundError:
        raise CheckpointError(f"{path}: missing; it holds the data of {name!r}") from None


def _decode_scalar_string(data: bytes, checksum: int) -> bytes:
    """A string tensor of one element: its length, the checksum of the length, the bytes.

    The length is a varint, but four bytes where it is summed.
    """
    length, begin = read_varint(data, 0)
    if length >= 1 << 32:
        raise CheckpointError(f"a string of {length} bytes is too long")
    summed = struct.pack("<I", length)
    stored, content_begin = take_bytes(data, begin, 4)
    if struct.pack("<I", masked_crc32c(summed)) != stored:
        raise CheckpointError("the checksum of its length is wrong: the file is damaged")
    if length != len(data) - content_begin:
        raise CheckpointError(
            f"a string of {length} bytes is announced, {len(data) - content_begin} follow"
        )
    if masked_crc32c(summed + data[begin:]) != checksum:
        raise CheckpointError("its checksum is wrong: the file is damaged")
    return data[content_begin:]
