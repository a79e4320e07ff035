"""The built library runs on any CPU of its architecture: wide instructions stay in their place."""

from __future__ import annotations

import platform
import re
import shutil
import subprocess

import pytest
from support.instruction_sets import INSTRUCTION_SETS
from support.native import needs_extension

pytestmark = [
    needs_extension,
    pytest.mark.skipif(
        platform.machine() not in ("x86_64", "AMD64"), reason="about x86-64's instruction sets"
    ),
    pytest.mark.skipif(shutil.which("objdump") is None, reason="no objdump (binutils)"),
]

FUNCTION = re.compile(r"^[0-9a-f]+ <(?P<name>.+)>:$")
# AVX and later are encoded with a VEX or EVEX prefix; their mnemonics begin with v. (verr and verw,
# the two older ones that do, are no instructions of user programs.) Mask registers are AVX-512's.
AVX = re.compile(r"^\s+[0-9a-f]+:\t(\{\w+\} )?v[a-z0-9]+ ")
AVX512 = re.compile(r"%zmm|%k[0-7]|%[xy]mm(1[6-9]|2\d|3[01])\b")
BF16_OR_VNNI = re.compile(r"\t(\{\w+\} )?(vdpbf16ps|vcvtne2?ps2bf16|vpdp(bu|ws)sds?) ")
AMX = re.compile(r"\t(tile(loadd|stored|zero|release)|(ld|st)tilecfg|tdp[a-z0-9]+) ?")
# Mangled names hold the namespace with its length: moat_kernels::cpu::avx2::...
AMX_NAME = "3amx"
AVX512_BF16_NAME = rf"11avx512_bf16|{AMX_NAME}"
AVX512_NAME = rf"6avx512|{AVX512_BF16_NAME}"
AVX2_NAME = rf"4avx2|{AVX512_NAME}"


ORDER = ["", *INSTRUCTION_SETS]


def instruction_set(line: str) -> str:
    """The narrowest set that has the instruction of a line: "" for none of those below."""
    if AMX.search(line):
        return "amx"
    if BF16_OR_VNNI.search(line):
        return "avx512_bf16"
    if AVX512.search(line):
        return "avx512"
    return "avx2" if AVX.match(line) else ""


def instruction_sets_of_functions() -> dict[str, str]:
    """The widest instruction set met in each function of the library: "" for none below."""
    from moat_kernels import _C

    command = ["objdump", "-d", "--no-show-raw-insn", _C.__file__]
    found: dict[str, str] = {}
    name = ""
    for line in subprocess.check_output(command, text=True).splitlines():
        if match := FUNCTION.match(line):
            name = match["name"]
            found[name] = ""
        else:
            found[name] = max(found.get(name, ""), instruction_set(line), key=ORDER.index)
    return found


@pytest.mark.parametrize(
    ("sets", "allowed"),
    [
        (("avx2", "avx512", "avx512_bf16", "amx"), AVX2_NAME),
        (("avx512", "avx512_bf16", "amx"), AVX512_NAME),
        (("avx512_bf16", "amx"), AVX512_BF16_NAME),
        (("amx",), AMX_NAME),
    ],
)
def test_wide_instructions_stay_in_the_functions_of_their_instruction_set(
    sets: tuple[str, ...], allowed: str
) -> None:
    """Also none in a template of std:: that the linker took from a wide object."""
    found = instruction_sets_of_functions()
    assert not {name for name, isa in found.items() if isa in sets and not re.search(allowed, name)}


def test_the_wide_instructions_are_there() -> None:
    found = instruction_sets_of_functions()
    names = {"avx2": "4avx2", "avx512": "6avx512", "avx512_bf16": "11avx512_bf16", "amx": AMX_NAME}
    for isa, name in names.items():
        assert any(found_isa == isa and name in function for function, found_isa in found.items())
