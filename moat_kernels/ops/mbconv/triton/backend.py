"""The inverted bottleneck by Triton kernels on GPUs, in float32, bfloat16 and float16.

Only wide tensors go through kernels (triton_kernels/, and cuda_kernels.py by the choice that
depthwise_passes.py makes); norms are folded into their neighbours (triton_expand.py,
triton_training.py). Triton is imported when the first call is computed.
"""

from __future__ import annotations

from torch import Tensor

from moat_kernels.ops.mbconv.description import NORMS, MBConvDescription, MBConvParameters
from moat_kernels.ops.mbconv.torch import backend as torch_backend
from moat_kernels.ops.mbconv.torch.backend import Forward

# cuda_kernels defines its operators when the package is imported, not while a call is traced.
from moat_kernels.ops.triton_support.launching import DTYPES, unsupported_tensor

KERNEL_SIZE = (3, 3)
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
    if description.order != "expand_first":
        return f"order {description.order!r}"
    if description.stride not in (1, 2):
        return f"stride {description.stride}"
    if tuple(parameters.depthwise_weight.shape[2:]) != KERNEL_SIZE:
        return f"a depthwise kernel of {tuple(parameters.depthwise_weight.shape[2:])}"
    if description.pre_activation != "identity":
        return f"pre_activation {description.pre_activation!r}"
    gate = description.squeeze_excite
    if gate is not None and gate.position != "after_activation":
        return f"squeeze-excite {gate.position!r}"
    if description.project_norm is not None:
        return "a project_norm"
    if x.shape[2] * x.shape[3] * parameters.expand_weight.shape[0] >= LARGEST_MAP:
        return f"wide maps of {LARGEST_MAP} elements or more"
    return ""


def recompute_level(
    recompute: str, x: Tensor, parameters: MBConvParameters, description: MBConvDescription
) -> str:
    """The level that "auto" stands for: "none" crosses DRAM least often."""
    return "none" if recompute == "auto" else recompute


def forward(
    x: Tensor,
    parameters: MBConvParameters,
    description: MBConvDescription,
    recompute: str,
    drop_path_scale: Tensor | None,
) -> Forward:
    """Compute the block; norms are `frozen` where they do not measure the batch."""
    from moat_kernels.ops.mbconv.triton import training as triton_training

    if x.shape[0] == 0:
        return torch_backend.forward(x, parameters, description, recompute, drop_path_scale)
    norms = [getattr(description, name) for name in NORMS]
    if recompute == "block" and all(norm is None or norm.frozen for norm in norms):
        output = triton_training.evaluate(x, parameters, description, drop_path_scale)
        return Forward(output, {}, [])
    return triton_training.forward(x, parameters, description, recompute, drop_path_scale)


def backward(
    grad: Tensor,
    x: Tensor,
    parameters: MBConvParameters,
    description: MBConvDescription,
    recompute: str,
    drop_path_scale: Tensor | None,
    saved: list[Tensor],
    needed: frozenset[str],
) -> dict[str, Tensor]:
    """Gradients by name, of "x" and of the parameters in `needed` (and of some others)."""
    from moat_kernels.ops.mbconv.triton import training as triton_training

    if x.shape[0] == 0:
        return torch_backend.backward(
            grad, x, parameters, description, recompute, drop_path_scale, saved, needed
        )
    return triton_training.backward(
        grad, x, parameters, description, drop_path_scale, saved, needed
    )
