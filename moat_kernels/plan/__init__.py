"""What a training step needs on a GPU, predicted on paper: memory, DRAM traffic, FLOPs, time.

`python -m moat_kernels.plan --model moat_2 --gpu h100` prints the largest batch that fits and the
least time a step takes, with stock and with fused blocks. Nothing runs on a GPU and none is needed:
the step is traced on meta tensors (step.py), which counts the memory exactly and every kernel's
bytes and FLOPs (meter.py, operators.py); a GPU's data sheet (gpus.py) turns these into a lower
bound of the time (roofline.py), and six numbers measured on H200s into forecasts of it, eager, in a
CUDA graph and under torch.compile (forecast.py). What the instructions of this package's kernels
take to issue follows from counts in their machine code (issue.py). No other number here was
measured.
"""

from moat_kernels.plan.batch import largest_batch
from moat_kernels.plan.forecast import compiled_seconds, eager_seconds, graphed_seconds
from moat_kernels.plan.gpus import GPUS, Gpu
from moat_kernels.plan.issue import issue_seconds
from moat_kernels.plan.roofline import floor_seconds, kernels
from moat_kernels.plan.step import BLOCKS, OPTIMIZERS, PRECISIONS, Step, TrainingStep

__all__ = [
    "BLOCKS",
    "GPUS",
    "OPTIMIZERS",
    "PRECISIONS",
    "Gpu",
    "Step",
    "TrainingStep",
    "compiled_seconds",
    "eager_seconds",
    "floor_seconds",
    "graphed_seconds",
    "issue_seconds",
    "kernels",
    "largest_batch",
]
