"""CRC-32C: published values, and the definition at every kind of length."""

from __future__ import annotations

import random

import numpy as np
import pytest

from moat_kernels.checkpoints.crc32c import crc32c, masked_crc32c

ROW_BYTES = 1 << 16


def crc32c_by_definition(data: bytes) -> int:
    register = 0xFFFFFFFF
    for byte in data:
        register ^= byte
        for _ in range(8):
            register = (register >> 1) ^ (0x82F63B78 if register & 1 else 0)
    return register ^ 0xFFFFFFFF


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        (b"", 0),
        (b"a", 0xC1D04330),
        (b"123456789", 0xE3069283),
        (bytes(32), 0x8A9136AA),
        (b"\xff" * 32, 0x62A8AB43),
        (bytes(range(32)), 0x46DD794E),
        (bytes(reversed(range(32))), 0x113FDB5C),
    ],
)
def test_published_values(message: bytes, expected: int) -> None:
    # The check value of the CRC catalogue and the examples of RFC 3720, B.4.
    assert crc32c(message) == expected


@pytest.mark.parametrize("excess", [-5, -1, 0, 1, 4, 7])
@pytest.mark.parametrize("rows", [1, 2])
def test_lengths_around_whole_rows(rows: int, excess: int) -> None:
    message = random.Random(excess).randbytes(rows * ROW_BYTES + excess)
    assert crc32c(message) == crc32c_by_definition(message)


def test_every_short_length() -> None:
    message = random.Random(0).randbytes(70)
    for size in range(len(message)):
        assert crc32c(message[:size]) == crc32c_by_definition(message[:size])


def test_arrays_are_read_as_their_bytes() -> None:
    array = np.arange(12, dtype="<f4").reshape(3, 4)
    assert crc32c(array) == crc32c(array.tobytes()) == crc32c(memoryview(array.tobytes()))


def test_mask() -> None:
    # LevelDB's definition: rotate right by 15 bits, add a constant.
    crc = crc32c(b"foo")
    assert masked_crc32c(b"foo") == ((crc >> 15 | crc << 17) + 0xA282EAD8) % (1 << 32)
    assert masked_crc32c(b"foo") != crc
