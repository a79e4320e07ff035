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
INSTRUCTIONS: dict[str, tuple[float, float]] = {
    "bias_gradient_kernel": (0.0763, 0.0028),
    "branch_gradient_kernel": (0.112, 0),
    "correction_kernel": (0.677, 0.00279),
    "cuda_depthwise_backward": (0.279, 0),
    "cuda_depthwise_forward": (0.334, 0.0238),
    "depthwise_backward_kernel": (0.291, 0.101),
    "depthwise_kernel": (0.579, 0.0365),
    "excite_backward_kernel": (1.5, 0),
    "excite_kernel": (0.4, 0),
    "excite_weight_kernel": (0.404, 0.0144),
    "expand_input_kernel": (0.088, 0.000341),
    "expand_kernel": (0.215, 0.000321),
    "expand_products_kernel": (0.117, 0.000537),
    "fold_gradient_kernel": (0.135, 0.00181),
    "fold_sums_kernel": (0.208, 0),
    "fold_weights_kernel": (0.172, 0),
    "forward_kernel": (0, 0.00492),
    "gradient_kernel": (0, 0.00472),
    "key_value_gradient_kernel": (0.116, 0.00102),
    "layer_norm_backward_kernel": (0.111, 0),
    "norm_and_cast_kernel": (0.165, 0),
    "norm_gradient_kernel": (0.126, 0),
    "norm_kernel": (0.304, 0),
    "pool_kernel": (0.27, 0),
    "project_input_kernel": (0.354, 0.000909),
    "project_kernel": (0.147, 0.00211),
    "project_weight_kernel": (0.24, 0.00324),
    "query_gradient_kernel": (0.241, 0.000621),
    "row_moments_kernel": (0.166, 0),
}


def issue_seconds(passes: Iterable[Pass], gpu: Gpu) -> float:
    """Time to issue the instructions of this package's kernels at the full rate, 16-bit tensors.

    Of launches that are not in the table, PyTorch's among them, nothing is known: 0.
    """
    return sum(map(_instructions, passes)) / gpu.issue_rate


def _instructions(one: Pass) -> float:
    for_byte, for_flop = INSTRUCTIONS.get(one.kernel, (0.0, 0.0))
    return for_byte * one.bytes + for_flop * one.flops
