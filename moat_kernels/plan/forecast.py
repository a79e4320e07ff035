"""What a step will take: the floors of its launches, how near kernels come to them, and the host.

The constants below were measured, the only ones in this folder: on one H200, with moat_0 at 224 px
and batch 64 in bfloat16 (docs/gpu_results.md, run 5). docs/roofline.md compares what follows from
them with other steps that were measured. How many instructions a kernel issues is not looked at,
and steps under torch.compile, which makes one kernel of several, are not forecast.
"""

from __future__ import annotations

from collections.abc import Sequence

from moat_kernels.ops.triton_support.traffic import Pass
from moat_kernels.plan.gpus import Gpu
from moat_kernels.plan.operators import OperatorPass
from moat_kernels.plan.roofline import floor_seconds

# Floor by time. Of this package's kernels: with it the 193 launches of the fused step take the 26.7
# ms that they took.
EFFICIENCY = 0.18
# Of PyTorch's, cuDNN's and cuBLAS' kernels, and the least that a launch takes in a CUDA graph, of
# anybody's kernel: with both the stock step takes 52.7 ms, and what is not ours of the fused one
# 17.6 ms, as in a graph and by CUPTI. A trace counts fewer launches than there are (1746 of 2150,
# 4723 of 5003), and what the others take is in these numbers.
OPERATOR_EFFICIENCY = 0.39
LEAST_SECONDS = 2.7e-6
# From one launch of the trace to the next by the host: 154 ms of the fused step, eager, by 4723. In
# other runs on the same kind of machine it was 21 to 42 microseconds.
HOST_SECONDS = 33e-6


def graphed_seconds(passes: Sequence[Pass], gpu: Gpu) -> float:
    """Forecast of the time of these launches in a CUDA graph, one after the other."""
    return sum(_seconds(one, gpu) for one in passes)


def eager_seconds(passes: Sequence[Pass], gpu: Gpu) -> float:
    """Forecast of their time launched one by one, by a host that may be slower than the GPU."""
    return max(graphed_seconds(passes, gpu), HOST_SECONDS * len(passes))


def _seconds(one: Pass, gpu: Gpu) -> float:
    efficiency = OPERATOR_EFFICIENCY if isinstance(one, OperatorPass) else EFFICIENCY
    return max(floor_seconds([one], gpu) / efficiency, LEAST_SECONDS)
