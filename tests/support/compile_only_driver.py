"""Compiling what the library launches for GPUs that are not there.

Inside `record_launches(target)` the real launchers run on meta tensors, which cost no memory at any
size, and nothing else does: each launch is noted with the specialisation that its arguments have.
`compile_launches` compiles them for the target. Uses private parts of Triton, so the tests pin its
version.
"""

from __future__ import annotations

import functools
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.runtime._async_compile import AsyncCompileMode, FutureKernel
from triton.runtime.driver import driver

from moat_kernels.ops.triton_support import launching

# Compute capabilities: A100, H100 and H200, B200, RTX 50.
NVIDIA = (80, 90, 100, 120)
# MI300.
AMD = "gfx942"


@dataclass(frozen=True)
class Multiprocessor:
    """Limits per multiprocessor (CUDA C++ Programming Guide, table of compute capabilities)."""

    warps: int
    blocks: int
    shared_memory: int  # bytes
    registers: int = 65536

    @property
    def shared_memory_per_block(self) -> int:
        """The system keeps 1 KiB of each block's."""
        return self.shared_memory - 1024


MULTIPROCESSORS = {
    80: Multiprocessor(warps=64, blocks=32, shared_memory=164 * 1024),
    90: Multiprocessor(warps=64, blocks=32, shared_memory=228 * 1024),
    100: Multiprocessor(warps=64, blocks=32, shared_memory=228 * 1024),
    120: Multiprocessor(warps=48, blocks=24, shared_memory=100 * 1024),
}

# Instructions that multiply matrices on tensor cores, as PTX spells them; some have a predicate.
_TENSOR_CORE = re.compile(
    r"^\s*(?:@%p\d+ )?(?:mma\.sync|wgmma\.mma_async|tcgen05\.mma)", re.MULTILINE
)


@dataclass(frozen=True)
class Usage:
    """What a compiled kernel takes of the GPU: `stack` bytes a thread are what was spilled."""

    registers: int
    stack: int
    shared_memory: int
    tensor_core_instructions: int
    warps: int

    def occupancy(self, arch: int) -> float:
        """Warps that fit on a multiprocessor, of those it could hold."""
        limit = MULTIPROCESSORS[arch]
        registers_per_warp = -(-self.registers * 32 // 256) * 256
        blocks = min(
            limit.blocks,
            limit.warps // self.warps,
            limit.registers // (registers_per_warp * self.warps),
            limit.shared_memory // (self.shared_memory + 1024),
        )
        return blocks * self.warps / limit.warps


@dataclass(frozen=True)
class Launch:
    """A kernel's launch, as far as it decides the machine code.

    kernel: its name. constants: its compile-time arguments, warps and stages, and what is None
        or 1. arguments: types of the others, "/16" where a pointer or size is a multiple of 16.
        values: the others themselves, which do not decide it.
    """

    kernel: str
    constants: dict[str, Any]
    arguments: dict[str, str]
    compile: Callable[[], Any] = field(repr=False, compare=False)
    values: dict[str, Any] = field(repr=False, compare=False)

    @property
    def key(self) -> tuple[str, str, str]:
        """(kernel, constants, arguments) as text: equal for launches of the same machine code."""
        constants = " ".join(f"{name}={value}" for name, value in self.constants.items())
        arguments = " ".join(f"{name}:{kind}" for name, kind in self.arguments.items())
        return self.kernel, constants, arguments


class _CompileOnlyDriver:
    """The part of Triton's driver that compiling asks for."""

    def __init__(self, target: GPUTarget) -> None:
        self.target = target

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        # Kernels are cached per device: one number for two targets would mix them up.
        return hash(self.target.arch)

    def get_current_stream(self, device: int = 0) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("meta")


def gpu_target(arch: int | str) -> GPUTarget:
    """A compute capability, or the name of an AMD architecture."""
    return GPUTarget("cuda", arch, 32) if isinstance(arch, int) else GPUTarget("hip", arch, 64)


@contextmanager
def compiling_for(arch: int | str) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(driver, "_active", _CompileOnlyDriver(gpu_target(arch)))
        patch.setattr(launching, "_architecture", lambda _: arch if isinstance(arch, int) else 0)
        yield


@contextmanager
def record_launches(arch: int | str) -> Iterator[list[Launch]]:
    """Collect the different launches inside the block, in order, compiling and running nothing."""
    launches: dict[tuple[str, str, str], Launch] = {}
    found: list[Launch] = []

    def record(kernel: Any, grid: tuple[int, ...], arguments: Any, options: dict) -> Launch:
        launch = describe(kernel, grid, arguments, options)
        if launch.key not in launches:
            launches[launch.key] = launch
            found.append(launch)
        return launch

    # Who listens sees all launches: nothing is replayed.
    heard = launching.listening(lambda _: None)
    with compiling_for(arch), heard, pytest.MonkeyPatch.context() as patch:
        patch.setattr(launching, "_run", record)
        yield found


def describe(kernel: Any, grid: tuple[int, ...], arguments: Any, options: dict) -> Launch:
    """A launch that `launching` is about to make."""
    *_, bind = kernel.device_caches[driver.active.get_current_device()]
    values, kinds, chosen = bind(*arguments, debug=False, **options)
    constants, types = {}, {}
    for (name, value), (kind, detail) in zip(values.items(), kinds, strict=True):
        if kind == "constexpr":
            constants[name] = value
        else:
            types[name] = kind + ("/16" if detail == "D" else "")
    return Launch(
        kernel.__name__,
        constants | {name: chosen[name] for name in ("num_warps", "num_stages") if name in chosen},
        types,
        functools.partial(kernel.warmup, *arguments, grid=grid, **options),
        {name: values[name] for name in types},
    )


def compile_launches(launches: Iterable[Launch], arch: int | str) -> list[Any]:
    """The launches compiled for `arch`, two at a time; Triton keeps results on disk."""
    with compiling_for(arch), ThreadPoolExecutor(2) as pool, AsyncCompileMode(pool):
        kernels = [launch.compile() for launch in launches]
    # Those that this process compiled before come as they are.
    return [kernel.result() if isinstance(kernel, FutureKernel) else kernel for kernel in kernels]


def nvidia_usage(compiled: Any, arch: int) -> Usage:
    """Resources of a kernel compiled for `arch`, from its machine code and its PTX."""
    ptx = compiled.asm["ptx"]
    found = re.search(r"^\.target sm_(\d+)", ptx, re.MULTILINE)
    assert found and int(found[1]) == arch, f"compiled for {found and found[0]}, not sm_{arch}"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        listing = subprocess.run(
            [knobs.nvidia.cuobjdump.path, "-res-usage", file.name],
            capture_output=True,
            text=True,
            check=True,
        ).stdout
    counts = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", listing)
    assert counts, listing
    return Usage(
        registers=int(counts[1]),
        stack=int(counts[2]) + int(counts[3]),
        shared_memory=compiled.metadata.shared,
        tensor_core_instructions=len(_TENSOR_CORE.findall(ptx)),
        warps=compiled.metadata.num_warps,
    )


def amd_vector_spills(compiled: Any) -> int:
    """Vector registers that a kernel compiled for AMD spills."""
    found = re.search(r"\.vgpr_spill_count: +(\d+)", compiled.asm["amdgcn"])
    assert found
    return int(found[1])
