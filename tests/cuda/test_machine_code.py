"""Loops are found in what the disassembler prints."""

from __future__ import annotations

from support.machine_code import Loop, parse

# Two kernels as nvdisasm prints them; in the first a loop in a loop.
LISTING = """
	.section	.text.walk_kernel,"ax",@progbits
	.align	128
.text.walk_kernel:
        /*0000*/                   MOV R1, c[0x0][0x28] ;
.L_x_2:
        /*0010*/                   IADD3 R2, R2, 0x1, RZ ;
.L_x_0:
        /*0020*/              @!P1 LDG.E R4, desc[UR4][R6.64+0x10] ;
        /*0030*/                   BAR.SYNC.DEFER_BLOCKING 0x0 ;
        /*0040*/               @P1 BRA `(.L_x_1) ;
        /*0050*/                   FFMA R3, R4, R4, R3 ;
.L_x_1:
        /*0060*/                   ISETP.GE.AND P0, PT, R2, 0x3, PT ;
        /*0070*/              @!P0 BRA `(.L_x_0) ;
        /*0080*/               @P2 BRA `(.L_x_2) ;
        /*0090*/                   EXIT ;
.L_x_3:
        /*00a0*/                   BRA `(.L_x_3);
        /*00b0*/                   NOP;
	.section	.text.copy_kernel,"ax",@progbits
.text.copy_kernel:
        /*0000*/                   EXIT ;
"""


def test_loops_and_what_they_hold() -> None:
    walk, copy = parse(LISTING)
    assert (walk.name, len(walk.instructions)) == ("walk_kernel", 12)
    assert (copy.name, len(copy.instructions), copy.loops) == ("copy_kernel", 1, ())
    inner, outer = Loop(2, 7), Loop(1, 8)
    assert walk.loops == (inner, outer)
    assert len(inner) == 6
    (barrier,) = walk.find("BAR")
    assert walk.innermost(barrier) == inner
    assert walk.innermost(1) == outer
    assert walk.innermost(9) is None


def test_instructions() -> None:
    walk, _ = parse(LISTING)
    load = walk.instructions[2]
    assert (load.guard, load.opcode, load.name) == ("!P1", "LDG.E", "LDG")
    assert load.operands == "R4, desc[UR4][R6.64+0x10]"
    assert [one.target for one in walk.instructions if one.name == "BRA"] == [6, 2, 1, 10]
