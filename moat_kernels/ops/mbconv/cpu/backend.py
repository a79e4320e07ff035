"""The inverted bottleneck by native CPU kernels (csrc/cpu).

With fixed statistics it is one operator: batch norms are folded into the weights, and strips of
rows go through expand, depthwise and project in cache, in float32 whatever the dtype of x.
Training is a sequence of passes over wide tensors, which are kept in the convolutions' dtype
(cpu_training.py).
"""

from __future__ import annotations

import torch
from torch import Tensor

from moat_kernels.ops.common.autocast import autocast_dtype
from moat_kernels.ops.mbconv.cpu import project_norm as cpu_project_norm
from moat_kernels.ops.mbconv.cpu import training as cpu_training
from moat_kernels.ops.mbconv.cpu.arguments import KERNEL_SIZE, block_tensors, eval_settings
from moat_kernels.ops.mbconv.cpu.fakes import register_fakes
from moat_kernels.ops.mbconv.description import (
    NORMS,
    WEIGHTS,
    MBConvDescription,
    MBConvParameters,
)
from moat_kernels.ops.mbconv.torch.backend import Forward

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def unsupported(x: Tensor, parameters: MBConvParameters, description: MBConvDescription) -> str:
    """Why this backend does not cover a call; empty: it does."""
    if x.device.type != "cpu":
        return f"tensors on {x.device}"
    if x.dtype not in DTYPES:
        return f"dtype {x.dtype}"
    if any(
        tensor.dtype == torch.float64
        for tensor in (parameters.expand_weight, parameters.project_weight)
    ):
        return "parameters in float64"
    gate_weight = parameters.se_reduce_weight
    if not parameters.expand_weight.numel() or not parameters.project_weight.numel():
        return "maps without channels"
    if gate_weight is not None and not gate_weight.numel():
        return "squeeze-excite without channels"
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
    differentiable = torch.is_grad_enabled() and any(
        tensor is not None and tensor.requires_grad for tensor in _differentiable(x, parameters)
    )
    if differentiable or not is_frozen(description):
        return _unsupported_in_training(x, parameters, description)
    return ""


def _unsupported_in_training(
    x: Tensor, parameters: MBConvParameters, description: MBConvDescription
) -> str:
    tensors = _differentiable(x, parameters)
    for tensor in tensors:
        if tensor is not None and tensor.dtype not in DTYPES:
            return f"training with parameters in {tensor.dtype}"
    if description.project_norm is not None:
        if any(tensor is not None and tensor.dtype != torch.float32 for tensor in tensors):
            return "training with a project_norm in another dtype than float32"
        if autocast_dtype(x) is not None:
            return "training with a project_norm under autocast"
    if x.shape[0] == 0:
        return "training with an empty batch"
    return ""


def is_frozen(description: MBConvDescription) -> bool:
    norms = [getattr(description, name) for name in NORMS]
    return all(norm is None or norm.frozen for norm in norms)


def _differentiable(x: Tensor, parameters: MBConvParameters) -> list[Tensor | None]:
    tensors = [getattr(parameters, name) for name in WEIGHTS]
    for name in NORMS:
        tensors += getattr(parameters, name)[:2]
    return [x, *tensors]


def recompute_level(
    recompute: str, x: Tensor, parameters: MBConvParameters, description: MBConvDescription
) -> str:
    """The level that "auto" stands for: "none" at every shape.

    Its bytes come from memory that is used again and are read back once, which takes less time than
    computing them again: by block shape and in whole models, docs/cpu_kernels.md has the table.
    """
    return "none" if recompute == "auto" else recompute


def forward(
    x: Tensor,
    parameters: MBConvParameters,
    description: MBConvDescription,
    recompute: str,
    drop_path_scale: Tensor | None,
) -> Forward:
    """Compute the block; norms are `frozen` where they do not measure the batch."""
    if recompute == "block" and is_frozen(description):
        return Forward(_evaluate(x, parameters, description, drop_path_scale), {}, [])
    training = cpu_training if description.project_norm is None else cpu_project_norm
    result = training.forward(x, parameters, description, recompute, _as_float(drop_path_scale))
    output = result.output.to(_output_dtype(x, parameters, description))
    return Forward(output, result.moments, result.saved)


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
    """Gradients by name, of "x" and of the parameters in `needed`."""
    training = cpu_training if description.project_norm is None else cpu_project_norm
    return training.backward(
        grad, x, parameters, description, _as_float(drop_path_scale), saved, needed
    )


def _evaluate(
    x: Tensor,
    parameters: MBConvParameters,
    description: MBConvDescription,
    drop_path_scale: Tensor | None,
) -> Tensor:
    cached = isinstance(x.shape[2], int) and isinstance(x.shape[3], int)  # symbols have no hash
    settings = (eval_settings if cached else eval_settings.__wrapped__)(description, *x.shape[2:])
    return torch.ops.moat_kernels.cpu_mbconv_eval.default(
        x,
        *block_tensors(parameters),
        drop_path_scale,
        *settings,
        _output_dtype(x, parameters, description),
    )


def _as_float(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.float().contiguous()


def _output_dtype(
    x: Tensor, parameters: MBConvParameters, description: MBConvDescription
) -> torch.dtype:
    """What adding the shortcut to the project convolution gives; they differ under autocast."""
    dtype = parameters.project_weight.dtype
    if not description.residual:
        return dtype
    shortcut = parameters.shortcut_weight
    return torch.promote_types(dtype, x.dtype if shortcut is None else shortcut.dtype)


register_fakes()
