"""docs/roofline.md: what a training step of every variant moves, multiplies and takes at least."""

from __future__ import annotations

import json
import operator
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from moat_kernels import get_preprocessing, list_models
from moat_kernels.ops.triton_support.traffic import Pass
from moat_kernels.plan import (
    BLOCKS,
    GPUS,
    Step,
    TrainingStep,
    compiled_seconds,
    eager_seconds,
    floor_seconds,
    graphed_seconds,
    issue_seconds,
    kernels,
)
from moat_kernels.plan.forecast import (
    COMPILED,
    EFFICIENCY,
    HOST_SECONDS,
    LEAST_SECONDS,
    OPERATOR_EFFICIENCY,
    OWN_HOST_SECONDS,
)
from moat_kernels.plan.issue import INSTRUCTIONS
from moat_kernels.plan.operators import OperatorPass
from moat_kernels.plan.report import GIB, RESERVED, capacity
from support import issue_fit, issue_table
from support.issue_fit import Total
from support.issue_table import Issue

DOCUMENT = Path(__file__).parents[2] / "docs" / "roofline.md"
RUNS = DOCUMENT.parent / "gpu_runs"
BATCH = 64
COMPARED = ("a100", "h100", "h200")
# Blocks whose kernels are listed one by one, and the share of their time below which they are not.
LISTED = ("stock", "none")
SMALLEST_SHARE = 0.02
# Where the constants of forecasts were measured, and steps that were measured there too.
FORECAST_ON = "h200"
MEASURED = (("moat_0", 64), ("moat_0", 256), ("tiny_moat_0", 64))
# The blocks of what was measured, by its name there; as it is, a contender is eager.
CONTENDERS = {
    "stock": "stock",
    "fused": "none",
    'fused, recompute="expand"': "expand",
    'fused, recompute="block"': "block",
}
GRAPHED, UNDER_COMPILE = ", CUDA graph", ", compiled"

HEAD = f"""\
# Roofline on paper

Written by `python benchmarks/roofline.py`; the tests compare. **Everything here is predicted from
shapes and data sheets; the [forecasts](#launches-and-forecasts) take six measured numbers besides.
What was measured is in [gpu_results.md](gpu_results.md).**

A training step at batch {BATCH}: forward, cross entropy, backward, AdamW in one kernel; autocast in
bfloat16, channels_last, eager; each variant at its own resolution. `python -m moat_kernels.plan`
predicts the same for other batches, resolutions, GPUs and precisions, and the largest batch that
fits. Launches are those for Hopper; elsewhere the sizes of partial sums may differ.

- memory: the most that tensors take at a time, counted exactly by tracing the step: parameters,
  gradients, AdamW's two moments, what autograd keeps, temporaries, each rounded up to 512 bytes.
  Not counted: workspaces of cuBLAS and cuDNN, the CUDA context, fragmentation. A batch is said not
  to fit where less than {RESERVED // GIB} GiB are left for these.
- DRAM: every kernel reads its inputs once and writes its results once; caches do the rest. Batch
  norm reads its map twice, and each gradient of a convolution reads that of its output again.
- FLOP: products and stencils. GELU, norms and other elementwise arithmetic are left out.
- at least: the sum over kernels of the longer of bytes at full bandwidth and products at full rate.
  A lower bound, no forecast: launches (see their number; without CUDA graphs each costs
  microseconds), caches that miss, elementwise arithmetic and clocks below boost come on top.
- issue: what the instructions of this package's kernels take to start at the full rate, as
  `moat_kernels/plan/issue.py` has it from [counts](#issue-time); with Triton's stencils, which
  those of CUDA C++ undercut. Of PyTorch's, cuDNN's and cuBLAS' kernels nothing is known.
"""

FORECAST = f"""\
Launches as the trace counts them; PyTorch makes some more (of moat_0 at batch 64, stock, 2150 were
counted on an H200 where the trace had 1746, 66 of which drop path no longer makes).

- CUDA graph: the sum over launches of the floor divided by how near kernels come to it, which is
  {EFFICIENCY:g} for this package's and {OPERATOR_EFFICIENCY:g} for others; at least
  {LEAST_SECONDS * 1e6:g} µs each.
- eager: that, or the time of the host, whichever is longer: {HOST_SECONDS * 1e6:g} µs for each
  launch of PyTorch's and {OWN_HOST_SECONDS * 1e6:g} µs for each of this package's, with the Python
  around it.
- compiled: under torch.compile stock takes {COMPILED:g} of what it takes in a CUDA graph. Fused
  blocks are operators there, which the host launches as in eager mode: CUDA graphs spare that.

These six numbers were measured with moat_0 at batch 64 on H200s, in runs 5, 8 and 9 of
[gpu_results.md](gpu_results.md); `moat_kernels/plan/forecast.py` says how each follows. Fused steps
that only run 5 has were of the kernels of then, ten times as many: what stands beside them is what
to expect now. Eager times vary with the host by a half.
"""

# The GPU that instructions are counted for, and the share of their time below which a kernel is not
# listed.
ISSUE_ON = "h100"
SMALLEST_ISSUE = 0.01

STEP = f"{issue_table.MODEL} at {issue_table.RESOLUTION} px and batch {issue_table.BATCH}"
CODE = f"sm_{issue_table.ARCHITECTURE}"
CLOCK = f"{GPUS[ISSUE_ON].clock / 1e9:g} GHz"
ISSUE = f"""\
A multiprocessor starts at most four instructions of warps a clock. How many a step issues was
counted without a GPU, in this section for the fused step of {STEP} (bfloat16
autocast, nothing recomputed), launched as on Hopper. `python benchmarks/issue.py` compiles each
different launch for {CODE} and follows its warps through the machine code: the integer
instructions that decide where a branch goes are executed, with the launch's own numbers, and all
that are passed are counted ([issue_time.csv](issue_time.csv)). So loops that the compiler
pipelined, peeled or unrolled, and programs that return early, are counted as they run. Predicated
instructions that do nothing count, as they take their turn too. A grid of more than 512 blocks is
extrapolated from that many, which lie spread over it; blocks whose first threads go the same way
are taken for alike.

Only one branch depends on data, in `expand_products_kernel` and `expand_input_kernel`: where the
pilot (what is subtracted of x before its products) is not zero they centre x first. Counted is the
usual way, without; the last row has the other. In two CUDA C++ kernels it is a division's slow
path.

The method against the hardware: the launches of run 1 of [gpu_results.md](gpu_results.md) (commit
3de97fb), compiled by the Triton 3.6.0 of then and counted the same way, issue 16667 million
instructions by this count and 16669 million by Nsight Compute's; each of the 17 kernels is within
0.2 %, but one, 1.2 % above. The kernels of now were not run under Nsight Compute, those of CUDA C++
never.

Bytes, products and issue: each at the full rate of an {GPUS[ISSUE_ON].name}; issue at {CLOCK},
as gpu_results.md reckons (a clock of 1.98 GHz, which those GPUs allow, would make it shorter). At
least: the longest of the three, launch by launch. An H200 issues as fast.
Time that passes between dependent instructions, and products that wait for their operands, come on
top. PyTorch's and cuDNN's kernels, in this step and in stock's, are not counted: their machine code
is part of a CUDA build of torch, and there is none where these pages are made.

Other steps were counted the same way, {
    ", ".join(
        f"{model} at {pixels} px and batch {images}"
        for model, pixels, images in issue_fit.STEPS[1:]
    )
} ([issue_steps.csv](issue_steps.csv), by kernel). A sum of what bytes and what products take,
fitted to all of them kernel by kernel, is the table that predicts all steps of this page.
"""

FITTED_HEAD = "| step, with stencils of | counted, ms | by the table, ms | table / counted |"

# The shares of a GPU's rates and the least time of a launch that were guessed before anything had
# been timed, and what the fused step was to take at most by them.
PLANNED_BYTES, PLANNED_PRODUCTS, PLANNED_ISSUE, PLANNED_LEAST_SECONDS = 0.85, 0.6, 0.7, 2e-6
PLANNED_STEP_SECONDS = 16e-3
PLANNED = f"""\
Before a kernel had been timed the step was planned by guesses: a launch takes as long as its bytes
at {PLANNED_BYTES:.0%} of the bandwidth, its products at {PLANNED_PRODUCTS:.0%} of their rate or its
instructions at {PLANNED_ISSUE:.0%} of theirs, whichever is longest, and at least
{1e6 * PLANNED_LEAST_SECONDS:g} µs; one launch behind the other, as in a CUDA graph. Of kernels that
are not this package's there are no instructions. Real kernels take
longer, stock's too: [what was measured](#beside-what-was-measured).
"""


def _gpu_table() -> Iterator[str]:
    yield "| GPU | memory | DRAM | bfloat16 | TF32 | FP32 | FP64 | multiprocessors | source |"
    yield "|---|---:|---:|---:|---:|---:|---:|---:|---|"
    for gpu in GPUS.values():
        rates = (gpu.peaks[unit] / 1e12 for unit in ("bfloat16", "tf32", "float32", "float64"))
        cells = " | ".join(f"{rate:g} TFLOP/s" for rate in rates)
        bandwidth = f"{gpu.bandwidth / 1e12:g} TB/s"
        size, issue = f"{gpu.memory // GIB} GiB", f"{gpu.multiprocessors}, {gpu.clock / 1e9:g} GHz"
        yield f"| {gpu.name} | {size} | {bandwidth} | {cells} | {issue} | {gpu.source} |"


def trace(name: str) -> dict[str, Step]:
    """The steps of a variant by blocks, launched as on Hopper."""
    resolution = get_preprocessing(name).resolution
    architecture = GPUS["h100"].architecture
    return {
        blocks: TrainingStep(name, resolution, blocks, architecture=architecture).trace(BATCH)
        for blocks in BLOCKS
    }


def step_rows(name: str, steps: dict[str, Step]) -> Iterator[str]:
    """A variant's rows of the first table."""
    for blocks in BLOCKS:
        step = steps[blocks]
        traffic = sum(one.bytes for one in step.passes) / 1e9
        flops = sum(one.flops for one in step.passes) / 1e12
        times = []
        for gpu in (GPUS[name] for name in COMPARED):
            milliseconds = floor_seconds(step.passes, gpu) * 1e3
            times.append(f"{milliseconds:.1f}" if step.peak <= capacity(gpu) else "does not fit")
        issue = 1e3 * issue_seconds(step.passes, GPUS[ISSUE_ON])
        times.append("" if blocks == "stock" else f"{issue:.1f}")
        size = f"{name}, {get_preprocessing(name).resolution} px"
        cells = (size, blocks, f"{step.peak / GIB:.1f}", f"{traffic:.1f}", f"{flops:.2f}")
        yield f"| {' | '.join((*cells, str(len(step.passes)), *times))} |"


def forecast_rows(name: str, steps: dict[str, Step]) -> Iterator[str]:
    """A variant's rows of the table of launches and forecasts."""
    gpu = GPUS[FORECAST_ON]
    for blocks in BLOCKS:
        step = steps[blocks]
        cells = [f"{name}, {get_preprocessing(name).resolution} px", blocks]
        cells += [str(step.forward), str(len(step.passes))]
        if step.peak <= capacity(gpu):
            graphed, compiled, eager = (
                f"{1e3 * seconds(step.passes, gpu):.1f}"
                for seconds in (graphed_seconds, compiled_seconds, eager_seconds)
            )
            cells += [graphed, compiled if blocks == "stock" else "", eager]
        else:
            cells += ["does not fit"] * 3
        yield f"| {' | '.join(cells)} |"


def measured(workload: str, contender: str) -> tuple[str, float] | None:
    """(run, ms) of a step of the headline, of the latest run that has it; None: of none."""
    for run in sorted(RUNS.iterdir(), key=lambda folder: int(folder.name), reverse=True):
        for line in (run / "results.jsonl").read_text().splitlines():
            found = json.loads(line)
            if found["section"] == "headline":
                for row in found.get("rows", ()):
                    if (row.get("workload"), row.get("contender")) == (workload, contender):
                        return run.name, row["ms"]
    return None


def comparison_rows(pairs: Iterable[tuple[str, int]]) -> Iterator[str]:
    """Forecasts beside what was measured of (variant, batch), where it was."""
    gpu = GPUS[FORECAST_ON]
    for name, batch in pairs:
        resolution = get_preprocessing(name).resolution
        workload = f"{name} {resolution} px, batch {batch}, training"
        for contender, blocks in CONTENDERS.items():
            step = TrainingStep(name, resolution, blocks, architecture=gpu.architecture)
            passes = step.trace(batch).passes
            ways = [("", eager_seconds), (GRAPHED, graphed_seconds)]
            if blocks == "stock":
                ways.append((UNDER_COMPILE, compiled_seconds))
            for way, seconds in ways:
                if (found := measured(workload, contender + way)) is None:
                    continue
                run, took = found
                forecast = 1e3 * seconds(passes, gpu)
                cells = (f"{took:.1f}", run, f"{forecast:.1f}", f"{forecast / took:.2f}")
                yield f"| {name}, batch {batch} | {contender}{way} | {' | '.join(cells)} |"


def kernel_rows(blocks: str, steps: dict[str, Step]) -> Iterator[str]:
    """A table of the kernels that take most of the time on the first GPU, and of the others."""
    yield (
        f"| {blocks} | launches | DRAM GB | TFLOP | "
        + " | ".join(f"{GPUS[gpu].name} ms" for gpu in COMPARED)
        + " |"
    )
    yield "|---" + "|---:" * (3 + len(COMPARED)) + "|"
    made = kernels(steps[blocks].passes)
    by_gpu = [
        {kernel.name: floor_seconds(kernel.passes, GPUS[gpu]) * 1e3 for kernel in made}
        for gpu in COMPARED
    ]
    total = sum(by_gpu[0].values())
    made.sort(key=lambda kernel: -by_gpu[0][kernel.name])
    large = [kernel for kernel in made if by_gpu[0][kernel.name] >= SMALLEST_SHARE * total]
    rest = made[len(large) :]
    for title, group in [(kernel.name, [kernel]) for kernel in large] + [
        (f"{len(rest)} others", rest)
    ]:
        times = (sum(gpu[kernel.name] for kernel in group) for gpu in by_gpu)
        launches = sum(len(kernel.passes) for kernel in group)
        traffic = sum(kernel.bytes for kernel in group) / 1e9
        flops = sum(kernel.flops for kernel in group) / 1e12
        cells = (title, str(launches), f"{traffic:.2f}", f"{flops:.3f}")
        yield f"| {' | '.join((*cells, *(f'{time:.2f}' for time in times)))} |"


def issue_rows(rows: Sequence[Issue], cuda: bool) -> Iterator[str]:
    """Kernels of this package in a step, with stencils of CUDA C++ or of Triton, slowest first."""
    gpu = GPUS[ISSUE_ON]
    columns = ("launches", "instructions, millions", "bytes ms", "products ms", "issue ms")
    title = "stencils by CUDA C++" if cuda else "stencils by Triton"
    yield f"| {title} | {' | '.join((*columns, 'at least ms'))} |"
    yield "|---" + "|---:" * (len(columns) + 1) + "|"
    groups: dict[str, list[Issue]] = {}
    for row in rows:
        if row.launches(cuda):
            groups.setdefault(row.kernel, []).append(row)
    order = sorted(groups, key=lambda kernel: -_issue_seconds(groups[kernel], cuda))
    least = SMALLEST_ISSUE * _issue_seconds(rows, cuda)
    large = [kernel for kernel in order if _issue_seconds(groups[kernel], cuda) >= least]
    rest = [row for kernel in order if kernel not in large for row in groups[kernel]]
    others = f"{len(order) - len(large)} others"
    for name, group in [*((f"`{kernel}`", groups[kernel]) for kernel in large), (others, rest)]:
        yield f"| {name} | {' | '.join(_issue_cells(group, cuda))} |"
    yield f"| **all** | {' | '.join(_issue_cells(rows, cuda))} |"
    most = 1e3 * sum(row.launches(cuda) * row.most for row in rows) / gpu.issue_rate
    yield f"| all, were branches on data to go the other way | | | | | {most:.2f} | |"


def _issue_seconds(rows: Iterable[Issue], cuda: bool) -> float:
    return sum(row.launches(cuda) * row.seconds(GPUS[ISSUE_ON])[2] for row in rows)


def _issue_cells(rows: Sequence[Issue], cuda: bool) -> list[str]:
    launches = sum(row.launches(cuda) for row in rows)
    millions = sum(row.launches(cuda) * row.instructions for row in rows) / 1e6
    times = [
        sum(row.launches(cuda) * seconds(row.seconds(GPUS[ISSUE_ON])) for row in rows) * 1e3
        for seconds in (*map(operator.itemgetter, range(3)), max)
    ]
    return [str(launches), f"{millions:.0f}", *(f"{time:.2f}" for time in times)]


def fitted_rows(rows: Sequence[Total]) -> Iterator[str]:
    """Issue of the steps that were counted, and by the table of moat_kernels/plan/issue.py."""
    rate = GPUS[ISSUE_ON].issue_rate
    for step in dict.fromkeys(row.step for row in rows):
        for stencils, others in (("CUDA C++", "depthwise_"), ("Triton", "cuda_depthwise_")):
            made = [row for row in rows if row.step == step and not row.kernel.startswith(others)]
            counted = 1e3 * sum(row.instructions for row in made) / rate
            by_table = 1e3 * sum(map(predicted_instructions, made)) / rate
            model, pixels, images = step
            cells = (f"{counted:.2f}", f"{by_table:.2f}", f"{by_table / counted:.2f}")
            yield f"| {model}, {pixels} px, {images}: {stencils} | {' | '.join(cells)} |"


def predicted_instructions(row: Total) -> float:
    """Of a kernel in a step, by the table."""
    for_byte, for_flop = INSTRUCTIONS[row.kernel]
    return for_byte * row.bytes + for_flop * row.flops


def issue_verdict(rows: Sequence[Issue]) -> str:
    """What was planned, and what is."""
    seconds, planned = _issue_seconds(rows, cuda=True), issue_table.PLANNED_SECONDS
    met = "met" if seconds <= planned else "not met"
    return (
        f"Planned were at most {planned * 1e3:g} ms of issue for the step. With the stencils of "
        f"CUDA C++ this package's kernels have {seconds * 1e3:.1f} ms: {met}."
    )


def planned_seconds(passes: Iterable[Pass], issue: Iterable[Issue]) -> float:
    """A step by the guesses of before: PyTorch's of `passes`, and the launches of `issue`."""
    gpu = GPUS[ISSUE_ON]
    others = (
        (1, one.bytes / gpu.bandwidth, one.flops / gpu.peaks[one.arithmetic], 0.0)
        for one in passes
        if isinstance(one, OperatorPass)
    )
    own = ((row.launches(True), *row.seconds(gpu)) for row in issue)
    return sum(
        launches
        * max(
            moving / PLANNED_BYTES,
            multiplying / PLANNED_PRODUCTS,
            issuing / PLANNED_ISSUE,
            PLANNED_LEAST_SECONDS,
        )
        for launches, moving, multiplying, issuing in (*others, *own)
    )


def planned_verdict(steps: dict[str, Step], issue: Sequence[Issue]) -> str:
    """What the step was to take by those guesses, and takes. steps: of the variant counted."""
    stock = planned_seconds(steps["stock"].passes, ())
    fused = planned_seconds(steps["none"].passes, issue)
    met = "met" if fused <= PLANNED_STEP_SECONDS else "not met"
    return (
        f"By them the stock step of {STEP} takes {stock * 1e3:.1f} ms on an {GPUS[ISSUE_ON].name}. "
        f"Planned were at most {PLANNED_STEP_SECONDS * 1e3:g} for the fused one, which takes "
        f"{fused * 1e3:.1f}: {met}."
    )


def format_document() -> str:
    """The whole document."""
    steps = {name: trace(name) for name in list_models()}
    lines = [HEAD, "## GPUs", "", "Dense rates, from the vendor's documents.", "", *_gpu_table()]
    lines += ["", "## Training step, predicted", ""]
    columns = ("model", "blocks", "memory GiB", "DRAM GB", "TFLOP", "kernels")
    times = [f"{GPUS[gpu].name}, at least ms" for gpu in COMPARED]
    times.append(f"{GPUS[ISSUE_ON].name}, issue ms")
    lines += [f"| {' | '.join((*columns, *times))} |", "|---|---" + "|---:" * 8 + "|"]
    for name in list_models():
        lines += step_rows(name, steps[name])
    gpu = GPUS[FORECAST_ON].name
    lines += ["", "## Launches, and forecasts", "", FORECAST]
    ways = (f"{way}, {gpu} ms" for way in ("CUDA graph", "compiled", "eager"))
    columns = ("model", "blocks", "launches of forward", "launches", *ways)
    lines += [f"| {' | '.join(columns)} |", "|---|---" + "|---:" * 5 + "|"]
    for name in list_models():
        lines += forecast_rows(name, steps[name])
    lines += ["", "### Beside what was measured", ""]
    lines += [
        "By the latest run that has it, with the kernels of then; the forecast is of those of now.",
        "",
    ]
    lines += ["| step | blocks | measured ms | run | forecast ms | forecast / measured |"]
    lines += ["|---|---|---:|---:|---:|---:|", *comparison_rows(MEASURED)]
    issue = issue_table.read_file()
    lines += ["", "## Issue time", "", ISSUE, issue_verdict(issue), ""]
    lines += [*issue_rows(issue, cuda=True), "", *issue_rows(issue, cuda=False)]
    lines += ["", FITTED_HEAD, "|---" + "|---:" * 3 + "|", *fitted_rows(issue_fit.read_file())]
    lines += ["", "### As it was planned", "", PLANNED]
    lines += [planned_verdict(trace(issue_table.MODEL), issue)]
    lines += ["", "## Kernels, predicted", ""]
    lines += [f"At least 2 % of the step's time on {GPUS[COMPARED[0]].name} each.", ""]
    for name in list_models():
        lines += [f"### {name}", ""]
        for blocks in LISTED:
            lines += [*kernel_rows(blocks, steps[name]), ""]
    return "\n".join(lines).rstrip() + "\n"
