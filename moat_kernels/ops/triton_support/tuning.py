"""The search for the fastest launch of every kernel: launchers are repeated with other launches."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor

from moat_kernels.ops.triton_support.choice import choosing
from moat_kernels.ops.triton_support.launch_table import Blocks, LaunchTable, Problem
from moat_kernels.ops.triton_support.launching import collect_compiled, observing
from moat_kernels.ops.triton_support.traffic import record_passes
from moat_kernels.ops.triton_support.user_table import Entry

Result = TypeVar("Result")

# How much faster than the best so far a launch must be: less than that is noise.
MARGIN = 0.02
# Largest difference between two launches' results, of the largest element: they round and sum in
# different orders.
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 1e-2, torch.float16: 2e-3}


class Survey:
    """What the static launches lose: microseconds of every problem above the time of its bytes.

    losses: of all calls that were observed together.
    """

    def __init__(self, measure: Callable[[Callable[[], Any]], float], bandwidth: float) -> None:
        """bandwidth: bytes per second that a copy reaches."""
        self.measure = measure
        self.bandwidth = bandwidth
        self._calls: Counter[Problem] = Counter()
        self._lost: dict[Problem, float] = {}

    @property
    def losses(self) -> dict[Problem, float]:
        return {problem: self._calls[problem] * lost for problem, lost in self._lost.items()}

    def __call__(self, launcher: Callable[[], Result]) -> Result:
        """Run a launcher, and measure it if its problem is a new one."""
        asked: list[Problem] = []

        def choose(problem: Problem, static: Blocks) -> Blocks:
            asked.append(problem)
            return static

        with observing(self), choosing(choose):
            result = launcher()
        if asked:
            self._calls[asked[0]] += 1
            if asked[0] not in self._lost:
                with observing(None), choosing(lambda _, static: static):
                    self._lost[asked[0]] = self._lose(launcher)
        return result

    def _lose(self, launcher: Callable[[], Any]) -> float:
        with record_passes() as passes:
            launcher()
        floor = 1e6 * sum(one.bytes for one in passes) / self.bandwidth
        return max(0.0, self.measure(launcher) - floor)


class Tuner:
    """Finds the fastest launch of every problem that it observes, beginning at the static table's.

    Steps to the fastest of a launch's neighbours (LaunchTable.neighbours) until none is faster.
    Those that do not compile, spill registers, exceed the GPU's shared memory or give other results
    are left out. A launcher within a launcher is tuned first.
    """

    def __init__(
        self,
        tables: Mapping[str, LaunchTable],
        measure: Callable[[Callable[[], Any]], float],
        report: Callable[[Entry], None],
        out_of_time: Callable[[], bool] = lambda: False,
    ) -> None:
        """measure: the time that a call takes on the GPU, in microseconds. out_of_time: whether the
        search must end with the best that it has.
        """
        self.tables = tables
        self.measure = measure
        self.report = report
        self.out_of_time = out_of_time
        self.wanted: Collection[Problem] | None = None  # None: all
        self.entries: dict[Problem, Entry] = {}

    def __call__(self, launcher: Callable[[], Result]) -> Result:
        """Run a launcher, and tune it if its problem is a new one."""
        asked: list[tuple[Problem, Blocks]] = []

        def choose(problem: Problem, static: Blocks) -> Blocks:
            asked.append((problem, static))
            return self._best(problem, static)

        with observing(self), choosing(choose):
            result = launcher()
        if not asked:  # nothing to compute
            return result
        problem, static = asked[0]
        wanted = self.wanted is None or problem in self.wanted
        if wanted and problem not in self.entries and not self.out_of_time():
            with observing(None):
                self.entries[problem] = self._search(launcher, problem, static)
            self.report(self.entries[problem])
        return result

    def _best(self, problem: Problem, static: Blocks) -> Blocks:
        entry = self.entries.get(problem)
        return static if entry is None else entry.blocks

    def _search(self, launcher: Callable[[], Any], problem: Problem, static: Blocks) -> Entry:
        results = list(tensors_of(self._run(launcher, problem, static)))
        expected = [tensor.clone() for tensor in results]
        times: dict[Blocks, float] = {static: self._time(launcher, problem, static)}
        best, improving = static, True
        while improving:
            for candidate in self.tables[problem.op].neighbours(best):
                if candidate not in times and not self.out_of_time():
                    for tensor in results:  # those written in place: what is not written shows
                        tensor.fill_(float("nan"))
                    times[candidate] = self._try(launcher, problem, candidate, expected)
            fastest = min(times, key=times.__getitem__)
            improving = times[fastest] < (1 - MARGIN) * times[best]
            best = fastest if improving else best
        self._run(launcher, problem, best)
        return Entry(problem, best, times[best], times[static])

    def _try(
        self, launcher: Callable[[], Any], problem: Problem, blocks: Blocks, expected: list[Tensor]
    ) -> float:
        """The time with a launch; infinite if it cannot be used."""
        from triton.compiler.errors import CompilationError
        from triton.runtime.errors import OutOfResources, PTXASError

        try:
            with collect_compiled() as kernels:
                actual = list(tensors_of(self._run(launcher, problem, blocks)))
        except (CompilationError, OutOfResources, PTXASError):
            return float("inf")
        if any(map(self.spills, kernels)) or not self.agrees(actual, expected, problem.dtype):
            return float("inf")
        return self._time(launcher, problem, blocks)

    def _run(self, launcher: Callable[[], Any], problem: Problem, blocks: Blocks) -> Any:
        def choose(other: Problem, static: Blocks) -> Blocks:
            return blocks if other == problem else self._best(other, static)

        with choosing(choose):
            return launcher()

    def _time(self, launcher: Callable[[], Any], problem: Problem, blocks: Blocks) -> float:
        return self.measure(lambda: self._run(launcher, problem, blocks))

    def spills(self, compiled: Any) -> bool:
        """Whether a kernel keeps registers in memory."""
        return bool(getattr(compiled, "n_spills", 0))

    def agrees(self, actual: list[Tensor], expected: list[Tensor], dtype: torch.dtype) -> bool:
        """Whether results are those of the static launch, up to rounding."""
        return all(
            _error(left, right) <= TOLERANCE[dtype]
            for left, right in zip(actual, expected, strict=True)
        )


def tensors_of(result: Any) -> Iterator[Tensor]:
    """The tensors in nested tuples and lists; of what comes in parts, the whole.

    How many parts there are depends on the launch: such results have a method `whole`.
    """
    if isinstance(result, Tensor):
        yield result
    elif hasattr(result, "whole"):
        yield from tensors_of(result.whole())
    elif isinstance(result, (tuple, list)):
        for part in result:
            yield from tensors_of(part)


def _error(actual: Tensor, expected: Tensor) -> float:
    """Largest difference, of the largest element; infinite where only one of the two is finite."""
    actual, expected = actual.double(), expected.double()
    differs = ~((actual == expected) | (actual.isnan() & expected.isnan()))
    if not differs.any():
        return 0.0
    difference = (actual - expected)[differs].abs().max()
    scale = expected[expected.isfinite()].abs().max()
    return float(torch.nan_to_num(difference / scale, nan=float("inf")))


def time_on_gpu(function: Callable[[], Any], repeats: int = 30) -> float:
    """Median time of a call on the current CUDA device, in microseconds, by CUDA events.

    Every call finds cold caches: before it a buffer larger than any L2 is overwritten, which also
    gives the host time to enqueue the call.
    """
    cold = torch.empty(256 * 2**20, dtype=torch.int8, device="cuda")
    for _ in range(3):
        function()
    times = []
    for _ in range(repeats):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        cold.zero_()
        begin.record()
        function()
        end.record()
        end.synchronize()
        times.append(1e3 * begin.elapsed_time(end))
    return statistics.median(times)
