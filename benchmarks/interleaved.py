"""Comparison on a noisy machine: contenders take turns in one process, medians are compared."""

from __future__ import annotations

import math
import statistics
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import pytest
from device import chosen, is_usable, peak_bytes, placed, synchronize, time_calls
from floor import peak_gflops
from machine import summary
from torch import Tensor

from moat_kernels.memory import saved_bytes

# What the benchmark of a contender records. Of one that failed or was skipped only "contender" and
# the reason as "failure", with its "traceback", or as "skipped".
Row = dict[str, Any]

# Rounds after the warm-up: as many as fit the time.
FEWEST_ROUNDS, MOST_ROUNDS = 5, 51
SECONDS = 4.0
# A turn: calls that are not timed while the threads of the contender before may spin and take cores
# from this one's; then as many as fit, at least one. On a GPU two that are not timed, and all but
# the first are launched without waiting.
SPIN_SECONDS = 0.02
TURN_SECONDS = 0.05
# Calls this long outlast any spinning, so that the first is timed.
LONG_SECONDS = 1.0


def _nothing(*_: Any) -> None:
    pass


class DeviceLost(Exception):
    """A contender failed and left its process without a usable device."""


@dataclass(frozen=True)
class Contender:
    """One way to compute the same thing.

    call: computes it once. setup: runs before each call, untimed, and after the last.
    forward: the differentiable part, and state: parameters and buffers, for the bytes saved for
    backward (None: not trained).
    keeps_memory: it holds its working memory between calls, so a peak would say nothing.
    spins: seconds after a call until its threads sleep.
    facts: what else is recorded of it.
    pixels: of the images of a call, where contenders of a group differ in them.
    """

    call: Callable[[], Any]
    setup: Callable[[], None] = _nothing
    forward: Callable[[], Tensor] | None = None
    state: tuple[Tensor, ...] = ()
    keeps_memory: bool = False
    spins: float = SPIN_SECONDS
    facts: Callable[[], Row] = dict
    pixels: int | None = None


def _turn(contender: Contender, before: Contender) -> list[float]:
    """Seconds of a contender's calls, after `before` had its turn."""
    seconds = _turn_on_gpu(contender) if chosen() == "cuda" else _turn_on_cpu(contender, before)
    contender.setup()  # gradients of large models would take memory from the next contender
    return seconds


def _turn_on_cpu(contender: Contender, before: Contender) -> list[float]:
    """Once the threads of the one before are asleep."""
    settled = time.perf_counter() + before.spins
    seconds: list[float] = []
    while time.perf_counter() < settled and not seconds:
        (first,) = time_calls(contender.call, 1, contender.setup)
        if first > LONG_SECONDS:
            seconds = [first]
    while sum(seconds) < TURN_SECONDS:
        seconds += time_calls(contender.call, 1, contender.setup)
    return seconds


def _turn_on_gpu(contender: Contender) -> list[float]:
    """Without calls that meet an idle GPU, unless they are long."""
    (first,) = time_calls(contender.call, 1, contender.setup)
    if first > LONG_SECONDS:
        return [first]
    count = math.ceil(TURN_SECONDS / max(first, 1e-6))
    return time_calls(contender.call, 1 + count, contender.setup)[1:]


@dataclass
class Group:
    """Contenders that are compared with each other; one called "floor" is the bound of them all.

    names: of the contenders, which `make` makes. flops: of one call, multiply-adds counted as two;
    None where contenders differ in it.
    """

    names: Sequence[str]
    make: Callable[[str], Contender]
    flops: float | None = None
    contenders: dict[str, Contender] = field(default_factory=dict, init=False)

    def measure(self, report: Callable[[Row], Any], begin: Callable[[str], Any] = _nothing) -> None:
        """Report a row of each contender as soon as it is known.

        One that fails is reported at once and takes no further part. begin: is told whose turn it
        is. Raises DeviceLost where nothing more can be measured in this process.
        """

        @contextmanager
        def attempt(name: str) -> Iterator[None]:
            begin(name)
            try:
                yield
                synchronize()  # a GPU tells what went wrong then
            except Exception as error:
                self.contenders.pop(name, None)
                report(failure(name, error))
                if not is_usable():
                    raise DeviceLost(name) from None

        for name in self.names:
            with attempt(name), placed():
                self.contenders[name] = self.make(name)
        medians = self._medians(attempt)
        for name in list(self.contenders):
            row: Row = {}
            with attempt(name):
                row = self._row(name, medians)
            if row:
                report(row)

    def _medians(self, attempt: Callable[[str], Any]) -> dict[str, float]:
        """Seconds per call of each contender, all in turn, after a warm-up of each."""
        self._round(attempt)
        start = time.perf_counter()
        seconds: dict[str, list[float]] = {name: [] for name in self.contenders}
        for rounds in range(MOST_ROUNDS):
            if rounds >= FEWEST_ROUNDS and time.perf_counter() - start > SECONDS:
                break
            for name, values in self._round(attempt).items():
                seconds[name] += values
        return {name: statistics.median(seconds[name]) for name in self.contenders}

    def _round(self, attempt: Callable[[str], Any]) -> dict[str, list[float]]:
        """The seconds of each contender's timed calls."""
        seconds = {}
        turns = list(self.contenders.items())
        before = [contender for _, contender in (*turns[-1:], *turns)]
        for (name, contender), last in zip(turns, before, strict=False):
            with attempt(name):
                seconds[name] = _turn(contender, last)
        return seconds

    def _row(self, name: str, medians: dict[str, float]) -> Row:
        median, contender = medians[name], self.contenders[name]
        row = {"contender": name, "interleaved_ms": 1e3 * median}
        if self.flops is not None:
            row["gflops"] = self.flops / median / 1e9
            row["peak_gflops"] = self._peak_gflops
        if contender.pixels is not None:
            row["ms_per_megapixel"] = 1e9 * median / contender.pixels
        if "floor" in medians:
            row["time_over_floor"] = median / medians["floor"]
            row["share_of_floor"] = medians["floor"] / median
        if contender.forward is not None:
            row["saved_bytes"] = saved_bytes(contender.forward, contender.state)
        if not contender.keeps_memory:
            contender.setup()
            row["peak_bytes"] = peak_bytes(contender.call)
            contender.setup()
        return {**row, **contender.facts(), **summary()}

    @cached_property
    def _peak_gflops(self) -> float:
        """What the machine can do now."""
        return peak_gflops()


def failure(name: str, error: BaseException) -> Row:
    """The row of a contender that failed."""
    return {
        "contender": name,
        "failure": "".join(traceback.format_exception_only(error)).strip(),
        "traceback": "".join(traceback.format_exception(error)),
    }


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

    def measure(
        self,
        names: Sequence[str],
        report: Callable[[Row], Any],
        begin: Callable[[str], Any] = _nothing,
    ) -> None:
        """Make the group of `names` and measure it, as `Group.measure` does.

        What its contenders share may fail or be skipped too: then all of them do.
        """
        try:
            with placed():
                group = self.make(names)
        except pytest.skip.Exception as error:
            for name in names:
                report({"contender": name, "skipped": str(error)})
        except Exception as error:
            for name in names:
                report(failure(name, error))
        else:
            group.measure(report, begin)


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
