"""Training with a batch norm behind the project convolution, around kernels that have none.

    output = shortcut + drop_path(norm(bottleneck(x)))

The bottleneck is native; norm and shortcut are stock passes over C_out channels, a small part of
it. The norm's input, one map more, is kept for the backward pass at every level of `recompute`.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from moat_kernels.ops.mbconv.algebra.shortcut import scale_samples, shortcut, shortcut_backward
from moat_kernels.ops.mbconv.algebra.stages import BatchNorm
from moat_kernels.ops.mbconv.contract import Forward
from moat_kernels.ops.mbconv.cpu import training as bottleneck_training
from moat_kernels.ops.mbconv.description import MBConvDescription, MBConvParameters, NormParameters


def _bottleneck(
    parameters: MBConvParameters, description: MBConvDescription
) -> tuple[MBConvParameters, MBConvDescription]:
    """The block without the norm, the shortcut and what belongs to them."""
    return (
        parameters._replace(
            project_norm=NormParameters(), shortcut_weight=None, shortcut_bias=None
        ),
        dataclasses.replace(description, project_norm=None, residual=False, pool=None),
    )


def _norm(parameters: MBConvParameters, description: MBConvDescription) -> BatchNorm:
    assert description.project_norm is not None
    return BatchNorm("project_norm", description.project_norm, parameters.project_norm)


def forward(
    x: Tensor,
    parameters: MBConvParameters,
    description: MBConvDescription,
    recompute: str,
    drop_path_scale: Tensor | None,
    dtype: torch.dtype | None,
    output_dtype: torch.dtype,
) -> Forward:
    """Compute the block; saves the norm's input and statistics, then what the bottleneck saves."""
    inner = bottleneck_training.forward(
        x, *_bottleneck(parameters, description), recompute, None, dtype, output_dtype
    )
    norm = _norm(parameters, description)
    output = norm.forward(inner.output)
    if description.residual:
        added = shortcut(x, parameters, description)
        output = scale_samples(output, drop_path_scale) + added
    moments = {**inner.moments, **norm.batch_moments()}
    return Forward(output, moments, [inner.output, *norm.statistics, *inner.saved])


def unmeasured(x: Tensor, description: MBConvDescription) -> list[Tensor]:
    """What `forward` saves for recompute="block", empty; see training.unmeasured."""
    return [x.new_empty(0) for _ in range(3)] + bottleneck_training.unmeasured(x, description)


def backward(
    grad: Tensor,
    x: Tensor,
    parameters: MBConvParameters,
    description: MBConvDescription,
    drop_path_scale: Tensor | None,
    dtype: torch.dtype | None,
    saved: list[Tensor],
    needed: frozenset[str],
) -> dict[str, Tensor]:
    """Gradients by name, of "x" and of the parameters in `needed` (and of some others)."""
    bottleneck = _bottleneck(parameters, description)
    if not saved[0].numel():  # see `unmeasured`
        saved = forward(x, parameters, description, "block", None, dtype, x.dtype).saved
    norm = _norm(parameters, description)
    norm.needed = needed
    projected, *statistics = saved[:3]
    norm.statistics = tuple(statistics)
    grad_output = scale_samples(grad, drop_path_scale if description.residual else None)
    grad_projected = norm.backward(grad_output, projected, True)
    assert grad_projected is not None
    gradients = bottleneck_training.backward(
        grad_projected, x, *bottleneck, None, dtype, saved[3:], needed
    )
    gradients.update(norm.gradients)
    if description.residual:
        grad_shortcut, others = shortcut_backward(grad, x, parameters, description, needed)
        gradients |= others
        if grad_shortcut is not None:
            gradients["x"] = gradients["x"] + grad_shortcut
    return gradients
