"""Following warps through machine code: loops, early ends, and branches on what is unknown."""

from __future__ import annotations

import struct

import pytest
from support.machine_code import Function, parse
from support.machine_run import BLOCK_X, THREAD, Program, Thread, UndecidedBranch
from support.machine_semantics import SEMANTICS
from support.warp_instructions import constants, count

# for (i = 0; i < limit; i += 4) load; blocks from `blocks` on do nothing; lanes from 8 on store
# nothing, and so do those that loaded a negative number.
KERNEL = """
	.section	.text.walk_kernel,"ax",@progbits
        /*0000*/                   S2R R0, SR_CTAID.X ;
        /*0010*/                   ISETP.GE.AND P0, PT, R0, c[0x0][0x214], PT ;
        /*0020*/               @P0 EXIT ;
        /*0030*/                   HFMA2.MMA R2, -RZ, RZ, 0, 0 ;
.L_x_0:
        /*0040*/                   LDG.E R3, desc[UR4][R6.64] ;
        /*0050*/                   IADD3 R2, R2, 0x4, RZ ;
        /*0060*/                   ISETP.GE.AND P1, PT, R2.reuse, c[0x0][0x210], PT ;
        /*0070*/              @!P1 BRA `(.L_x_0) ;
        /*0080*/                   S2R R4, SR_TID.X ;
        /*0090*/                   LOP3.LUT R4, R4, 0x1f, RZ, 0xc0, !PT ;
        /*00a0*/                   ISETP.GE.U32.AND P2, PT, R4, 0x8, PT ;
        /*00b0*/               @P2 EXIT ;
        /*00c0*/                   STG.E desc[UR4][R8.64], R3 ;
        /*00d0*/                   EXIT ;
"""
DATA = KERNEL.replace("ISETP.GE.U32.AND P2, PT, R4, 0x8, PT", "ISETP.LT.AND P2, PT, R3, RZ, PT")
ENDLESS = KERNEL.replace("IADD3 R2, R2, 0x4, RZ", "IADD3 R2, R3, 0x4, RZ")


def kernel(text: str) -> Function:
    (function,) = parse(text)
    return function


def bank(limit: int, blocks: int) -> dict[int, int]:
    return constants(90, 64, (8,), struct.pack("<ii", limit, blocks))


def test_a_thread_is_followed_by_the_launchs_own_numbers() -> None:
    program = Program(kernel(KERNEL), bank(limit=10, blocks=5))
    trace = program.run(Thread(thread=3, x=4))
    assert trace.counts == (1, 1, 1, 1, 3, 3, 3, 3, 1, 1, 1, 1, 1, 1)
    assert trace.depends == THREAD | BLOCK_X
    assert sum(program.run(Thread(thread=40)).counts) == 3 + 1 + 3 * 4 + 4
    assert sum(program.run(Thread(x=5)).counts) == 3


def test_a_launch_is_the_sum_over_its_warps() -> None:
    """Five blocks of two warps go the whole way, as their first lanes do; three end at once."""
    counted = count(kernel(KERNEL), bank(limit=10, blocks=5), 64, (8,))
    assert counted.instructions == 5 * 2 * (4 + 3 * 4 + 6) + 3 * 2 * 3
    assert counted.most == counted.instructions
    assert counted.blocks == 8


def test_of_many_blocks_some_are_followed() -> None:
    counted = count(kernel(KERNEL), bank(limit=10, blocks=1000), 32, (2000,))
    assert counted.blocks == 512
    assert counted.instructions == pytest.approx(1000 * 22 + 1000 * 3, rel=5e-3)


def test_branches_on_data_go_both_ways() -> None:
    function = kernel(DATA)
    with pytest.raises(UndecidedBranch):
        Program(function, bank(10, 5)).run(Thread())
    counted = count(function, bank(limit=10, blocks=8), 32, (8,))
    assert (counted.instructions, counted.most) == (8 * 20, 8 * 22)


def test_a_loop_on_data_is_refused() -> None:
    with pytest.raises(UndecidedBranch):
        count(kernel(ENDLESS), bank(10, 5), 64, (8,))


@pytest.mark.parametrize(
    ("opcode", "sources", "result"),
    [
        ("IADD3.X", (0xFFFFFFFF, 1, 0), (0, 1, 0)),
        ("IADD3", (5, 2**32 - 7, 0), (0xFFFFFFFE, 0, 0)),
        ("IMAD.WIDE", (0xFFFFFFFF, 3, 0), (2**64 - 3, 0)),
        ("IMAD.WIDE.U32", (0xFFFFFFFF, 3, 7), (3 * 0xFFFFFFFF + 7, 0)),
        ("IMAD.HI", (0xFFFFFFFE, 0x40000000, 0), (0xFFFFFFFF, 0)),
        ("LEA.HI", (0x80000000, 4, 0, 1), (5, 0)),
        ("LEA.HI.SX32", (0xFFFFFFF8, 4, 0x1D), (3, 1)),
        ("SHF.R.S32.HI", (0, 2, 0xFFFFFFF8), (0xFFFFFFFE,)),
        ("SHF.R.U64", (4, 2, 3), (0xC0000001,)),
        ("LOP3.LUT", (0b1100, 0b1010, 0, 0xC0, 0), (0b1000, 1)),
        ("PLOP3.LUT", (1, 1, 0, 0x40, 0x80), [1, 0]),
        ("PRMT", (0x03020100, 0x7610, 0x07060504), (0x07060100,)),
        ("SGXT", (0xF0, 8), (0xFFFFFFF0,)),
        ("ISETP.LT.AND", (0xFFFFFFFF, 0, 1), [1, 0]),
        ("ISETP.LT.U32.AND.EX", (4, 4, 1, 1), [1, 0]),
        ("VIMNMX", (0xFFFFFFFF, 3, 0), (3,)),
        ("F2I.FTZ.U32.TRUNC.NTZ", (0x40600000,), (3,)),
    ],
)
def test_semantics(opcode: str, sources: tuple[int, ...], result: tuple[int, ...]) -> None:
    name, *modifiers = opcode.split(".")
    assert SEMANTICS[name](modifiers, sources) == result
