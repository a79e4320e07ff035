"""Variable-length integers and protocol-buffer messages, as far as TensorFlow's indices need them.

Bytes that do not parse raise :class:`CheckpointError`; the callers add the name of the file.
"""

from __future__ import annotations

from collections.abc import Container, Iterator
from typing import Any, cast

from .errors import CheckpointError

# Protocol buffers' wire types.
VARINT, FIXED64, BYTES, FIXED32 = 0, 1, 2, 5
_FIXED_SIZES = {FIXED64: 8, FIXED32: 4}


def read_varint(data: bytes, position: int) -> tuple[int, int]:
    """The unsigned 64-bit integer at ``position``, and the position behind it."""
    if position < len(data) and data[position] < 0x80:
        return data[position], position + 1
    value = 0
    for shift in range(0, 70, 7):
        if position >= len(data):
            raise CheckpointError("a variable-length integer is cut off")
        byte = data[position]
        position += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            if value >> 64:
                break
            return value, position
    raise CheckpointError("a variable-length integer has more than 64 bits")


def take_bytes(data: bytes, position: int, size: int) -> tuple[bytes, int]:
    """``size`` bytes from ``position``, and the position behind them."""
    end = position + size
    if end > len(data):
        raise CheckpointError(f"{size} bytes are announced where {len(data) - position} are left")
    return data[position:end], end


def signed(value: int) -> int:
    """A protocol-buffer int64 from its unsigned representation."""
    return value - (1 << 64) if value >> 63 else value


class Message:
    """The fields of one protocol-buffer message, typed when they are asked for.

    Unknown fields are kept and never looked at, as protocol buffers prescribe.
    """

    def __init__(self, data: bytes) -> None:
        self._fields: dict[int, list[tuple[int, Any]]] = {}
        for number, wire_type, value in _fields(data):
            self._fields.setdefault(number, []).append((wire_type, value))

    def integer(self, number: int, wire_type: int = VARINT) -> int:
        """The last value of an unsigned integer field; 0 where it is absent."""
        values = self._values(number, wire_type)
        return values[-1] if values else 0

    def messages(self, number: int) -> list[Message]:
        """All values of a repeated message field."""
        return [Message(value) for value in self._values(number, BYTES)]

    def text(self, number: int) -> str:
        """The last value of a string field; empty where it is absent."""
        values = self._values(number, BYTES)
        try:
            return values[-1].decode("utf-8") if values else ""
        except UnicodeDecodeError:
            raise CheckpointError(f"field {number} is not text: {values[-1][:80]!r}") from None

    def _values(self, number: int, expected: int) -> list[Any]:
        values = self._fields.get(number, [])
        for wire_type, _ in values:
            _check_wire_type(number, wire_type, expected)
        return [value for _, value in values]


def each_message(data: bytes, numbers: Container[int]) -> Iterator[tuple[int, bytes]]:
    """The bytes of the messages in the fields ``numbers``, one at a time, with their numbers.

    Unlike :class:`Message` it keeps nothing, which counts where a message has very many.
    """
    for number, wire_type, value in _fields(data):
        if number in numbers:
            _check_wire_type(number, wire_type, BYTES)
            yield number, cast(bytes, value)


def _check_wire_type(number: int, wire_type: int, expected: int) -> None:
    if wire_type != expected:
        raise CheckpointError(f"field {number} has wire type {wire_type}, expected {expected}")


def _fields(data: bytes) -> Iterator[tuple[int, int, int | bytes]]:
    position = 0
    while position < len(data):
        tag, position = read_varint(data, position)
        number, wire_type = tag >> 3, tag & 7
        if wire_type == VARINT:
            integer, position = read_varint(data, position)
            yield number, wire_type, integer
        elif wire_type == BYTES:
            size, position = read_varint(data, position)
            content, position = take_bytes(data, position, size)
            yield number, wire_type, content
        elif wire_type in _FIXED_SIZES:
            content, position = take_bytes(data, position, _FIXED_SIZES[wire_type])
            yield number, wire_type, int.from_bytes(content, "little")
        else:
            raise CheckpointError(f"field {number} has the unsupported wire type {wire_type}")
