"""CUDA's compiler, what it is asked for, and why the CUDA kernels are left out where they are."""

from __future__ import annotations

import functools
import os
import re
import shlex
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from build_support.environment import is_set, reason_not_built

FLAGS = ("-std=c++17", "-O3", "-Icsrc", "-Xcompiler=-fPIC,-fvisibility=hidden")
# Code for 80 runs on 86 and 89 as well, that for 100 on 103, for 120 on 121.
DEFAULT_ARCHITECTURES = (80, 90, 100, 120)
OLDEST_ARCHITECTURE = 80
# CUDA's runtime lies in the library, so that it loads where there is none, with hidden symbols: a
# process may have the runtime that torch brings as well. And what it needs of the system.
LIBRARIES = ("cudart_static", "dl", "pthread", "rt")


def nvcc() -> str | None:
    """CUDA's compiler: in CUDA_HOME if that is set, or else on PATH."""
    home = os.environ.get("CUDA_HOME")
    return shutil.which("nvcc", path=os.path.join(home, "bin") if home else None)


def architectures() -> list[tuple[int, bool]]:
    """(80, False) for "8.0", (90, True) for "9.0+PTX"; without those too old for the kernels.

    By default those of `DEFAULT_ARCHITECTURES` that nvcc knows, with PTX of the last of them, which
    serves GPUs to come.
    """
    names = os.environ.get("TORCH_CUDA_ARCH_LIST")
    if not names:
        known = _known_to_nvcc()
        numbers = [number for number in DEFAULT_ARCHITECTURES if number in known]
        return [(number, number == numbers[-1]) for number in numbers]
    found = []
    for name in re.split("[ ;]+", names.strip()):
        match = re.fullmatch(r"(\d+)\.(\d)(\+PTX)?", name)
        if match is None:
            raise ValueError(
                f"TORCH_CUDA_ARCH_LIST has {name!r}; supported are numbers like 8.0 or 9.0+PTX"
            )
        found.append((10 * int(match[1]) + int(match[2]), bool(match[3])))
    return [both for both in found if both[0] >= OLDEST_ARCHITECTURE]


def _known_to_nvcc() -> set[int]:
    output = subprocess.check_output([str(nvcc()), "--list-gpu-code"], text=True)
    return {int(number) for number in re.findall(r"sm_(\d+)\b", output)}


@functools.cache
def reason_cuda_not_built() -> str:
    """Why this build leaves the CUDA kernels out; empty if it does not."""
    if reason := reason_not_built():
        return reason
    if is_set("MOAT_KERNELS_SKIP_CUDA"):
        return "MOAT_KERNELS_SKIP_CUDA is set"
    import torch

    # Only where they are asked for: nobody's CPU build should fail for a compiler of GPU code.
    if torch.version.cuda is None and not is_set("MOAT_KERNELS_WITH_CUDA"):
        return f"torch {torch.__version__} is built without CUDA"
    if nvcc() is None:
        return "nvcc not found (looked in CUDA_HOME and on PATH)"
    if not architectures():
        return "TORCH_CUDA_ARCH_LIST, or nvcc, has nothing from 8.0 on"
    return ""


def toolkit_flags(name: str, source: str) -> list[str]:
    """nvcc's own -I ("INCLUDES") or -L ("LIBRARIES") flags, wherever its toolkit lies."""
    command = [str(nvcc()), "--dryrun", source, "-o", "unused"]
    plan = subprocess.run(command, stderr=subprocess.PIPE, text=True, check=True).stderr
    (line,) = re.findall(rf"^#\$ {name}=(.*)$", plan, re.MULTILINE)
    return shlex.split(line)


def compile_kernels(sources: list[str], directory: str) -> list[str]:
    """The objects of these sources, compiled by nvcc into `directory`."""
    os.makedirs(directory, exist_ok=True)
    targets = []
    for number, ptx in architectures():
        targets.append(f"-gencode=arch=compute_{number},code=sm_{number}")
        if ptx:
            targets.append(f"-gencode=arch=compute_{number},code=compute_{number}")

    def compile_one(source: str) -> str:
        target = os.path.join(directory, f"{Path(source).stem}.cu.o")
        subprocess.check_call([str(nvcc()), *FLAGS, *targets, "-c", source, "-o", target])
        return target

    with ThreadPoolExecutor(int(os.environ.get("MAX_JOBS") or os.cpu_count() or 1)) as pool:
        return list(pool.map(compile_one, sources))
