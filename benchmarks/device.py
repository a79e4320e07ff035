"""The device that is measured: a GPU where torch can use one, else the CPU; or as --device says."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from moat_kernels import memory
from moat_kernels.ops.backends import backend_status

_chosen = "cpu"


def default() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def choose(name: str) -> None:
    """Before the benchmarks are imported: their contenders depend on it."""
    global _chosen
    _chosen = name


def chosen() -> str:
    return _chosen


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
