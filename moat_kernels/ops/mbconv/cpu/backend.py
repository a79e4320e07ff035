"""The inverted bottleneck by native CPU kernels (csrc/cpu).

With fixed statistics it is one operator: batch norms are folded into the weights, and strips of
rows go through expand, depthwise and project in cache, in float32 whatever the dtype of x.
Training is a sequence of passes over wide tensors, which are kept in the convolutions' dtype, or
autocast's, and multiplied in it where the CPU can (training.py).
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from moat_kernels.ops.common.autocast import autocast_dtype
from moat_kernels.ops.common.batch_norm import RunningUpdate
from moat_kernels.ops.mbconv.algebra.coverage import all_frozen, unsupported_by_kernels
from moat_kernels.ops.mbconv.contract import Forward
from moat_kernels.ops.mbconv.cpu import project_norm
from moat_kernels.ops.mbconv.cpu import training as plain_training
from moat_kernels.ops.mbconv.cpu.arguments import block_tensors, eval_settings
from moat_kernels.ops.mbconv.cpu.fakes import register_fakes
from moat_kernels.ops.mbconv.cpu.training import as_float
from moat_kernels.ops.mbconv.description import (
    MBConvDescription,
    MBConvParameters,
    cast_weights,
    flatten,
    needs_gradient,
)

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def unsupported(x: Tensor, parameters: MBConvParameters, description: MBConvDescription) -> str:
    """Why this backend does not cover a call; empty: it does."""
    if x.device.type != "cpu":
        return f"tensors on {x.device}"
    if x.dtype not in DTYPES:
        return f"dtype {x.dtype}"
    return (
        unsupported_by_kernels(parameters, description)
        or _unsupported_weights(parameters)
        or _unsupported_in_training(x, parameters, description)
    )


def _unsupported_weights(parameters: MBConvParameters) -> str:
    expand, project = parameters.expand_weight, parameters.project_weight
    if torch.float64 in (expand.dtype, project.dtype):
        return "parameters in float64"
    if not expand.numel() or not project.numel():
        return "maps without channels"
    reduce = parameters.se_reduce_weight
    if reduce is not None and not reduce.numel():
        return "squeeze-excite without channels"
    return ""


def _unsupported_in_training(
    x: Tensor, parameters: MBConvParameters, description: MBConvDescription
) -> str:
    if all_frozen(description) and not needs_gradient(x, parameters):
        return ""
    dtypes = {tensor.dtype for tensor in (x, *flatten(parameters)[0]) if tensor is not None}
    for dtype in dtypes.difference(DTYPES):
        return f"training with parameters in {dtype}"
    if description.project_norm is not None:
        if dtypes != {torch.float32}:
            return "training with a project_norm in another dtype than float32"
        if autocast_dtype(x) is not None:
            return "training with a project_norm under autocast"
    if x.shape[0] == 0:
        return "training with an empty batch"
    return ""


def forward(
    x: Tensor,
    parameters: MBConvParameters,
    description: MBConvDescription,
    recompute: str,
    drop_path_scale: Tensor | None,
    dtype: torch.dtype | None,
    updates: Mapping[str, RunningUpdate],
) -> Forward:
    """Compute the block, and save what `recompute` says beside the statistics."""
    training = plain_training if description.project_norm is None else project_norm
    if recompute == "block" and all_frozen(description):
        # Faster than training's passes, and gives none of what those save.
        output = evaluate(x, parameters, description, drop_path_scale, dtype)
        return Forward(output, {}, training.unmeasured(x, description))
    output_dtype = _output_dtype(x, parameters, description, dtype)
    return training.forward(
        x, parameters, description, recompute, as_float(drop_path_scale), dtype, output_dtype
    )


def backward(
    grad: Tensor,
    x: Tensor,
    parameters: MBConvParameters,
    description: MBConvDescription,
    recompute: str,
    drop_path_scale: Tensor | None,
    dtype: torch.dtype | None,
    saved: list[Tensor],
    needed: frozenset[str],
) -> dict[str, Tensor]:
    """Gradients by name, of "x" and of the parameters in `needed` (and of some others)."""
    training = plain_training if description.project_norm is None else project_norm
    return training.backward(
        grad, x, parameters, description, as_float(drop_path_scale), dtype, saved, needed
    )


def evaluate(
    x: Tensor,
    parameters: MBConvParameters,
    description: MBConvDescription,
    drop_path_scale: Tensor | None,
    dtype: torch.dtype | None,
) -> Tensor:
    """The block with fixed statistics: one native operator."""
    parameters = cast_weights(parameters, dtype)
    cached = isinstance(x.shape[2], int) and isinstance(x.shape[3], int)  # symbols have no hash
    settings = (eval_settings if cached else eval_settings.__wrapped__)(description, *x.shape[2:])
    return torch.ops.moat_kernels.cpu_mbconv_eval.default(
        x,
        *block_tensors(parameters),
        drop_path_scale,
        *settings,
        _output_dtype(x, parameters, description, dtype),
    )


def _output_dtype(
    x: Tensor,
    parameters: MBConvParameters,
    description: MBConvDescription,
    dtype: torch.dtype | None,
) -> torch.dtype:
    """What adding the shortcut to the project convolution gives; they differ under autocast."""
    project = dtype or parameters.project_weight.dtype
    if not description.residual:
        return project
    shortcut = parameters.shortcut_weight
    return torch.promote_types(project, x.dtype if shortcut is None else dtype or shortcut.dtype)


register_fakes()
