"""`moat_kernels.tune` on the step that the headline compares, the largest losses first.

Its table is in the output folder after every entry; the section `tuned` measures with it.
"""

from __future__ import annotations

from functools import partial

import torch

from benchmarks.gpu.bench import Bench, Skipped, Step
from benchmarks.gpu.headline import MAIN
from benchmarks.gpu.journal import Row
from benchmarks.gpu.machine import ceilings
from moat_kernels import create_model, tune
from moat_kernels.ops.triton_support import user_table
from moat_kernels.ops.triton_support.user_table import Entry

SECONDS = 90.0


def steps(bench: Bench) -> list[Step]:
    return [Step("tune", partial(tune_step, bench), SECONDS + 50.0)]


def tune_step(bench: Bench) -> list[Row]:
    entries: list[Entry] = []

    def report(entry: Entry) -> None:
        entries.append(entry)
        print(tune.describe(entry), flush=True)
        user_table.write(tune.device_name(torch.device(bench.device, 0)), [entry])

    if bench.rehearsal:
        raise Skipped("a rehearsal has no GPU's name to write the table for; the tests tune")
    workload = MAIN[0]
    models = [
        create_model(workload.model, recompute=level).to(bench.device) for level in tune.RECOMPUTE
    ]
    size = (workload.batch, 3, workload.resolution, workload.resolution)
    images = torch.randn(size, device=bench.device)
    tune.tune(
        models,
        images.to(memory_format=torch.channels_last),
        tune.time_on_gpu,
        report,
        seconds=SECONDS,
        bandwidth=ceilings(bench.journal)[0],
        autocast=torch.bfloat16,
    )
    return [
        {
            "kernel": f"{entry.problem.op} {entry.problem.kernel}",
            "sizes": "x".join(map(str, entry.problem.sizes)),
            "static, µs": entry.static_microseconds,
            "tuned, µs": entry.microseconds,
            "launch": " ".join(f"{k}={v}" for k, v in vars(entry.blocks).items()),
        }
        for entry in entries
    ]
