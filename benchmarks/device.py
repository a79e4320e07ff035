"""The device that is measured: a GPU where torch can use one, else the CPU; or as --device says."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch

from moat_kernels import memory
from moat_kernels.ops.common.backends import backend_status

_chosen = "cpu"


def default() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def choose(name: str) -> None:
    """Before the benchmarks are imported: their contenders depend on it."""
    global _chosen
    _chosen = name


def chosen() -> str:
    return _chosen


def placed() -> torch.device:
    """As a context: what is made inside lies on the device."""
    return torch.device(_chosen)


def measured_dtype() -> torch.dtype:
    """What the contenders multiply in: autocast's dtype where it is on, else that of --dtype."""
    if torch.is_autocast_enabled(_chosen):
        return torch.get_autocast_dtype(_chosen)
    return torch.get_default_dtype()


def own_backends() -> list[str]:
    """This package's fused backends that can run on the device, the one of its kernels last."""
    kernels = {"cpu": "cpu", "cuda": "triton"}[_chosen]
    return [name for name in ("torch", kernels) if backend_status()[name].usable]


def frozen_backends() -> list[str]:
    """The rows of frozen models (`freeze`), which there are on a CPU only."""
    return [f"{name} frozen" for name in own_backends() if name == "cpu"]


def synchronize() -> None:
    """Wait for all that was begun, so that a clock read next to it tells its time."""
    if _chosen == "cuda":
        torch.cuda.synchronize()


def is_usable() -> bool:
    """Whether the device still computes: after an illegal access a process cannot use its GPU."""
    try:
        synchronize()
    except RuntimeError:
        return False
    return True


def time_calls(
    call: Callable[[], Any], count: int, setup: Callable[[], Any] = lambda: None
) -> list[float]:
    """Seconds of each of `count` calls, one after the other, without the `setup` before each.

    On a GPU by its own events, and nothing is waited for before the last call: launches that are
    ahead of the GPU cost nothing, and calls that are launched more slowly than they are computed
    take as long as their launches.
    """
    if _chosen == "cuda":
        return _time_calls_on_gpu(call, count, setup)
    seconds = []
    for _ in range(count):
        setup()
        start = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - start)
    return seconds


def _time_calls_on_gpu(
    call: Callable[[], Any], count: int, setup: Callable[[], Any]
) -> list[float]:
    events = []
    torch.cuda.synchronize()
    for _ in range(count):
        setup()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        end.record()
        events.append((start, end))
    torch.cuda.synchronize()
    return [1e-3 * start.elapsed_time(end) for start, end in events]


def peak_bytes(function: Callable[[], Any]) -> int | None:
    """What a call takes of the device's memory beyond what was in use, at its peak."""
    if _chosen != "cuda":
        return memory.peak_bytes(function)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    function()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before
