"""Predictions as tables for the terminal."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from moat_kernels.plan.forecast import compiled_seconds, eager_seconds, graphed_seconds
from moat_kernels.plan.gpus import Gpu
from moat_kernels.plan.issue import issue_seconds
from moat_kernels.plan.roofline import floor_seconds, kernels
from moat_kernels.plan.step import Step

GIB = 2**30

# An assumption: the CUDA context, workspaces of cuBLAS and cuDNN, and fragmentation.
RESERVED = 2 * GIB

NOTES = f"""\
predicted from shapes and data sheets, forecasts with six numbers that were measured on H200s
memory    tensors at the worst moment, with gradients and the optimiser's state, exactly counted;
          {RESERVED // GIB} GiB are left to the CUDA context, workspaces and fragmentation
launches  forward / all; PyTorch launches somewhat more than its operators show
step      at least: each kernel's bytes at full DRAM bandwidth or its products at the full rate,
          whichever takes longer; launches and all that is less than ideal come on top
          issue: what the instructions of this package's kernels take to start at the full rate,
          with 16-bit tensors, by counts in machine code for Hopper; other kernels' are not counted
          graph: a forecast for a CUDA graph, kernels as near their floors as on the H200
          eager: that, or what a host takes for the launches (88 us for each of this package's,
          33 for others; hosts differ by a half)
          compiled: a forecast for stock blocks under torch.compile; in a compiled model the host
          launches fused blocks as in eager mode
          docs/roofline.md has both beside what was measured"""

WIDTH = 11


@dataclass(frozen=True)
class Prediction:
    """A training step on a GPU. batch: 0 where not even one image fits; step: None then.

    precision: one of `step.PRECISIONS`.
    """

    blocks: str
    batch: int
    step: Step | None
    gpu: Gpu
    precision: str

    @property
    def fits(self) -> bool:
        return self.step is not None and self.step.peak <= capacity(self.gpu)


def capacity(gpu: Gpu) -> int:
    """Bytes of a GPU's memory that tensors can have."""
    return gpu.memory - RESERVED


def label(blocks: str) -> str:
    """A member of `step.BLOCKS` in words."""
    return blocks if blocks == "stock" else f'fused, recompute="{blocks}"'


def format_predictions(predictions: Iterable[Prediction]) -> str:
    """One row each."""
    columns = ("batch", "memory GiB", "DRAM GB", "TFLOP", "launches", *["step ms"] * 5, "images/s")
    kinds = (*[""] * 4, "fwd/all", *("at least", "issue", "graph", "compiled", "eager"), "at most")
    lines = [
        f"{first:<26}" + "".join(f"{cell:>{WIDTH}}" for cell in row)
        for first, row in (("blocks", columns), ("", kinds))
    ]
    lines.append("-" * len(lines[0]))
    for prediction in predictions:
        lines.append(f"{label(prediction.blocks):<26}" + _cells(prediction))
    return "\n".join(lines)


def _cells(prediction: Prediction) -> str:
    step, batch = prediction.step, prediction.batch
    if step is None:
        return f"{'none fits':>{WIDTH}}"
    cells = [
        f"{batch}",
        f"{step.peak / GIB:.2f}",
        f"{sum(one.bytes for one in step.passes) / 1e9:.1f}",
        f"{sum(one.flops for one in step.passes) / 1e12:.2f}",
        f"{step.forward}/{len(step.passes)}",
    ]
    if prediction.fits:
        stock = prediction.blocks == "stock"
        least, issue, graphed, compiled, eager = (
            seconds(step.passes, prediction.gpu)
            for seconds in (
                *(floor_seconds, issue_seconds, graphed_seconds),
                *(compiled_seconds, eager_seconds),
            )
        )
        counted = not stock and prediction.precision != "float32"
        shown = (least, issue if counted else None, graphed, compiled if stock else None, eager)
        cells += ["-" if each is None else f"{each * 1e3:.1f}" for each in shown]
        cells.append(f"{batch / least:.0f}")
    else:
        cells.append("does not fit")
    return "".join(f"{cell:>{WIDTH}}" for cell in cells)


def format_kernels(prediction: Prediction) -> str:
    """One row for each kernel of a step, slowest first."""
    if prediction.step is None:
        return ""
    rows = [
        (floor_seconds(kernel.passes, prediction.gpu), kernel)
        for kernel in kernels(prediction.step.passes)
    ]
    lines = [f"{label(prediction.blocks)}, batch {prediction.batch}: predicted, by kernel"]
    lines.append(f"{'':<52}{'launches':>10}{'DRAM GB':>10}{'TFLOP':>10}{'at least ms':>13}")
    for seconds, kernel in sorted(rows, key=lambda row: -row[0]):
        lines.append(
            f"{kernel.name:<52}{len(kernel.passes):>10}{kernel.bytes / 1e9:>10.3f}"
            f"{kernel.flops / 1e12:>10.3f}{seconds * 1e3:>13.3f}"
        )
    return "\n".join(lines)
