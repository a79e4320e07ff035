"""Variable-length integers and protocol-buffer messages, whole and malformed."""

from __future__ import annotations

import pytest
from checkpoints.bundle_writer import bytes_field, fixed32_field, integer_field, varint

from moat_kernels.checkpoints import CheckpointError
from moat_kernels.checkpoints.wire import FIXED32, Message, each_message, read_varint, signed


@pytest.mark.parametrize("value", [0, 1, 127, 128, 300, 1 << 35, (1 << 64) - 1])
def test_varints(value: int) -> None:
    assert read_varint(b"x" + varint(value) + b"y", 1) == (value, 1 + len(varint(value)))


@pytest.mark.parametrize("data", [b"", b"\x80", b"\xff" * 9])
def test_a_varint_that_is_cut_off(data: bytes) -> None:
    with pytest.raises(CheckpointError, match="cut off"):
        read_varint(data, 0)


@pytest.mark.parametrize("data", [b"\xff" * 9 + b"\x02", b"\xff" * 30])
def test_a_varint_beyond_64_bits(data: bytes) -> None:
    with pytest.raises(CheckpointError, match="64 bits"):
        read_varint(data, 0)


def test_negative_integers_are_twos_complement() -> None:
    message = Message(integer_field(1, -3))
    assert signed(message.integer(1)) == -3
    assert signed(5) == 5


def test_fields_of_a_message() -> None:
    message = Message(
        integer_field(1, 7)
        + integer_field(1, 8)
        + bytes_field(2, integer_field(1, 1))
        + bytes_field(2, integer_field(1, 2))
        + fixed32_field(3, 0xDEADBEEF)
        + bytes_field(200, b"unknown")
    )
    assert message.integer(1) == 8, "the last value counts"
    assert [inner.integer(1) for inner in message.messages(2)] == [1, 2]
    assert message.integer(3, FIXED32) == 0xDEADBEEF
    assert message.integer(4) == 0
    assert message.messages(4) == []


@pytest.mark.parametrize(
    ("data", "complaint"),
    [
        (bytes_field(1, b"abc")[:-1], "3 bytes are announced where 2 are left"),
        (b"\x0a" + varint(1 << 60), "bytes are announced"),
        (b"\x0d\x00\x00", "4 bytes are announced"),
        (b"\x0b", "unsupported wire type 3"),
    ],
)
def test_malformed_messages(data: bytes, complaint: str) -> None:
    with pytest.raises(CheckpointError, match=complaint):
        Message(data)


def test_a_field_of_the_wrong_type() -> None:
    with pytest.raises(CheckpointError, match="field 1 has wire type 2, expected 0"):
        Message(bytes_field(1, b"")).integer(1)


def test_text() -> None:
    message = Message(
        bytes_field(1, b"a") + bytes_field(1, "\u00fc".encode()) + bytes_field(2, b"\xff")
    )
    assert (message.text(1), message.text(3)) == ("\u00fc", "")
    with pytest.raises(CheckpointError, match=r"field 2 is not text: b'\\xff'"):
        message.text(2)


def test_messages_one_at_a_time() -> None:
    data = bytes_field(1, b"a") + integer_field(2, 7) + bytes_field(3, b"b") + bytes_field(1, b"c")
    assert list(each_message(data, (1, 3))) == [(1, b"a"), (3, b"b"), (1, b"c")]
    with pytest.raises(CheckpointError, match="field 2 has wire type 0, expected 2"):
        list(each_message(data, (2,)))
