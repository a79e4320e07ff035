"""The least time that kernels take on a GPU: each moves its bytes and multiplies, both at peak."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from moat_kernels.ops.triton_support.traffic import Pass
from moat_kernels.plan.gpus import Gpu


def floor_seconds(passes: Iterable[Pass], gpu: Gpu) -> float:
    """A lower bound of the time of kernels that run one after the other.

    Each takes as long as its bytes at the DRAM's full bandwidth or its products at the full rate,
    whichever is longer. Launches, what caches miss, elementwise arithmetic and clocks below boost
    come on top.
    """
    return sum(
        max(one.bytes / gpu.bandwidth, one.flops / gpu.peaks[one.arithmetic]) for one in passes
    )


@dataclass(frozen=True)
class Kernel:
    """All launches of one kernel."""

    name: str
    passes: tuple[Pass, ...]

    @property
    def bytes(self) -> int:
        return sum(one.bytes for one in self.passes)

    @property
    def flops(self) -> int:
        return sum(one.flops for one in self.passes)


def kernels(passes: Iterable[Pass]) -> list[Kernel]:
    """Launches grouped by kernel, those that move most first."""
    groups: dict[str, list[Pass]] = {}
    for one in passes:
        groups.setdefault(one.kernel, []).append(one)
    made = [Kernel(name, tuple(group)) for name, group in groups.items()]
    return sorted(made, key=lambda kernel: -kernel.bytes)
