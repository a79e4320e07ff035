"""Compiles csrc/cuda with g++ into a library that runs the kernels on the host (see block.h)."""

from __future__ import annotations

import functools
import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from types import ModuleType

import torch
from torch.utils.cpp_extension import include_paths

HERE = Path(__file__).parent
ROOT = HERE.parent.parent.parent
EMULATION = (HERE / "block.cpp", HERE / "fiber.cpp")
KERNELS = (
    *sorted((ROOT / "csrc" / "cuda").glob("*.cu")),
    ROOT / "csrc" / "cuda" / "binding.cpp",
    HERE / "host_stream.cpp",
)
HARNESS = HERE / "harness.cpp"
# The stable ABI of the oldest torch that setup.py builds for.
TORCH_TARGET_VERSION = (2 << 56) | (11 << 48)
FLAGS = (
    "-std=c++17",
    "-O1",
    "-fPIC",
    "-fvisibility=hidden",
    # The kernels read packs of elements as other types of the same size, as CUDA code does.
    "-fno-strict-aliasing",
    "-Wall",
    "-Wextra",
    "-Wno-unknown-pragmas",
    f"-DTORCH_TARGET_VERSION={TORCH_TARGET_VERSION:#018x}",
    "-DMOAT_KERNELS_CUDA_KEY=CPU",
)
SANITIZERS = ("-g1", "-fsanitize=address,bounds", "-fno-sanitize-recover=all")
VARIANTS: dict[str, tuple[str, ...]] = {"plain": (), "sanitized": SANITIZERS}
# Tells a process started by `run_sanitized` which build to load.
VARIANT_VARIABLE = "CUDA_ON_CPU_VARIANT"


def reason_unavailable() -> str:
    """Why the library cannot be built here; empty if it can."""
    return "" if shutil.which("g++") else "there is no g++"


def _ninja_file(variant: str) -> str:
    import pybind11

    flags = [*FLAGS, *VARIANTS[variant]]
    # The stand-ins come first; headers that are not ours, as system headers, do not warn.
    includes = [f"-I{HERE / 'include'}", f"-I{HERE}", f"-I{ROOT / 'csrc'}"]
    foreign = [*include_paths(), pybind11.get_include(), sysconfig.get_path("include")]
    includes += [f"-isystem{path}" for path in foreign]
    torch_library = Path(torch.__file__).parent / "lib"
    lines = [
        "rule compile",
        f"  command = g++ -MD -MF $out.d {' '.join(flags + includes)} -x c++ -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "rule link",
        f"  command = g++ $in {' '.join(VARIANTS[variant])} -shared $libraries -o $out",
    ]
    for source in (*EMULATION, *KERNELS, HARNESS):
        lines.append(f"build {source.name}.o: compile {source}")

    def link(target: str, sources: tuple[Path, ...], libraries: str) -> None:
        objects = " ".join(f"{source.name}.o" for source in sources)
        lines.extend([f"build {target}: link {objects}", f"  libraries = {libraries}"])

    link("libkernels.so", (*EMULATION, *KERNELS), f"-L{torch_library} -ltorch_cpu")
    link("harness.so", (*EMULATION, HARNESS), "")
    return "\n".join([*lines, ""])


@functools.cache
def build(variant: str) -> Path:
    """The folder with both libraries of `variant`, compiled where they are older than sources."""
    directory = ROOT / "build" / "cuda_on_cpu" / variant
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "build.ninja").write_text(_ninja_file(variant))
    command = [sys.executable, "-m", "ninja", "-C", str(directory), "-j2"]
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
        raise RuntimeError(f"compiling the kernels for the host failed:\n{result.stdout}")
    return directory


def _variant() -> str:
    return os.environ.get(VARIANT_VARIABLE, "plain")


@functools.cache
def load() -> None:
    """Register `torch.ops.moat_kernels.cuda_*` for CPU tensors, in this process."""
    torch.ops.load_library(str(build(_variant()) / "libkernels.so"))


@functools.cache
def load_harness() -> ModuleType:
    """The small kernels of harness.cpp."""
    specification = importlib.util.spec_from_file_location(
        "harness", build(_variant()) / "harness.so"
    )
    assert specification is not None and specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


def run_sanitized(*command: str) -> subprocess.CompletedProcess[str]:
    """Run Python with `command` in a process that loads the build with sanitizers."""
    build("sanitized")
    runtime = subprocess.check_output(["g++", "-print-file-name=libasan.so"], text=True).strip()
    environment = {
        **os.environ,
        VARIANT_VARIABLE: "sanitized",
        "LD_PRELOAD": runtime,
        # Python itself leaks.
        "ASAN_OPTIONS": "detect_leaks=0",
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")]),
    }
    return subprocess.run(
        [sys.executable, *command], env=environment, capture_output=True, text=True, cwd=ROOT
    )
