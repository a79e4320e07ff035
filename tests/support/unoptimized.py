"""Compiles csrc/cpu/isa for the baseline without any inlining, to see every function it shares."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SOURCES = tuple(sorted((ROOT / "csrc" / "cpu" / "isa").glob("*.cpp")))
COMPILER = os.environ.get("CXX", "c++")
# With -O3 nearly all inline functions leave no trace, until a compiler decides otherwise.
FLAGS = ("-std=c++17", "-O0", "-fno-exceptions", "-DMOAT_KERNELS_ISA=baseline")
OWN_NAMESPACE = "12moat_kernels3cpu8baseline"  # mangled


def reason_unavailable() -> str:
    """Why the sources cannot be compiled and their symbols listed; empty if they can."""
    commands = (shlex.split(COMPILER)[0], "nm")
    missing = [command for command in commands if shutil.which(command) is None]
    return f"there is no {' and no '.join(missing)}" if missing else ""


def build(sources: Sequence[Path], directory: Path) -> list[Path]:
    """Their objects, up to date."""
    directory.mkdir(parents=True, exist_ok=True)
    objects = [directory / f"{source.stem}.o" for source in sources]
    flags = shlex.join([*FLAGS, f"-I{ROOT / 'csrc'}"])
    rule = f"rule compile\n  command = {COMPILER} -MD -MF $out.d {flags} -c $in -o $out\n"
    lines = [f"{rule}  depfile = $out.d\n  deps = gcc"]
    lines += [f"build {to}: compile {of}" for of, to in zip(sources, objects, strict=True)]
    (directory / "build.ninja").write_text("\n".join([*lines, ""]))
    command = [sys.executable, "-m", "ninja", "-C", str(directory), "-j2"]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout
    return objects


def shared_symbols(objects: Sequence[Path]) -> list[str]:
    """What the objects define for the linker under names that other instruction sets have too."""
    output = subprocess.check_output(["nm", "--defined-only", *map(str, objects)], text=True)
    # address, kind, name; the kinds of what only the object itself sees are lower case.
    symbols = [fields for line in output.splitlines() if len(fields := line.split()) == 3]
    return sorted(
        {
            name
            for _, kind, name in symbols
            if (kind.isupper() or kind in "uvw") and OWN_NAMESPACE not in name
        }
    )
