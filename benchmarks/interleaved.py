"""Comparison on a noisy machine: contenders take turns in one process, medians are compared."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import pytest
from device import peak_bytes, synchronize
from floor import peak_gflops
from torch import Tensor

from moat_kernels.memory import saved_bytes

# Rounds after the warm-up: as many as fit the time.
FEWEST_ROUNDS, MOST_ROUNDS = 5, 51
SECONDS = 4.0
# A turn: calls that are not timed while the threads of the contender before may spin and take cores
# from this one's; then as many as fit, at least one.
SPIN_SECONDS = 0.02
TURN_SECONDS = 0.05
# Calls this long outlast any spinning, so that the first is timed.
LONG_SECONDS = 1.0


def _nothing() -> None:
    pass


@dataclass(frozen=True)
class Contender:
    """One way to compute the same thing.

    call: computes it once. setup: runs before each call, untimed, and after the last.
    forward: the differentiable part, and state: parameters and buffers, for the bytes saved for
    backward (None: not trained).
    keeps_memory: it holds its working memory between calls, so a peak would say nothing.
    spins: seconds after a call until its threads sleep.
    """

    call: Callable[[], Any]
    setup: Callable[[], None] = _nothing
    forward: Callable[[], Tensor] | None = None
    state: tuple[Tensor, ...] = ()
    keeps_memory: bool = False
    spins: float = SPIN_SECONDS


def _turn(contender: Contender, before: Contender) -> list[float]:
    """Seconds of a contender's calls, once the threads of the one before are asleep."""
    settled = time.perf_counter() + before.spins
    seconds: list[float] = []
    while time.perf_counter() < settled and not seconds:
        first = _time(contender)
        if first > LONG_SECONDS:
            seconds = [first]
    while sum(seconds) < TURN_SECONDS:
        seconds.append(_time(contender))
    contender.setup()  # gradients of large models would take memory from the next contender
    return seconds


def _time(contender: Contender) -> float:
    contender.setup()
    synchronize()
    start = time.perf_counter()
    contender.call()
    synchronize()
    return time.perf_counter() - start


@dataclass
class Group:
    """Contenders that are compared with each other; one called "floor" is the bound of them all.

    flops: of one call, multiply-adds counted as two.
    """

    contenders: dict[str, Contender]
    flops: float

    @cached_property
    def peak_gflops(self) -> float:
        """What the machine can do now."""
        return peak_gflops()

    @cached_property
    def medians(self) -> dict[str, float]:
        """Seconds per call of each contender, all in turn, after a warm-up of each."""
        self._round()
        start = time.perf_counter()
        seconds: dict[str, list[float]] = {name: [] for name in self.contenders}
        for rounds in range(MOST_ROUNDS):
            if rounds >= FEWEST_ROUNDS and time.perf_counter() - start > SECONDS:
                break
            for name, values in self._round().items():
                seconds[name] += values
        return {name: statistics.median(values) for name, values in seconds.items()}

    def _round(self) -> dict[str, list[float]]:
        """The seconds of each contender's timed calls."""
        turns = list(self.contenders.values())
        before = [turns[-1], *turns]
        return {
            name: _turn(contender, last)
            for (name, contender), last in zip(self.contenders.items(), before, strict=False)
        }

    def extra_info(self, name: str) -> dict[str, Any]:
        """What the benchmark of contender `name` records."""
        median, contender = self.medians[name], self.contenders[name]
        info = {
            "contender": name,
            "interleaved_ms": 1e3 * median,
            "gflops": self.flops / median / 1e9,
            "peak_gflops": self.peak_gflops,
        }
        if "floor" in self.contenders:
            info["time_over_floor"] = median / self.medians["floor"]
            info["share_of_floor"] = self.medians["floor"] / median
        if contender.forward is not None:
            info["saved_bytes"] = saved_bytes(contender.forward, contender.state)
        if not contender.keeps_memory:
            contender.setup()
            info["peak_bytes"] = peak_bytes(contender.call)
        return info


@dataclass(frozen=True)
class Comparison:
    """A group that is not made yet.

    make: the group with the contenders named. contenders: their names; slow: those of more that
    are run with --full only. full: all of it is run with --full only.
    """

    name: str
    make: Callable[[Sequence[str]], Group] = field(repr=False)
    contenders: tuple[str, ...]
    slow: tuple[str, ...] = ()
    full: bool = False


def contenders_of(comparisons: Sequence[Comparison]) -> list:
    """(comparison, contender) of all, as the parameters of a benchmark."""
    return [
        pytest.param(
            comparison,
            contender,
            id=f"{comparison.name}-{contender}",
            marks=pytest.mark.full if comparison.full or contender in comparison.slow else (),
        )
        for comparison in comparisons
        for contender in (*comparison.contenders, *comparison.slow)
    ]
