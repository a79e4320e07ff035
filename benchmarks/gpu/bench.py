"""How a section measures: on the GPU, or in a rehearsal on the CPU with an invented clock.

A rehearsal runs everything once, at tiny sizes, with Triton's interpreter for the kernels. It shows
that the sections work; its numbers are invented.
"""

from __future__ import annotations

import contextlib
import itertools
import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from benchmarks.gpu.journal import Journal, Row

INVENTED_SECONDS = 1e-3
WARM_UP, FEWEST, MOST = 3, 5, 50


class Skipped(Exception):
    """Raised by a step that does not apply on this machine; says why."""


@dataclass(frozen=True)
class Step:
    """A part of a section that fails, hangs and is resumed by itself.

    run: gives the rows of its table. seconds: after which it counts as hung.
    """

    name: str
    run: Callable[[], list[Row]]
    seconds: float = 60.0


@dataclass(frozen=True)
class Bench:
    """journal: what was found before, by this section and others. seconds: of a measurement."""

    journal: Journal
    rehearsal: bool
    seconds: float = 0.8

    @property
    def device(self) -> str:
        return "cpu" if self.rehearsal else "cuda"

    def autocast(self) -> torch.autocast:
        """To bfloat16, as CUDA graphs need it: weights are cast anew in every step."""
        return torch.autocast(self.device, torch.bfloat16, cache_enabled=False)

    def time(self, function: Callable[[], Any]) -> float:
        """Median seconds from one call to the next, of calls that follow each other.

        The host runs ahead where it can, and is waited for where it cannot: both are what a loop
        of training sees.
        """
        function()
        if self.rehearsal:
            return INVENTED_SECONDS
        for _ in range(WARM_UP):
            function()
        once = self._intervals(function, 2)
        calls = max(FEWEST, min(MOST, int(self.seconds / max(1e-6, statistics.median(once)))))
        return statistics.median(self._intervals(function, calls))

    def _intervals(self, function: Callable[[], Any], calls: int) -> list[float]:
        events = [torch.cuda.Event(enable_timing=True) for _ in range(calls + 1)]
        torch.cuda.synchronize()
        events[0].record()
        for event in events[1:]:
            function()
            event.record()
        torch.cuda.synchronize()
        return [1e-3 * begin.elapsed_time(end) for begin, end in itertools.pairwise(events)]

    def peak_bytes(self, function: Callable[[], Any]) -> int | None:
        """The most that tensors take during a call, with those that exist before.

        None in a rehearsal, which calls nothing more than once.
        """
        if self.rehearsal:
            return None
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        function()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated()

    def graph(self, function: Callable[[], Any]) -> Callable[[], Any]:
        """The function captured in a CUDA graph, ready to be replayed."""
        if self.rehearsal:
            return function
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(WARM_UP):
                function()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            function()
        return graph.replay

    def compile(self, function: Callable[..., Any], mode: str = "default") -> Callable[..., Any]:
        """torch.compile; a rehearsal only traces."""
        torch.compiler.reset()
        if self.rehearsal:
            return torch.compile(function, backend="eager")
        return torch.compile(function, mode=mode)

    def release(self) -> None:
        """Give memory back between contenders."""
        if not self.rehearsal:
            torch.cuda.empty_cache()


@contextlib.contextmanager
def poisoned_memory() -> Iterator[None]:
    """Uninitialised memory is NaN inside the block, so that unwritten elements show."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)
