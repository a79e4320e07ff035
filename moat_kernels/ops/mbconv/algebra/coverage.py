"""What the kernels of the cpu and triton backends have in common: which blocks they compute."""

from __future__ import annotations

from moat_kernels.ops.mbconv.description import NORMS, MBConvDescription, MBConvParameters

KERNEL_SIZE = (3, 3)


def unsupported_by_kernels(parameters: MBConvParameters, description: MBConvDescription) -> str:
    """Why no kernel computes such a block, whatever the tensors' device; empty if some do."""
    if description.synchronized:
        return "synchronised norms"
    if description.order != "expand_first":
        return f"order {description.order!r}"
    if description.stride not in (1, 2):
        return f"stride {description.stride}"
    if tuple(parameters.depthwise_weight.shape[2:]) != KERNEL_SIZE:
        return f"a depthwise kernel of {tuple(parameters.depthwise_weight.shape[2:])}"
    if description.pre_activation != "identity":
        return f"pre_activation {description.pre_activation!r}"
    squeeze_excite = description.squeeze_excite
    if squeeze_excite is not None and squeeze_excite.position != "after_activation":
        return f"squeeze-excite {squeeze_excite.position!r}"
    return ""


def all_frozen(description: MBConvDescription) -> bool:
    """Whether no norm measures its batch."""
    norms = [getattr(description, name) for name in NORMS]
    return all(norm is None or norm.frozen for norm in norms)
