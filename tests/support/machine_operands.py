"""What an instruction of a GPU reads and writes: registers as places in a list."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

from support.machine_code import Instruction
from support.machine_semantics import SEMANTICS

# Places: general registers first, then uniform ones, then the predicates of both.
UNIFORM, PREDICATES, UNIFORM_PREDICATES, PLACES = 256, 512, 520, 528
_FIRST = {"R": 0, "UR": UNIFORM, "P": PREDICATES, "UP": UNIFORM_PREDICATES}

REGISTER = re.compile(r"^(?P<sign>[-~!])?(?P<kind>UR|UP|R|P)(?P<number>\d+|Z|T)(?P<rest>[.\w]*)$")
# Columns of a warp group's product.
_PRODUCT = re.compile(r"^64x(\d+)x\d+$")
# Instructions that Program executes in ways of their own.
OTHERS = ("S2R", "SEL", "P2R", "R2P", "HFMA2", "VOTE")
_SAME = {"S2UR": "S2R", "VOTEU": "VOTE"}
_TWO_PREDICATES = ("ISETP", "PLOP3", "FSETP", "DSETP", "HSETP2")


def plain(one: Instruction) -> tuple[str, list[str]]:
    """The opcode without the "U" of instructions on uniform registers, and its modifiers."""
    name, *modifiers = one.opcode.split(".")
    return _SAME.get(name, name.removeprefix("U")), modifiers


def is_known(name: str, modifiers: Sequence[str]) -> bool:
    """Whether there are semantics of an instruction."""
    needed = {"I2F": "RP", "F2I": "TRUNC", "MUFU": "RCP"}.get(name)
    return name in SEMANTICS and (needed is None or needed in modifiers)


def is_pair(name: str, modifiers: Sequence[str], source: int) -> bool:
    """Whether a source is 64 bits wide."""
    if name == "IMAD":
        return source == 2 and ("WIDE" in modifiers or "HI" in modifiers)
    return (name == "LDC" and "64" in modifiers) or (name == "I2F" and "U64" in modifiers)


def is_jump(one: Instruction) -> bool:
    return one.name in ("BRA", "EXIT", "CALL", "RET")


def conditions(one: Instruction) -> list[str]:
    """Predicates that must hold for a jump."""
    return re.findall(r"!?\bU?P[\dT]+", f"{one.guard} {one.operands.partition('`')[0]}")


def place(match: re.Match[str]) -> int | None:
    """Where a register is; None: it reads as zero or true, and forgets what is written."""
    number = match["number"]
    return _FIRST[match["kind"]] + int(number) if number.isdigit() else None


def _operands(text: str) -> list[str]:
    return [one.strip().replace(".reuse", "") for one in text.split(",")] if text else []


def _split(one: Instruction) -> tuple[list[str], list[str]]:
    """Operands that are written, and those that are read."""
    operands = _operands(one.operands)
    name, _ = plain(one)
    if name in _TWO_PREDICATES:
        return operands[:2], operands[2:]
    if name == "VOTE":
        return operands[:-1], operands[-1:]
    if name == "R2P":
        return [], operands
    written, registers = 0, 0
    for text in operands:
        match = REGISTER.match(text)
        if match is None or match["sign"] or match["rest"]:
            break
        registers += match["kind"] in ("R", "UR")
        if registers > 1:
            break
        written += 1
    return operands[:written], operands[written:]


def sources(one: Instruction) -> list[str]:
    """Operands that are read."""
    return _split(one)[1]


def _width(one: Instruction) -> int:
    """Registers that the destination takes."""
    name, modifiers = plain(one)
    for text in modifiers:
        if name == "HGMMA" and (product := _PRODUCT.match(text)):
            return int(product[1]) // 2
    if name in ("HMMA", "LDSM") or "128" in modifiers:
        return 4
    wide = "WIDE" in modifiers or "64" in modifiers or (name == "F2I" and "U64" in modifiers)
    return 2 if wide or (name == "CS2R" and "32" not in modifiers) else 1


def written(one: Instruction) -> list[tuple[int, int]]:
    """(place, result) of all that an instruction writes; -1: the upper half of the first result."""
    if one.name == "R2P":
        mask = int(_operands(one.operands)[2], 16)
        return [(PREDICATES + bit, 0) for bit in range(7) if mask >> bit & 1]
    matches = [match for text in _split(one)[0] if (match := REGISTER.match(text))]
    registers = [match for match in matches if match["kind"] in ("R", "UR")]
    found = []
    for match in registers:
        first = place(match)
        if first is not None:
            found += [(first + i, -1 if i else 0) for i in range(_width(one))]
    predicates = [match for match in matches if match not in registers]
    for result, match in enumerate(predicates, start=len(registers)):
        predicate = place(match)
        if predicate is not None:
            found.append((predicate, result))
    return found


def read(one: Instruction) -> Iterator[int]:
    """Places from which what an instruction does follows, as far as it is known."""
    name, modifiers = plain(one)
    texts = [(text, False) for text in ([one.guard] if one.guard else [])]
    if is_jump(one):
        texts += [(text, False) for text in conditions(one)]
        if one.name == "RET":
            texts.append((one.operands.split()[0], False))
    elif name in OTHERS or is_known(name, modifiers):
        texts += [
            (text, is_pair(name, modifiers, position)) for position, text in enumerate(sources(one))
        ]
    if name == "P2R":
        yield from range(PREDICATES, PREDICATES + 7)
    for text, pair in texts:
        match = REGISTER.match(text)
        first = None if match is None else place(match)
        if first is not None:
            yield first
            if pair:
                yield first + 1
