"""Compiles csrc/cpu/isa for 64-bit Arm and runs them under QEMU, without PyTorch there."""

from __future__ import annotations

import functools
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

HERE = Path(__file__).parent
ROOT = HERE.parent.parent.parent
KERNELS = tuple(sorted((ROOT / "csrc" / "cpu" / "isa").glob("*.cpp")))
COMPILER, EMULATOR = "aarch64-linux-gnu-g++", "qemu-aarch64"
# Those of build_support/flags.py that decide about instructions. Its -O3 takes twice the time.
FLAGS = (
    *("-std=c++17", "-O2", "-ffp-contract=fast", "-fno-math-errno"),
    *("-Wall", "-Wextra", "-Werror", "-DMOAT_KERNELS_ISA=baseline", f"-I{ROOT / 'csrc'}"),
)
# As in csrc/cpu/common/types.h.
ELEMENT_TYPES = (torch.float32, torch.bfloat16, torch.float16)


def reason_unavailable() -> str:
    """Why the kernels cannot be compiled and run; empty if they can."""
    missing = [command for command in (COMPILER, EMULATOR) if not shutil.which(command)]
    packages = "packages g++-aarch64-linux-gnu and qemu-user on Debian and Ubuntu"
    return f"no {' and no '.join(missing)} ({packages})" if missing else ""


def _ninja_file() -> str:
    lines = [
        "rule compile",
        f"  command = {COMPILER} -MD -MF $out.d {' '.join(FLAGS)} -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "rule link",
        f"  command = {COMPILER} -static $in -o $out",
    ]
    objects = [f"{source.stem}.o" for source in KERNELS]
    for source, target in zip(KERNELS, objects, strict=True):
        lines.append(f"build {target}: compile {source}")
    lines.append(f"build driver.o: compile {HERE / 'driver.cpp'}")
    lines.append(f"build driver: link driver.o {' '.join(objects)}")
    return "\n".join([*lines, ""])


@functools.cache
def build() -> Path:
    """The folder with `driver` and the object of each kernel file, up to date."""
    directory = ROOT / "build" / "aarch64"
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "build.ninja").write_text(_ninja_file())
    command = [sys.executable, "-m", "ninja", "-C", str(directory), "-j2", "driver"]
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
        raise RuntimeError(f"compiling the kernels for aarch64 failed:\n{result.stdout}")
    return directory


def disassemble(kernel: str) -> str:
    """The instructions of csrc/cpu/isa/<kernel>.cpp."""
    command = ["aarch64-linux-gnu-objdump", "-d", "--no-show-raw-insn", f"{kernel}.o"]
    return subprocess.check_output(command, cwd=build(), text=True)


def run(
    op: str,
    numbers: Sequence[float],
    tensors: Sequence[Tensor],
    results: Sequence[tuple[Sequence[int], torch.dtype]],
) -> list[Tensor]:
    """What driver.cpp computes; results: shape and dtype of what it writes, in order."""
    command = [EMULATOR, str(build() / "driver"), op, *map(str, numbers)]
    given = b"".join(_bytes(tensor) for tensor in tensors)
    written = subprocess.run(command, input=given, capture_output=True, check=True).stdout
    found = []
    for shape, dtype in results:
        size = torch.Size(shape).numel() * dtype.itemsize
        found.append(torch.frombuffer(bytearray(written[:size]), dtype=dtype).view(*shape))
        written = written[size:]
    assert not written
    return found


def _bytes(tensor: Tensor) -> bytes:
    return tensor.detach().contiguous().view(torch.uint8).numpy().tobytes()
