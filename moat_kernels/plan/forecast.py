"""What a step will take: the floors of its launches, how near kernels come to them, and the host.

The constants below were measured, the only ones in this folder: on H200s, with moat_0 at 224 px and
batch 64 in bfloat16 (docs/gpu_results.md). docs/roofline.md compares what follows from them with
other steps that were measured.
"""

from __future__ import annotations

from collections.abc import Sequence

from moat_kernels.ops.triton_support.traffic import Pass
from moat_kernels.plan.gpus import Gpu
from moat_kernels.plan.operators import OperatorPass
from moat_kernels.plan.roofline import floor_seconds

# Floor by time. Of this package's kernels: with it the 339 launches of the fused step take the 21.1
# ms that they took in run 8.
EFFICIENCY = 0.25
# Of PyTorch's, cuDNN's and cuBLAS' kernels, and the least that a launch takes in a CUDA graph, of
# anybody's kernel: with both the stock step takes 52.7 ms, as in a graph in run 5 (53.0 in run 8),
# and what is not ours of the fused one 4 ms, as by CUPTI in run 8. A trace counts fewer launches
# than there are (1746 of 2150, 541 of 619), and what the others take is in these numbers.
OPERATOR_EFFICIENCY = 0.39
LEAST_SECONDS = 2.7e-6
# Of the host from one launch of PyTorch's to the next: 154 ms of a fused step, eager, by 4723, most
# of them PyTorch's (run 5); 21 to 42 microseconds in other runs on the same kind of machine.
HOST_SECONDS = 33e-6
# Likewise of this package's, with what Python does around it, once calls are replayed: 36.5 ms of
# the fused step in run 9 less the former of 202, by 339.
OWN_HOST_SECONDS = 88e-6
# What torch.compile leaves of what PyTorch's launches take in a CUDA graph: 38.8 ms of 52.7, the
# stock step in run 5. It makes one kernel of several, keeps less and spares the host.
COMPILED = 0.74


def graphed_seconds(passes: Sequence[Pass], gpu: Gpu) -> float:
    """Forecast of the time of these launches in a CUDA graph, one after the other."""
    return sum(_seconds(one, gpu) for one in passes)


def eager_seconds(passes: Sequence[Pass], gpu: Gpu) -> float:
    """Forecast of their time launched one by one, by a host that may be slower than the GPU."""
    host = sum(HOST_SECONDS if _is_pytorch(one) else OWN_HOST_SECONDS for one in passes)
    return max(graphed_seconds(passes, gpu), host)


def compiled_seconds(passes: Sequence[Pass], gpu: Gpu) -> float:
    """Forecast of the time of a stock step, all of its launches PyTorch's, under torch.compile."""
    return COMPILED * graphed_seconds(passes, gpu)


def _is_pytorch(one: Pass) -> bool:
    return isinstance(one, OperatorPass)


def _seconds(one: Pass, gpu: Gpu) -> float:
    efficiency = OPERATOR_EFFICIENCY if _is_pytorch(one) else EFFICIENCY
    return max(floor_seconds([one], gpu) / efficiency, LEAST_SECONDS)
