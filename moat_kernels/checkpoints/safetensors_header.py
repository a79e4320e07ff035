"""The header of a .safetensors file, parsed record by record.

A JSON parser would build objects many times the size of a hostile header before anything could be
checked. Here a record becomes a :class:`TensorPlace` as soon as it is read, of ``__metadata__``
only what this package wrote is kept, and what is counted or measured without bound is limited.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from .errors import CheckpointError

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
    "F8_E8M0": torch.float8_e8m0fnu,
    "C64": torch.complex64,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
METADATA_KEY = "__metadata__"
#: In the metadata: the configurations of the models that the tensors are of.
CONFIGURATION_KEY = "moat_kernels"

# Beyond every real file: MOAT-4 has some 1,300 tensors.
_MAXIMUM_ENTRIES = 1 << 17
_MAXIMUM_NAME_CHARACTERS = _MAXIMUM_RECORD_CHARACTERS = 1 << 12
_MAXIMUM_CONFIGURATION_CHARACTERS = 1 << 16
# Small enough that no product of sizes overflows.
_MAXIMUM_EXTENT_BITS = 48
_SPACES = re.compile(r"[ \t\n\r]*")


@dataclass(frozen=True, slots=True)
class TensorPlace:
    """A checked record of the header; ``begin`` and ``end`` count bytes of the data."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    begin: int
    end: int


@dataclass(frozen=True, slots=True)
class Header:
    """The records of a header in its order, and the text under ``CONFIGURATION_KEY``."""

    places: list[TensorPlace]
    configuration: str | None


def parse_header(header: bytes) -> Header:
    """What ``header`` says.

    Raises:
        CheckpointError: it is not the JSON of a .safetensors header.
    """
    try:
        reader = _Reader(header.decode("utf-8"))
        places = list(_records(reader))
        return Header(places, reader.configuration)
    except CheckpointError:
        raise
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"its header is not valid JSON: {error}") from None


def _records(reader: _Reader) -> Iterator[TensorPlace]:
    if not reader.is_next("{"):
        raise CheckpointError("not a .safetensors file: its header is not a JSON object")
    names: set[str] = set()
    for name in reader.members():
        if len(name) > _MAXIMUM_NAME_CHARACTERS:
            raise CheckpointError(f"its header has a name of {len(name)} characters")
        if name in names:
            raise CheckpointError(f"its header has the key {name!r} twice")
        names.add(name)
        if len(names) > _MAXIMUM_ENTRIES:
            raise CheckpointError(f"its header has more than {_MAXIMUM_ENTRIES} tensors")
        if name == METADATA_KEY:
            _read_metadata(reader)
        elif reader.is_next("{"):
            yield _check_record(name, reader.record(name))
        else:
            raise _not_described(name)
    reader.end()


def _read_metadata(reader: _Reader) -> None:
    """The metadata must map strings to strings; null stands for none. Our own is kept."""
    if reader.accept("null"):
        return
    wrong = CheckpointError(f"{METADATA_KEY} does not map strings to strings")
    if not reader.is_next("{"):
        raise wrong
    for count, name in enumerate(reader.members()):
        if count >= _MAXIMUM_ENTRIES:
            raise CheckpointError(f"{METADATA_KEY} has more than {_MAXIMUM_ENTRIES} keys")
        if not reader.is_next('"'):
            raise wrong
        text = reader.string()
        if name == CONFIGURATION_KEY:
            if len(text) > _MAXIMUM_CONFIGURATION_CHARACTERS:
                raise CheckpointError(f"its configuration has {len(text)} characters")
            reader.configuration = text


def _check_record(name: str, record: dict[str, Any]) -> TensorPlace:
    if not record.keys() >= {"dtype", "shape", "data_offsets"}:
        raise _not_described(name)
    code, shape, offsets = record["dtype"], record["shape"], record["data_offsets"]
    if not isinstance(code, str) or code not in DTYPES:
        raise CheckpointError(f"{name!r} has dtype {code!r}; supported are {', '.join(DTYPES)}")
    if not _are_sizes(shape) or math.prod(max(s, 1) for s in shape) >> _MAXIMUM_EXTENT_BITS:
        raise CheckpointError(f"{name!r} has the impossible shape {shape!r}")
    if not _are_sizes(offsets) or len(offsets) != 2:
        raise CheckpointError(f"{name!r} has the impossible data_offsets {offsets!r}")
    begin, end = offsets
    dtype = DTYPES[code]
    expected = math.prod(shape) * dtype.itemsize
    if end - begin != expected:
        raise CheckpointError(
            f"{name!r}: {code} of shape {shape} takes {expected} bytes, its data_offsets {offsets}"
        )
    return TensorPlace(name, dtype, tuple(shape), begin, end)


def _are_sizes(value: Any) -> bool:
    return isinstance(value, list) and all(type(item) is int and item >= 0 for item in value)


def _not_described(name: str) -> CheckpointError:
    return CheckpointError(f"{name!r} is not described by dtype, shape and data_offsets")


class _Reader:
    """A position in a JSON text; what does not parse raises ValueError."""

    def __init__(self, text: str) -> None:
        self.configuration: str | None = None
        self._text = text
        self._position = 0
        self._decoder = json.JSONDecoder(object_pairs_hook=_without_duplicates)

    def is_next(self, token: str) -> bool:
        spaces = _SPACES.match(self._text, self._position)
        if spaces is not None:
            self._position = spaces.end()
        return self._text.startswith(token, self._position)

    def accept(self, token: str) -> bool:
        found = self.is_next(token)
        self._position += len(token) * found
        return found

    def members(self) -> Iterator[str]:
        """The keys of the object that begins here; the caller reads the value behind each."""
        self._expect("{")
        if self.accept("}"):
            return
        while True:
            name = self.string()
            self._expect(":")
            yield name
            if not self.accept(","):
                break
        self._expect("}")

    def string(self) -> str:
        if not self.is_next('"'):
            raise ValueError(f"expected a string at character {self._position}")
        value: str
        value, self._position = self._decoder.raw_decode(self._text, self._position)
        # Python's JSON has half surrogate pairs ("\\ud800"), UTF-8 has not.
        value.encode("utf-8")
        return value

    def record(self, name: str) -> dict[str, Any]:
        """The object that begins here."""
        text = self._text[self._position : self._position + _MAXIMUM_RECORD_CHARACTERS]
        try:
            value, size = self._decoder.raw_decode(text)
        except ValueError as error:
            if isinstance(error, json.JSONDecodeError) and len(text) < _MAXIMUM_RECORD_CHARACTERS:
                raise
            raise CheckpointError(
                f"{name!r} is not described by valid JSON of at most "
                f"{_MAXIMUM_RECORD_CHARACTERS} characters: {error}"
            ) from None
        self._position += size
        return dict(value)

    def end(self) -> None:
        self.is_next("")
        if self._position != len(self._text):
            raise ValueError(f"more follows at character {self._position}")

    def _expect(self, token: str) -> None:
        if not self.accept(token):
            raise ValueError(f"expected {token!r} at character {self._position}")


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        ((twice, _),) = Counter(key for key, _ in pairs).most_common(1)
        raise CheckpointError(f"its header has the key {twice!r} twice")
    return result
