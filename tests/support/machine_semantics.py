"""What integer instructions of sm_80 and sm_90 compute, as far as control flow needs them.

A function for each opcode takes its modifiers and its sources as unsigned numbers, and returns what
it writes: first what goes to a register, then what goes to predicates.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable, Sequence

import numpy as np

WORD = 0xFFFFFFFF
LONG = 0xFFFFFFFFFFFFFFFF

Modifiers = Sequence[str]
Semantics = Callable[[Modifiers, Sequence[int]], Sequence[int]]


def _signed(value: int, bits: int = 32) -> int:
    return value - (1 << bits) if value >> (bits - 1) else value


def _float(bits: int) -> float:
    return struct.unpack("<f", struct.pack("<I", bits & WORD))[0]


def _bits(value: float) -> int:
    return struct.unpack("<I", struct.pack("<f", value))[0]


def _round_up(value: int) -> float:
    """The smallest float32 that is not below."""
    nearest = np.float32(value)
    return float(nearest if int(nearest) >= value else np.nextafter(nearest, np.float32(math.inf)))


def _add(modifiers: Modifiers, sources: Sequence[int]) -> Sequence[int]:
    """A sum, and the carries out of it; negated sources come as 2**32 less themselves."""
    total = sum(sources)
    return total & WORD, int(total > WORD), int(total > 2 * WORD + 1)


def _multiply_add(modifiers: Modifiers, sources: Sequence[int]) -> Sequence[int]:
    a, b, c, *carry = sources
    a, b = a & WORD, b & WORD
    if "HI" in modifiers or "WIDE" in modifiers:
        if "U32" not in modifiers:
            a, b = _signed(a), _signed(b)
        total = a * b + c
        if "HI" in modifiers:
            return (total >> 32) & WORD, int(total > LONG)
        return total & LONG, int(total > LONG)
    total = a * b + c + sum(carry)
    return total & WORD, int(total > WORD)


def _shift_add(modifiers: Modifiers, sources: Sequence[int]) -> Sequence[int]:
    """LEA: a, b, [the upper half of a], the shift, [a carry]."""
    carry = 0
    if "X" in modifiers:
        *sources, carry = sources
    a, b, *upper, shift = (*sources,)
    if "SX32" in modifiers:
        a = _signed(a & WORD)
    elif upper:
        a = (a & WORD) | (upper[0] & WORD) << 32
    shifted = a << shift
    if "HI" in modifiers:
        shifted >>= 32
    total = (shifted & WORD) + b + carry
    return total & WORD, int(total > WORD)


def _lookup(table: int, a: int, b: int, c: int) -> int:
    result = 0
    for index in range(8):
        if table >> index & 1:
            result |= (a if index & 4 else ~a) & (b if index & 2 else ~b) & (c if index & 1 else ~c)
    return result


def _logic(modifiers: Modifiers, sources: Sequence[int]) -> Sequence[int]:
    a, b, c, table = sources[:4]
    result = _lookup(table, a, b, c) & WORD
    return result, int(result != 0)


def _predicate_logic(modifiers: Modifiers, sources: Sequence[int]) -> Sequence[int]:
    a, b, c, *tables = sources
    return [_lookup(table, a, b, c) & 1 for table in tables]


_COMPARE: dict[str, Callable[[int, int], bool]] = {
    "LT": lambda a, b: a < b,
    "LE": lambda a, b: a <= b,
    "GT": lambda a, b: a > b,
    "GE": lambda a, b: a >= b,
    "EQ": lambda a, b: a == b,
    "NE": lambda a, b: a != b,
}


def _compare(modifiers: Modifiers, sources: Sequence[int]) -> Sequence[int]:
    """Whether it is so, and whether not, each and-ed or or-ed with another predicate.

    EX compares upper halves; the last source is what was found of the lower ones.
    """
    a, b, other, *lower = sources
    a, b = a & WORD, b & WORD
    if "U32" not in modifiers:
        a, b = _signed(a), _signed(b)
    result = _COMPARE[modifiers[0]](a, b)
    if "EX" in modifiers and a == b:
        result = bool(lower[0])
    both = (int(result), int(not result))
    return [one | other if "OR" in modifiers else one & other for one in both]


def _shift(modifiers: Modifiers, sources: Sequence[int]) -> Sequence[int]:
    """SHF: the lower half, the shift, the upper half."""
    low, shift, high = (source & WORD for source in sources)
    value = high << 32 | low
    if "L" in modifiers:
        value <<= shift
    else:
        signed = "S32" in modifiers or "S64" in modifiers
        value = (_signed(value, 64) if signed else value) >> min(shift, 63)
    return ((value >> 32 if "HI" in modifiers else value) & WORD,)


def _extend(modifiers: Modifiers, sources: Sequence[int]) -> Sequence[int]:
    value, width = sources
    value &= (1 << width) - 1
    return ((value if "U32" in modifiers else _signed(value, width)) & WORD,)


def _permute(modifiers: Modifiers, sources: Sequence[int]) -> Sequence[int]:
    low, selector, high = (source & WORD for source in sources)
    data = (high << 32 | low).to_bytes(8, "little")
    chosen = []
    for position in range(4):
        nibble = selector >> 4 * position & 0xF
        byte = data[nibble & 7]
        chosen.append((0xFF if byte >> 7 else 0) if nibble & 8 else byte)
    return (int.from_bytes(bytes(chosen), "little"),)


def _minimum(modifiers: Modifiers, sources: Sequence[int]) -> Sequence[int]:
    *sources, is_minimum = sources
    numbers = [source & WORD for source in sources]
    if "U32" not in modifiers:
        numbers = [_signed(number) for number in numbers]
    return ((min if is_minimum else max)(numbers) & WORD,)


def _add_minimum(modifiers: Modifiers, sources: Sequence[int]) -> Sequence[int]:
    a, b, c, is_minimum = sources
    return _minimum(modifiers, (a + b, c, is_minimum))


def _to_float(modifiers: Modifiers, sources: Sequence[int]) -> Sequence[int]:
    (value,) = sources
    if "U32" not in modifiers and "U64" not in modifiers:
        value = _signed(value & WORD)
    return (_bits(_round_up(value)),)


def _to_integer(modifiers: Modifiers, sources: Sequence[int]) -> Sequence[int]:
    value = _float(sources[0])
    most = LONG if "U64" in modifiers else WORD
    return (most if value >= most else max(int(value), 0),)


def _reciprocal(modifiers: Modifiers, sources: Sequence[int]) -> Sequence[int]:
    value = _float(sources[0])
    return (_bits(1 / value if value else math.inf),)


def _first(modifiers: Modifiers, sources: Sequence[int]) -> Sequence[int]:
    return (sources[0],)


def _zero(modifiers: Modifiers, sources: Sequence[int]) -> Sequence[int]:
    return (0,)


def _absolute(modifiers: Modifiers, sources: Sequence[int]) -> Sequence[int]:
    return (abs(_signed(sources[0] & WORD)),)


# Without the "U" of instructions on uniform registers.
SEMANTICS: dict[str, Semantics] = {
    "IADD3": _add,
    "VIADD": _add,
    "IMAD": _multiply_add,
    "LEA": _shift_add,
    "LOP3": _logic,
    "PLOP3": _predicate_logic,
    "ISETP": _compare,
    "SHF": _shift,
    "SGXT": _extend,
    "PRMT": _permute,
    "VIMNMX": _minimum,
    "IMNMX": _minimum,
    "VIADDMNMX": _add_minimum,
    "I2F": _to_float,
    "F2I": _to_integer,
    "MUFU": _reciprocal,
    "MOV": _first,
    "R2UR": _first,
    "LDC": _first,
    "CS2R": _zero,
    "IABS": _absolute,
}
