"""The headline's fused rows once more, with the launch table that `tune` has written."""

from __future__ import annotations

from functools import partial

from benchmarks.gpu.bench import Bench, Skipped, Step
from benchmarks.gpu.headline import FUSED, FUSED_GRAPH, MAIN, Contender, Workload, measure
from benchmarks.gpu.journal import Row
from moat_kernels.ops.triton_support import user_table


def steps(bench: Bench) -> list[Step]:
    return [
        Step(f"{workload}: {each.name}", partial(measure_tuned, bench, workload, each))
        for workload in MAIN
        for each in (FUSED, FUSED_GRAPH)
    ]


def measure_tuned(bench: Bench, workload: Workload, contender: Contender) -> list[Row]:
    if not user_table.path().exists():
        raise Skipped("no launch table was measured")
    return measure(bench, workload, contender)
