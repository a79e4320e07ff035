"""Compiles csrc/cuda with g++ into a library that runs the kernels on the host (see block.h)."""

from __future__ import annotations

import fcntl
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

from build_support.environment import TORCH_TARGET_VERSION

HERE = Path(__file__).parent
ROOT = HERE.parent.parent.parent
EMULATION = (HERE / "block.cpp", HERE / "fiber.cpp")
KERNELS = tuple(sorted((ROOT / "csrc" / "cuda").glob("*.cu")))
BINDING = (ROOT / "csrc" / "cuda" / "binding.cpp", HERE / "host_stream.cpp")
HARNESS_KERNELS = HERE / "harness_kernels.cpp"
HARNESS_MODULE = HERE / "harness_module.cpp"
FLAGS = (
    "-std=c++17",
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
# How kernels are compiled; what surrounds them is compiled once, without.
VARIANTS = {
    "plain": ("-O1",),
    "sanitized": (
        *("-O1", "-g1", "-fsanitize=address,bounds-strict", "-fno-sanitize-recover=all"),
    ),
}
# Tells a process started by `run_sanitized` which build to load.
VARIANT_VARIABLE = "CUDA_ON_CPU_VARIANT"


def reason_unavailable() -> str:
    """Why the library cannot be built here; empty if it can."""
    return "" if shutil.which("g++") else "there is no g++"


def _ninja_file() -> str:
    """Folders of both variants beside the objects that they share."""
    import pybind11

    # The stand-ins come first; headers that are not ours, as system headers, do not warn.
    includes = [f"-I{HERE / 'include'}", f"-I{HERE}", f"-I{ROOT / 'csrc'}"]
    # torch 2.11 brings its own pybind11, whose headers refuse TORCH_TARGET_VERSION.
    foreign = [pybind11.get_include(), *include_paths(), sysconfig.get_path("include")]
    includes += [f"-isystem{path}" for path in foreign]
    lines = [
        "rule compile",
        f"  command = g++ -MD -MF $out.d {' '.join([*FLAGS, *includes])} $flags "
        "-x c++ -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "rule link",
        "  command = g++ $in $flags -shared $libraries -o $out",
    ]

    def compile_all(folder: str, sources: tuple[Path, ...], *flags: str) -> str:
        targets = [f"{folder}/{source.name}.o" for source in sources]
        for source, target in zip(sources, targets, strict=True):
            lines.extend([f"build {target}: compile {source}", f"  flags = {' '.join(flags)}"])
        return " ".join(targets)

    def link(target: str, objects: str, flags: tuple[str, ...], libraries: str = "") -> None:
        lines.extend([f"build {target}: link {objects}", f"  flags = {' '.join(flags)}"])
        lines.append(f"  libraries = {libraries}")

    emulation = compile_all("shared", EMULATION, "-O1")
    binding = compile_all("shared", BINDING, "-O0")
    module = compile_all("shared", (HARNESS_MODULE,), "-O0")
    torch_library = f"-L{Path(torch.__file__).parent / 'lib'} -ltorch_cpu"
    for variant, flags in VARIANTS.items():
        kernels = compile_all(variant, KERNELS, *flags)
        link(f"{variant}/libkernels.so", f"{kernels} {binding} {emulation}", flags, torch_library)
        harness = compile_all(variant, (HARNESS_KERNELS,), *flags)
        link(f"{variant}/harness.so", f"{harness} {module} {emulation}", flags)
    portable = compile_all("portable", EMULATION, "-O1", "-DCUDA_ON_CPU_UCONTEXT")
    harness = "plain/harness_kernels.cpp.o"
    link("portable/harness.so", f"{harness} {module} {portable}", ())
    return "\n".join([*lines, ""])


@functools.cache
def build(target: str) -> Path:
    """A library, such as "plain/libkernels.so", compiled where it is older than its sources."""
    directory = ROOT / "build" / "cuda_on_cpu"
    directory.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "ninja", "-C", str(directory), "-j2", target]
    # Tests of Triton kernels build here too, in processes of their own at the same time.
    with (directory / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        (directory / "build.ninja").write_text(_ninja_file())
        result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
        raise RuntimeError(f"compiling the kernels for the host failed:\n{result.stdout}")
    return directory / target


def _variant() -> str:
    return os.environ.get(VARIANT_VARIABLE, "plain")


@functools.cache
def load() -> None:
    """Register `torch.ops.moat_kernels.cuda_*` for CPU tensors, in this process."""
    torch.ops.load_library(str(build(f"{_variant()}/libkernels.so")))


@functools.cache
def load_harness(variant: str = "") -> ModuleType:
    """The small kernels of harness_kernels.h. "portable": with the slower, portable fibers."""
    library = build(f"{variant or _variant()}/harness.so")
    specification = importlib.util.spec_from_file_location("harness", library)
    assert specification is not None and specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


def run_sanitized(*command: str) -> subprocess.CompletedProcess[str]:
    """Run Python with `command` in a process that loads the build with sanitizers."""
    for library in ("libkernels.so", "harness.so"):
        build(f"sanitized/{library}")
    # The sanitizer looks for C++'s own functions, such as throw, when it is loaded.
    preloaded = [
        subprocess.check_output(["g++", f"-print-file-name={name}"], text=True).strip()
        for name in ("libasan.so", "libstdc++.so.6")
    ]
    environment = {
        **os.environ,
        VARIANT_VARIABLE: "sanitized",
        "LD_PRELOAD": " ".join(preloaded),
        # Python itself leaks.
        "ASAN_OPTIONS": "detect_leaks=0",
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")]),
    }
    return subprocess.run(
        [sys.executable, *command], env=environment, capture_output=True, text=True, cwd=ROOT
    )
