"""What this package's kernels take to start their instructions.

How many each issues was counted in machine code for Hopper (docs/roofline.md says how) in steps of
four variants, in bfloat16. It is close to a sum of what its bytes and its products take, and that
is what the table has. tests/plan/test_issue_table.py says how close.
"""

from __future__ import annotations

from collections.abc import Iterable

from moat_kernels.ops.triton_support.traffic import Pass
from moat_kernels.plan.gpus import Gpu

# Instructions of warps for each byte that crosses DRAM and for each FLOP of products, by kernel.
# `python benchmarks/issue.py` prints it.
INSTRUCTIONS: dict[str, tuple[float, float]] = {}


def issue_seconds(passes: Iterable[Pass], gpu: Gpu) -> float:
    """Time to issue the instructions of this package's kernels at the full rate, 16-bit tensors.

    Of launches that are not in the table, PyTorch's among them, nothing is known: 0.
    """
    return sum(map(_instructions, passes)) / gpu.issue_rate


def _instructions(one: Pass) -> float:
    for_byte, for_flop = INSTRUCTIONS.get(one.kernel, (0.0, 0.0))
    return for_byte * one.bytes + for_flop * one.flops
