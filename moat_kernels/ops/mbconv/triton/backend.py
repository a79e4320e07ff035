"""The inverted bottleneck by Triton kernels on GPUs, in float32, bfloat16 and float16.

Only wide tensors go through kernels (kernels/, and cuda_kernels.py by the choice that passes.py
makes); norms are folded into their neighbours (expand.py, training.py).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor

from moat_kernels.ops.mbconv.algebra.coverage import unsupported_by_kernels
from moat_kernels.ops.mbconv.description import MBConvDescription, MBConvParameters

# cuda_kernels defines its operators, launch_table registers itself, when the package is imported.
from moat_kernels.ops.mbconv.triton import cuda_kernels, launch_table  # noqa: F401
from moat_kernels.ops.triton_support.launching import DTYPES, unsupported_tensor

if TYPE_CHECKING:
    from moat_kernels.ops.mbconv.triton.training import backward as backward
    from moat_kernels.ops.mbconv.triton.training import evaluate as evaluate
    from moat_kernels.ops.mbconv.triton.training import forward as forward

# Offsets within one image's map are 32-bit in the stencils; those between images are 64-bit.
LARGEST_MAP = 2**31


def unsupported(x: Tensor, parameters: MBConvParameters, description: MBConvDescription) -> str:
    """Why this backend does not cover a call; empty: it does."""
    reason = unsupported_tensor(x)
    if reason:
        return reason
    weights = (parameters.expand_weight, parameters.depthwise_weight, parameters.project_weight)
    dtypes = {weight.dtype for weight in weights}
    if len(dtypes) > 1 or not dtypes <= set(DTYPES):
        return f"weights in {', '.join(sorted(map(str, dtypes)))}"
    reason = unsupported_by_kernels(parameters, description)
    if reason:
        return reason
    if description.project_norm is not None:
        return "a project_norm"
    if x.shape[0] == 0:
        return "an empty batch"
    if x.shape[2] * x.shape[3] * parameters.expand_weight.shape[0] >= LARGEST_MAP:
        return f"wide maps of {LARGEST_MAP} elements or more"
    return ""


def __getattr__(name: str) -> Any:
    """`evaluate`, `forward` and `backward`: imported, with Triton, for the first call."""
    if name not in ("evaluate", "forward", "backward"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from moat_kernels.ops.mbconv.triton import training

    return getattr(training, name)
