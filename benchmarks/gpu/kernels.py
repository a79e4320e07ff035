"""The kernels of a training step: what each takes, moves and computes, sorted by what is lost.

`profile` steps measure all kernels inside a step by CUPTI, stock's too. `alone` times every
different launch of our Triton kernels by itself with cold caches. `counters` reads the instructions
executed and the bytes that crossed DRAM with Nsight Compute, where it may.

The floor is the longer of a kernel's predicted bytes at the bandwidth of a copy and its products at
the rate of large products, both as measured by the section `machine`; lost: what is above it.
"""

from __future__ import annotations

import collections
import csv
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu.bench import Bench, Skipped, Step
from benchmarks.gpu.headline import CUDA_KERNELS, FUSED, MAIN, STOCK, Contender, Workload, make_step
from benchmarks.gpu.journal import Row
from benchmarks.gpu.machine import GIGA, TERA, ceilings, cuda_program
from moat_kernels.ops.triton_support import launching, traffic
from moat_kernels.ops.triton_support.tuning import (
    time_on_gpu,
)
from moat_kernels.plan import GPUS

WORKLOAD = MAIN[0]
EXPAND = Contender('fused, recompute="expand"', True, "eager", "expand")
PROFILED = (FUSED, STOCK, CUDA_KERNELS, EXPAND)
ROWS = 28  # of a profile's table
COUNTERS = {
    "smsp__inst_executed.sum": "instructions",
    "dram__bytes.sum": "DRAM bytes",
    "gpu__time_duration.sum": "ns",
}
OWN_KERNELS = (
    "regex:^(row_moments|fold_weights|fold_evaluation|norm|norm_gradient|expand|expand_products|"
    "fold_gradient|correction|expand_input|depthwise|depthwise_backward|pool|excite|"
    "excite_backward|excite_weight|project|project_weight|project_input|forward|query_gradient|"
    "key_value_gradient|bias_gradient|gradient|fold_table|fold_sums|layer_norm|"
    "layer_norm_backward|norm_and_cast|branch_gradient)_kernel"
)


def steps(bench: Bench) -> list[Step]:
    found = [
        Step(f"profile of {contender.name}", partial(profile, bench, contender), 60.0)
        for contender in PROFILED
    ]
    found.insert(1, Step("alone", partial(alone, bench), 90.0))
    return [*found, Step("counters", partial(counters, bench), 120.0)]


def prepared(bench: Bench, contender: Contender) -> Callable[[], Any]:
    """A training step without a graph, warmed up."""
    eager = Contender(contender.name, contender.fused, "eager", contender.recompute)
    workload = Workload("rehearsed_moat", 32, 2, True) if bench.rehearsal else WORKLOAD
    step = make_step(bench, workload, eager)
    for _ in range(1 if bench.rehearsal else 3):
        step()
    return step


def recorded(step: Callable[[], Any]) -> list[traffic.Pass]:
    """What the step's launchers declare."""
    with traffic.record_passes() as passes, torch.autograd.set_multithreading_enabled(False):
        step()
    return passes


def profile(bench: Bench, contender: Contender) -> list[Row]:
    """Kernels by name, the slowest first, and one row for all others."""
    if bench.rehearsal:
        raise Skipped("CUPTI sees GPUs only")
    bandwidth, rate = ceilings(bench.journal)
    declared: dict[str, list[traffic.Pass]] = collections.defaultdict(list)
    with contender.in_its_environment():
        step = prepared(bench, contender)
        for one in recorded(step) if contender.fused else ():
            declared[one.kernel].append(one)
        times, counts = device_times(step)
    rows = []
    for name, seconds in sorted(times.items(), key=lambda item: -item[1]):
        passes = declared.get(name, [])
        moved, flops = sum(p.bytes for p in passes), sum(p.flops for p in passes)
        floor = sum(max(p.bytes / bandwidth, p.flops / rate) for p in passes)
        rows.append(
            {
                "step": contender.name,
                "kernel": name[:60],
                "launches": counts[name],
                "ms": 1e3 * seconds,
                "predicted GB": moved / GIGA if passes else None,
                "TB/s": moved / seconds / TERA if passes else None,
                "TFLOP/s": flops / seconds / TERA if flops else None,
                "floor ms": 1e3 * floor if passes else None,
                "lost ms": 1e3 * (seconds - floor) if passes else None,
            }
        )
    total = dict.fromkeys(rows[0]) | {
        "step": contender.name,
        "kernel": "all kernels",
        "launches": sum(counts.values()),
        "ms": 1e3 * sum(times.values()),
    }
    others = dict.fromkeys(rows[0]) | {
        "step": contender.name,
        "kernel": f"{len(rows) - ROWS} other kinds",
        "launches": sum(row["launches"] for row in rows[ROWS:]),
        "ms": sum(row["ms"] for row in rows[ROWS:]),
    }
    return [total, *rows[:ROWS], *([others] if len(rows) > ROWS else [])]


def device_times(
    step: Callable[[], Any], calls: int = 3
) -> tuple[dict[str, float], dict[str, int]]:
    """Seconds and launches of each kernel in one call, by name, as CUPTI counts them."""
    from torch.profiler import ProfilerActivity

    with torch.profiler.profile(activities=[ProfilerActivity.CUDA]) as profiler:
        for _ in range(calls):
            step()
        torch.cuda.synchronize()
    times: dict[str, float] = collections.defaultdict(float)
    counts: dict[str, int] = collections.defaultdict(int)
    for event in profiler.events():
        if event.device_type == torch.autograd.DeviceType.CUDA and not event.is_user_annotation:
            name = _declared_name(event.name)
            times[name] += 1e-6 * event.time_range.elapsed_us() / calls
            counts[name] += 1
    return dict(times), {name: round(count / calls) for name, count in counts.items()}


def _declared_name(kernel: str) -> str:
    """The name in `traffic` of a kernel as CUPTI spells it."""
    for ours in ("expand_depthwise", "depthwise_backward"):
        if "moat_kernels" in kernel and f"{ours}_kernel" in kernel:
            return f"cuda_{ours}"
    if "moat_kernels" in kernel and "depthwise_forward_kernel" in kernel:
        return "cuda_depthwise_forward"
    return kernel


def alone(bench: Bench) -> list[Row]:
    """Every different launch of our Triton kernels in a fused step, timed by itself."""
    if bench.rehearsal:
        return [_alone_row("a kernel", "BLOCK=1", 1, 1e-3, None, 1e12, 1e15)]
    bandwidth, rate = ceilings(bench.journal)
    step = prepared(bench, FUSED)
    timed: dict[tuple[Any, ...], tuple[float, traffic.Pass]] = {}
    counts: dict[tuple[Any, ...], int] = collections.Counter()
    passes: list[traffic.Pass] = []
    run = launching._run

    def time_too(kernel: Any, grid: tuple[int, ...], arguments: Any, options: Any) -> Any:
        compiled = run(kernel, grid, arguments, options)
        shapes = tuple(tuple(t.shape) for t in arguments if isinstance(t, torch.Tensor))
        key = (kernel.fn.__name__, grid, shapes, tuple(sorted(map(str, options.items()))))
        counts[key] += 1
        if key not in timed:
            seconds = 1e-6 * time_on_gpu(lambda: run(kernel, grid, arguments, options), 10)
            timed[key] = (seconds, passes[-1])
        return compiled

    launching._run = time_too
    try:
        with (
            traffic.record_passes() as passes,
            torch.autograd.set_multithreading_enabled(False),
        ):
            step()
    finally:
        launching._run = run
    rows = [
        _alone_row(key[0], _spell_launch(key), counts[key], seconds, one, bandwidth, rate)
        for key, (seconds, one) in timed.items()
    ]
    return sorted(rows, key=lambda row: -row["lost in a step, ms"])


def _spell_launch(key: tuple[Any, ...]) -> str:
    """The first tensor's shape, tile and warps."""
    options = [text for text in key[3] if "BLOCK" in text or "num_" in text]
    values = (text.strip("()").replace("'", "").split(", ") for text in options)
    short = " ".join(f"{name.removeprefix('BLOCK_').lower()}={value}" for name, value in values)
    return f"{'x'.join(map(str, key[2][0]))}; {short}"


def _alone_row(
    kernel: str,
    launch: str,
    count: int,
    seconds: float,
    one: traffic.Pass | None,
    bandwidth: float,
    rate: float,
) -> Row:
    moved, flops = (one.bytes, one.flops) if one is not None else (1, 1)
    floor = max(moved / bandwidth, flops / rate)
    return {
        "kernel": kernel,
        "first tensor; launch": launch,
        "in a step": count,
        "µs": 1e6 * seconds,
        "predicted MB": moved / 1e6,
        "TB/s": moved / seconds / TERA,
        "TFLOP/s": flops / seconds / TERA,
        "floor µs": 1e6 * floor,
        "lost in a step, ms": 1e3 * count * (seconds - floor),
    }


def counters(bench: Bench) -> list[Row]:
    """Instructions and DRAM bytes of our kernels in a fused step, as the hardware counts them."""
    if bench.rehearsal:
        raise Skipped("Nsight Compute is for GPUs")
    command = cuda_program("ncu")
    if command is None:
        raise Skipped("Nsight Compute (ncu) is not installed")
    result = subprocess.run(
        [
            *(command, "--csv", "--page", "raw", "--clock-control", "none"),
            *("--profile-from-start", "off", "--metrics", ",".join(COUNTERS)),
            *("--kernel-name-base", "function", "--kernel-name", OWN_KERNELS),
            *(sys.executable, "-m", "benchmarks.gpu.kernels"),
        ],
        capture_output=True,
        text=True,
        timeout=110,
    )
    text = result.stdout
    if '"Kernel Name"' not in text:
        raise RuntimeError(f"ncu: {text[-300:]} {result.stderr[-300:]}")
    table = list(csv.DictReader(text[text.index('"ID"') :].splitlines()))
    return sum_counters(table[1:])  # below the names stand the units


def sum_counters(table: list[dict[str, str]]) -> list[Row]:
    rate = GPUS["h100"].issue_rate
    sums: dict[str, dict[str, float]] = collections.defaultdict(lambda: collections.Counter())
    for line in table:
        found = sums[line["Kernel Name"].split("(")[0]]
        found["launches"] += 1
        for metric, name in COUNTERS.items():
            found[name] += float(line[metric].replace(",", ""))
    rows = [
        {
            "kernel": kernel,
            "launches": int(found["launches"]),
            "ms": found["ns"] / 1e6,
            "DRAM GB": found["DRAM bytes"] / GIGA,
            "instructions, millions": found["instructions"] / 1e6,
            "issue at full rate, ms": 1e3 * found["instructions"] / rate,
        }
        for kernel, found in sums.items()
    ]
    return sorted(rows, key=lambda row: -row["ms"])


def main() -> None:
    """What ncu watches: one fused step, between the start and the end of its profile."""
    from benchmarks.gpu.journal import Journal

    bench = Bench(Journal(Path("build/ncu")), rehearsal=False)
    step = prepared(bench, FUSED)
    torch.cuda.synchronize()
    torch.cuda.profiler.start()
    step()
    torch.cuda.synchronize()
    torch.cuda.profiler.stop()


if __name__ == "__main__":
    main()
