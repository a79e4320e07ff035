"""Counts what a training step of moat_0 issues: the rows of docs/issue_time.csv.

`recorded` runs the step's launchers on meta tensors, `count_launches` compiles what they launch. A
row has the numbers of its launch and a hash of its kernel's sources: a test tells without compiling
whether the file is of these kernels.
"""

from __future__ import annotations

import collections
import functools
import re
import struct
import subprocess
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

import triton

from moat_kernels.plan import TrainingStep
from support import nvcc
from support.compile_only_driver import compile_launches
from support.issue_table import ARCHITECTURE, BATCH, MODEL, RESOLUTION, Issue
from support.machine_code import Function, disassemble
from support.machine_run import UndecidedBranch
from support.step_launches import CudaLaunch, StepLaunch, TritonLaunch, record_step
from support.warp_instructions import LANES, Count, constants, count

# Prints what the launchers of csrc/cuda hand to their kernels; the headers that it needs for that.
PRINTER = Path(__file__).with_name("stencil_launches.cpp")
STAND_INS = Path(__file__).with_name("cuda_on_cpu")
# A block of finish_moments (reduce.cu) sums up so many columns; channels of a block of a stencil.
MOMENT_COLUMNS, MOMENT_THREADS, CHUNK = 32, 256, 64
# An address that nobody follows.
ADDRESS = 1 << 40


@dataclass
class Recorded:
    """A different launch, and how often it is made with stencils of CUDA C++ and of Triton."""

    launch: StepLaunch
    cuda: int = 0
    triton: int = 0


@functools.cache
def recorded(
    model: str = MODEL, resolution: int = RESOLUTION, batch: int = BATCH
) -> tuple[Recorded, ...]:
    """All different launches of a step."""
    found: dict[tuple[str, ...], Recorded] = {}
    for cuda in (True, False):
        step = TrainingStep(model, resolution, "none", architecture=ARCHITECTURE)
        for launch in record_step(step, batch, cuda):
            one = found.setdefault(launch.key, Recorded(launch))
            one.cuda += cuda
            one.triton += not cuda
    return tuple(found.values())


def count_launches(
    chosen: Iterable[Recorded], report: Callable[[str], None] = print
) -> list[Issue]:
    """Compile and count some launches."""
    chosen = list(chosen)
    rows = _count_triton([one for one in chosen if isinstance(one.launch, TritonLaunch)], report)
    return rows + _count_cuda([one for one in chosen if isinstance(one.launch, CudaLaunch)], report)


def _row(one: Recorded, warps: int, counted: Count) -> Issue:
    declared = one.launch.declared
    crossing = (declared.bytes, declared.flops, declared.arithmetic)
    made = compiler(one.launch)
    return Issue(*one.launch.key, one.cuda, one.triton, *crossing, made, warps, **asdict(counted))


def compiler(launch: StepLaunch) -> str:
    """Of a launch, as it is here."""
    if isinstance(launch, TritonLaunch):
        return f"Triton {triton.__version__}"
    return f"nvcc {nvcc.nvcc_version()}"


def countable(chosen: Iterable[Recorded], report: Callable[[str], None] = print) -> list[Issue]:
    """`count_launches` without kernels whose branches cannot be told from a launch's numbers."""
    groups: dict[str, list[Recorded]] = collections.defaultdict(list)
    for one in chosen:
        groups[one.launch.key[0]].append(one)
    rows = []
    for kernel, group in groups.items():
        try:
            rows += count_launches(group, report)
        except UndecidedBranch:
            report(f"{kernel}: left out, a branch depends on what it computes")
    return rows


def _count_triton(chosen: list[Recorded], report: Callable[[str], None]) -> list[Issue]:
    by_code: dict[tuple[str, ...], list[Recorded]] = collections.defaultdict(list)
    for one in chosen:
        assert isinstance(one.launch, TritonLaunch)
        by_code[one.launch.launch.key].append(one)
    first = [group[0].launch.launch for group in by_code.values()]
    rows = []
    for group, compiled in zip(
        by_code.values(), compile_launches(first, ARCHITECTURE), strict=True
    ):
        (function,) = disassemble(compiled.asm["cubin"])
        warps = compiled.metadata.num_warps
        for one in group:
            launch = one.launch
            arguments = _triton_arguments(launch, compiled.asm["ptx"])
            bank = constants(ARCHITECTURE, warps * LANES, launch.grid, arguments)
            rows.append(_row(one, warps, count(function, bank, warps * LANES, launch.grid)))
            report(f"{launch.key[0]} {launch.key[3]}: {rows[-1].instructions}")
    return rows


def _triton_arguments(launch: TritonLaunch, ptx: str) -> bytes:
    """The arguments of a launch as they lie in memory; PTX has those that Triton adds."""
    signature = re.search(r"\.entry \w+\((.*?)\)\s", ptx, re.DOTALL)
    assert signature is not None
    sizes = [int(bits) // 8 for bits in re.findall(r"\.param \.\w(\d+)", signature[1])]
    values = [(kind, launch.launch.values[name]) for name, kind in launch.launch.arguments.items()]
    values += [("*", None)] * (len(sizes) - len(values))
    found = b""
    for size, (kind, value) in zip(sizes, values, strict=True):
        found += bytes(-len(found) % size)
        if kind.startswith("*"):
            found += ADDRESS.to_bytes(size, "little")
        elif kind.startswith("fp"):
            found += struct.pack({4: "<f", 8: "<d"}[size], value)
        else:
            found += int(value).to_bytes(size, "little", signed=True)
    return found


def _count_cuda(chosen: list[Recorded], report: Callable[[str], None]) -> list[Issue]:
    rows = []
    for file in dict.fromkeys(one.launch.file for one in chosen):
        group = [one for one in chosen if one.launch.file == file]
        functions = _cuda_functions(file)
        for one in group:
            blocks, threads, arguments = _cuda_arguments(one.launch)
            function = functions[_cuda_name(one.launch)]
            bank = constants(ARCHITECTURE, threads, (blocks,), arguments)
            rows.append(_row(one, threads // LANES, count(function, bank, threads, (blocks,))))
            report(f"{one.launch.kernel} {one.launch.numbers}: {rows[-1].instructions}")
    return rows


def _cuda_functions(file: str) -> dict[str, Function]:
    cubin = nvcc.compile_cubin(nvcc.CUDA / file, ARCHITECTURE)
    return {nvcc.readable(function.name): function for function in disassemble(cubin)}


def _cuda_name(launch: CudaLaunch) -> str:
    """Of the template's instance, as nvcc.py calls it."""
    if launch.kernel not in nvcc.TRAINED:
        return launch.kernel
    stride = str(launch.numbers[5])
    return f"{launch.kernel}<{', '.join(('bfloat16', *nvcc.TRAINED[launch.kernel], stride))}>"


def _cuda_arguments(launch: CudaLaunch) -> tuple[int, int, bytes]:
    """(blocks, threads of a block, arguments as they lie in memory)."""
    program = _printer(launch.kernel == "depthwise_backward_kernel")
    line = " ".join(map(str, launch.numbers))
    printed = subprocess.run([program], input=line, capture_output=True, text=True, check=True)
    blocks, threads, arguments = printed.stdout.split()
    if launch.kernel != "finish_moments_kernel":
        return int(blocks), int(threads), bytes.fromhex(arguments)
    channels = launch.numbers[8]
    partials = int(blocks) // -(-channels // CHUNK)
    packed = struct.pack("<QqixxxxQ", ADDRESS, partials, channels, ADDRESS)
    return -(-channels // MOMENT_COLUMNS), MOMENT_THREADS, packed


@functools.cache
def _printer(backward: bool) -> Path:
    """stencil_launches.cpp, compiled."""
    target = nvcc.ROOT / "build" / "nvcc" / f"stencil_launches_{int(backward)}"
    target.parent.mkdir(parents=True, exist_ok=True)
    includes = (STAND_INS / "include", STAND_INS, nvcc.ROOT / "csrc")
    sources = (PRINTER, STAND_INS / "block.cpp", STAND_INS / "fiber.cpp")
    command = ["g++", "-std=c++17", "-Wno-unknown-pragmas", *(f"-I{path}" for path in includes)]
    command += ["-DBACKWARD"] if backward else []
    subprocess.run([*command, *map(str, sources), "-o", str(target)], check=True)
    return target
