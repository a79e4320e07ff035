"""Comparison on a noisy machine: contenders take turns in one process, medians are compared."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from torch import Tensor

from moat_kernels.memory import saved_bytes

ROUNDS = 5


def _nothing() -> None:
    pass


@dataclass(frozen=True)
class Contender:
    """One way to compute the same thing.

    call: computes it once. setup: runs before each call, untimed. forward: the differentiable
    part, and state: parameters and buffers, for the bytes saved for backward (None: not trained).
    """

    call: Callable[[], Any]
    setup: Callable[[], None] = _nothing
    forward: Callable[[], Tensor] | None = None
    state: tuple[Tensor, ...] = ()


@dataclass
class Group:
    """Contenders that are compared with each other, the first (the floor or baseline) included.

    flops: of one call, multiply-adds counted as two.
    """

    name: str
    contenders: dict[str, Contender]
    flops: float
    floor: str | None = None

    @cached_property
    def medians(self) -> dict[str, float]:
        """Seconds per call of each contender, median of ROUNDS in turn, after one warm-up each."""
        seconds: dict[str, list[float]] = {name: [] for name in self.contenders}
        for round_number in range(ROUNDS + 1):
            for name, contender in self.contenders.items():
                contender.setup()
                start = time.perf_counter()
                contender.call()
                elapsed = time.perf_counter() - start
                if round_number > 0:
                    seconds[name].append(elapsed)
        return {name: statistics.median(values) for name, values in seconds.items()}

    def extra_info(self, name: str) -> dict[str, Any]:
        """What the benchmark of contender `name` records."""
        median = self.medians[name]
        info = {
            "contender": name,
            "interleaved_ms": 1e3 * median,
            "gflops": self.flops / median / 1e9,
        }
        if self.floor is not None:
            info["time_over_floor"] = median / self.medians[self.floor]
        contender = self.contenders[name]
        if contender.forward is not None:
            info["saved_bytes"] = saved_bytes(contender.forward, contender.state)
        return info
