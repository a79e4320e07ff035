"""Runs the part of machine code that decides which instructions a warp issues.

Where a branch goes follows from a launch's numbers, the block's index and the thread's, by integer
instructions; `Program.run` executes these. What comes from memory is unknown, and so is all that is
computed of it, and whatever an instruction writes that has no semantics here. A branch on something
unknown is an error, unless the caller says which way it goes.
"""

from __future__ import annotations

import collections
import struct
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from support.machine_code import Function, Instruction
from support.machine_operands import (
    PLACES,
    PREDICATES,
    REGISTER,
    conditions,
    is_jump,
    is_known,
    is_pair,
    place,
    plain,
    read,
    sources,
    written,
)
from support.machine_semantics import SEMANTICS, WORD

# What a value depends on, as bits of its mask: the thread's index, the block's.
THREAD, BLOCK_X, BLOCK_Y, BLOCK_Z = 1, 2, 4, 8
# A number with its mask; None: unknown.
Value = tuple[int, int] | None
State = list[Value]
Read = Callable[[State], Value]
Act = Callable[[State], None]

INSTRUCTION_BYTES = 16
# No warp of these kernels issues as many: who does is in a loop that does not end.
MOST_INSTRUCTIONS = 10_000_000

_SPECIAL = ("SR_TID.X", "SR_CTAID.X", "SR_CTAID.Y", "SR_CTAID.Z")
# Blocks have one dimension, and none is in a cluster.
_ZERO = ("SR_TID.Y", "SR_TID.Z", "SR_CgaCtaId")


class UndecidedBranch(Exception):
    """A branch depends on what is unknown."""


@dataclass(frozen=True)
class Thread:
    """Whose instructions are followed: its index in the block, and the block's in the grid."""

    thread: int = 0
    x: int = 0
    y: int = 0
    z: int = 0


@dataclass(frozen=True)
class Trace:
    """How often each instruction was issued, and what the branches depended on (a mask)."""

    counts: tuple[int, ...]
    depends: int


class Program:
    """A kernel, ready to be run for any thread.

    constants: the bytes of its first constant bank, by offset, which hold its arguments.
    """

    def __init__(self, function: Function, constants: Mapping[int, int]) -> None:
        self.function = function
        self._constants = constants
        self._special: dict[str, Value] = {}
        code = function.instructions
        needed = _deciding(function)
        self._steps = [
            self._step(one) if position in needed else None for position, one in enumerate(code)
        ]
        self._jumps = [position for position, one in enumerate(code) if is_jump(one)]
        self._conditions = {
            position: [self._read(text) for text in conditions(code[position])]
            for position in self._jumps
        }
        self._stretches: dict[int, tuple[int, list[Act]]] = {}
        self._ways: dict[frozenset[tuple[tuple[int, int], int]], tuple[int, ...]] = {}

    def run(self, thread: Thread, unknown: bool | None = None) -> Trace:
        """Follow a thread to its end.

        unknown: whether what is unknown holds, where a branch depends on it; None: an error.
        """
        indices = (thread.thread, thread.x, thread.y, thread.z)
        self._special = {
            name: (index, 1 << bit)
            for bit, (name, index) in enumerate(zip(_SPECIAL, indices, strict=True))
        } | {name: (0, 0) for name in _ZERO}
        # Of some registers bits are set one by one; those that nobody set are not used.
        state: State = [(0, 0)] * PLACES
        visits: collections.Counter[tuple[int, int]] = collections.Counter()
        position: int | None = 0
        depends, issued = 0, 0
        while position is not None:
            jump, steps = self._stretch(position)
            for step in steps:
                step(state)
            visits[position, jump] += 1
            issued += jump + 1 - position
            if issued > MOST_INSTRUCTIONS:
                raise RuntimeError(f"{self.function.name} does not end")
            taken = True
            for condition in self._conditions[jump]:
                value = condition(state)
                if value is None:
                    value = self._decide(jump, unknown), 0
                depends |= value[1]
                taken = taken and bool(value[0])
            position = self._follow(jump, state) if taken else jump + 1
        return Trace(self._counted(visits), depends)

    def _decide(self, jump: int, unknown: bool | None) -> int:
        target = self.function.instructions[jump].target
        # Not in a loop: how often it runs never is a matter of data.
        if unknown is None or (target is not None and target <= jump):
            raise UndecidedBranch(f"{self.function.name}, instruction {jump}")
        return int(unknown)

    def _counted(self, visits: Mapping[tuple[int, int], int]) -> tuple[int, ...]:
        """How often each instruction was issued; the same object for the same way."""
        way = frozenset(visits.items())
        if way not in self._ways:
            counts = [0] * len(self.function.instructions)
            for (first, last), times in visits.items():
                for position in range(first, last + 1):
                    counts[position] += times
            self._ways[way] = tuple(counts)
        return self._ways[way]

    def _stretch(self, position: int) -> tuple[int, list[Act]]:
        """The next jump, and what is to be done before it."""
        if position not in self._stretches:
            jump = next(jump for jump in self._jumps if jump >= position)
            steps = [step for step in self._steps[position:jump] if step is not None]
            self._stretches[position] = jump, steps
        return self._stretches[position]

    def _follow(self, jump: int, state: State) -> int | None:
        """Where a jump goes; None: the thread ends."""
        one = self.function.instructions[jump]
        if one.name == "EXIT":
            return None
        if one.name == "RET":
            address = self._read(one.operands.split()[0])(state)
            if address is None:
                raise UndecidedBranch(f"{self.function.name}, return at {jump}")
            return address[0] // INSTRUCTION_BYTES
        assert one.target is not None, f"{self.function.name}: a jump to {one.operands}"
        return one.target

    def _read(self, text: str, pair: bool = False) -> Read:
        """How an operand is read; `pair`: with the register that follows, as 64 bits."""
        match = REGISTER.match(text)
        if match is None:
            known = self._literal(text, 8 if pair else 4)
            return lambda state: known
        if match["rest"]:
            return lambda state: None
        where, sign = place(match), match["sign"]
        if match["kind"] in ("P", "UP"):
            flip = int(sign == "!")
            fixed = (1 - flip, 0)
            return lambda state: fixed if where is None else _flipped(state[where], flip)
        if where is None:
            return lambda state: _signed((0, 0), sign)
        if pair:
            return lambda state: _joined(state[where], state[where + 1])
        if sign:
            return lambda state: _signed(state[where], sign)
        return lambda state: state[where]

    def _literal(self, text: str, size: int) -> Value:
        """A number, or a constant such as c[0x0][0x210]; None: neither."""
        if text == "SRZ":
            return 0, 0
        if text.startswith("c[0x0][0x") and text.count("[") == 2:
            offset = int(text[7:-1], 16)
            found = [self._constants.get(offset + i) for i in range(size)]
            known = [byte for byte in found if byte is not None]
            return (int.from_bytes(bytes(known), "little"), 0) if len(known) == size else None
        try:
            return int(text, 16) & WORD, 0
        except ValueError:
            return None

    def _step(self, one: Instruction) -> Act:
        """What executes an instruction."""
        act = self._action(one)
        if not one.guard:
            return act
        guard, places = self._read(one.guard), [where for where, _ in written(one)]

        def guarded(state: State) -> None:
            value = guard(state)
            before = [state[where] for where in places]
            if value is None or value[0]:
                act(state)
            for where, old in zip(places, before, strict=True):
                new = state[where]
                if value is None:
                    state[where] = new if new == old else None
                elif value[1] and new is not None:
                    state[where] = new[0], new[1] | value[1]

        return guarded

    def _action(self, one: Instruction) -> Act:
        name, modifiers = plain(one)
        targets, texts = written(one), sources(one)
        places = [where for where, _ in targets]
        if name == "S2R":
            return lambda state: _set(state, places[0], self._special.get(texts[0]))
        if name == "VOTE" and len(texts) == len(places) == 1:
            return _vote(places[0], self._read(texts[0]))
        if name == "SEL":
            return _select(places[0], *(self._read(text) for text in texts))
        if name == "P2R":
            return _collect(places[0], self._read(texts[1]), int(texts[2], 16))
        if name == "R2P":
            return _scatter(self._read(texts[1]), int(texts[2], 16))
        if name == "HFMA2" and texts[:2] == ["-RZ", "RZ"]:
            # How small constants are loaded: two halves.
            halves = struct.pack("<2e", float(texts[3]), float(texts[2]))
            constant = int.from_bytes(halves, "little"), 0
            return lambda state: _set(state, places[0], constant)
        if not is_known(name, modifiers):
            return lambda state: _forget(state, places)
        semantics = SEMANTICS[name]
        reads = [
            self._read(text, pair=is_pair(name, modifiers, position))
            for position, text in enumerate(texts)
        ]

        def act(state: State) -> None:
            numbers, mask = [], 0
            for one_read in reads:
                value = one_read(state)
                if value is None:
                    return _forget(state, places)
                numbers.append(value[0])
                mask |= value[1]
            results = semantics(modifiers, numbers)
            for where, source in targets:
                result = results[0] >> 32 if source < 0 else results[source]
                state[where] = result & WORD, mask
            return None

        return act


def _set(state: State, where: int, value: Value) -> None:
    state[where] = value


def _forget(state: State, places: Iterable[int]) -> None:
    for where in places:
        state[where] = None


def _flipped(value: Value, flip: int) -> Value:
    return None if value is None else (value[0] ^ flip, value[1])


def _signed(value: Value, sign: str | None) -> Value:
    """A number or its complement; a negated one is not masked, so that a sum with it carries."""
    if value is None or not sign:
        return value
    return (2**32 - value[0] if sign == "-" else value[0] ^ WORD), value[1]


def _joined(low: Value, high: Value) -> Value:
    if low is None or high is None:
        return None
    return high[0] << 32 | low[0], high[1] | low[1]


def _select(where: int, first: Read, second: Read, condition: Read) -> Act:
    def act(state: State) -> None:
        chosen = condition(state)
        value = None if chosen is None else (first if chosen[0] else second)(state)
        state[where] = None
        if chosen is not None and value is not None:
            state[where] = value[0] & WORD, value[1] | chosen[1]

    return act


def _vote(where: int, read: Read) -> Act:
    """ANY or ALL: where lanes cannot differ, what one of them finds."""

    def act(state: State) -> None:
        value = read(state)
        state[where] = None if value is None or value[1] & THREAD else value

    return act


def _collect(where: int, base: Read, mask: int) -> Act:
    """P2R: predicates as bits of a register."""
    chosen = [bit for bit in range(7) if mask >> bit & 1]

    def act(state: State) -> None:
        found = base(state)
        for bit in chosen:
            one = state[PREDICATES + bit]
            if found is None or one is None:
                found = None
                break
            found = found[0] & ~(1 << bit) | one[0] << bit, found[1] | one[1]
        state[where] = found

    return act


def _scatter(source: Read, mask: int) -> Act:
    """R2P: bits of a register as predicates."""

    def act(state: State) -> None:
        value = source(state)
        for bit in range(7):
            if mask >> bit & 1:
                known = None if value is None else (value[0] >> bit & 1, value[1])
                state[PREDICATES + bit] = known

    return act


def _deciding(function: Function) -> set[int]:
    """Instructions that write something from which the condition of a later jump follows.

    Registers are bits of a number; those that matter behind an instruction are carried backwards.
    """
    code = function.instructions
    writes = [_mask(where for where, _ in written(one)) for one in code]
    reads = [_mask(read(one)) for one in code]
    following = [_following(function, position) for position in range(len(code))]
    matters = [0] * (len(code) + 1)  # before each instruction
    changed = True
    while changed:
        changed = False
        for position in reversed(range(len(code))):
            before = 0
            for after in following[position]:
                before |= matters[after]
            if is_jump(code[position]):
                before |= reads[position]
            elif writes[position] & before:
                if not code[position].guard:
                    before &= ~writes[position]
                before |= reads[position]
            if before != matters[position]:
                matters[position], changed = before, True
    return {
        position
        for position, one in enumerate(code)
        if not is_jump(one)
        and any(writes[position] & matters[after] for after in following[position])
    }


def _mask(places: Iterable[int]) -> int:
    mask = 0
    for where in places:
        mask |= 1 << where
    return mask


def _following(function: Function, position: int) -> list[int]:
    """Where a thread may be after an instruction."""
    one = function.instructions[position]
    if one.name == "RET":
        return [call + 1 for call in function.find("CALL")]
    found = [one.target] if is_jump(one) and one.target is not None else []
    if one.name not in ("EXIT", "BRA", "CALL") or conditions(one):
        found.append(position + 1)
    return found
