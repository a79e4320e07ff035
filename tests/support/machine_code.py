"""Machine code of NVIDIA GPUs as text, and the loops in it.

`disassemble` reads a cubin by the disassembler that Triton's wheel brings; instructions are counted
in what it prints, so nothing needs a GPU.
"""

from __future__ import annotations

import functools
import re
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass

_SECTION = re.compile(r"^\s*\.section\s+\.text\.([^,\s]+),", re.MULTILINE)
_LABEL = re.compile(r"^(\.L_\w+|\$[\w$]+):")
_INSTRUCTION = re.compile(
    r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@(?P<guard>!?U?P[\dT]+)\s+)?"
    r"(?P<opcode>[A-Z][\w.]*)\s*(?P<operands>[^;]*?)\s*;"
)
_JUMP = re.compile(r"`\(([^)]+)\)")


@dataclass(frozen=True)
class Instruction:
    """One instruction. guard: the predicate that switches it off, such as "!P0"; empty: none.

    target: where in its function a branch goes; None: no branch, or one that leaves it.
    """

    guard: str
    opcode: str
    operands: str
    target: int | None

    @property
    def name(self) -> str:
        """The opcode without its modifiers."""
        return self.opcode.partition(".")[0]


@dataclass(frozen=True)
class Loop:
    """The instructions from the one that a branch goes back to, to that branch."""

    first: int
    last: int

    def __len__(self) -> int:
        return self.last + 1 - self.first

    def __contains__(self, position: object) -> bool:
        return isinstance(position, int) and self.first <= position <= self.last


@dataclass(frozen=True)
class Function:
    """A kernel, with the subroutines that the compiler put behind it."""

    name: str
    instructions: tuple[Instruction, ...]

    @functools.cached_property
    def loops(self) -> tuple[Loop, ...]:
        """In the order of their ends; an inner loop stands before the one around it."""
        return tuple(
            Loop(one.target, position)
            for position, one in enumerate(self.instructions)
            # Behind its last instruction a function has a branch to itself, which nothing reaches.
            if one.name == "BRA" and one.target is not None and one.target < position
        )

    def innermost(self, position: int) -> Loop | None:
        """The smallest loop around an instruction; None where there is none."""
        around = [loop for loop in self.loops if position in loop]
        return min(around, key=len, default=None)

    def find(self, name: str) -> list[int]:
        """Where the instructions with this opcode, without its modifiers, are."""
        return [i for i, one in enumerate(self.instructions) if one.name == name]


def disassemble(cubin: bytes) -> list[Function]:
    """All kernels of a cubin."""
    from triton import knobs  # only who disassembles needs it

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [knobs.nvidia.nvdisasm.path, "--print-code", file.name]
        return list(parse(subprocess.check_output(command, text=True)))


def parse(listing: str) -> Iterator[Function]:
    """The kernels in what nvdisasm prints."""
    _, *parts = _SECTION.split(listing)
    for name, text in zip(parts[::2], parts[1::2], strict=True):
        labels: dict[str, int] = {}
        found: list[re.Match[str]] = []
        for line in text.splitlines():
            if label := _LABEL.match(line):
                labels[label[1]] = len(found)
            elif instruction := _INSTRUCTION.match(line):
                found.append(instruction)
        yield Function(name, tuple(_instruction(match, labels) for match in found))


def _instruction(match: re.Match[str], labels: dict[str, int]) -> Instruction:
    jump = _JUMP.search(match["operands"])
    target = labels.get(jump[1]) if jump else None
    return Instruction(match["guard"] or "", match["opcode"], match["operands"], target)
