"""`mbconv`: the function that users and modules call, and its autograd function."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from moat_kernels.ops.common.autocast import autocast_off
from moat_kernels.ops.common.backends import is_exporting
from moat_kernels.ops.common.batch_norm import RunningUpdate
from moat_kernels.ops.common.registration import is_watched
from moat_kernels.ops.common.spatial import in_format_of
from moat_kernels.ops.mbconv import operators, reference
from moat_kernels.ops.mbconv.contract import Moments
from moat_kernels.ops.mbconv.description import (
    NORMS,
    PARAMETER_NAMES,
    MBConvDescription,
    MBConvParameters,
    flatten,
    unflatten,
)
from moat_kernels.ops.mbconv.dispatch import BACKENDS, Plan, plan_call
from moat_kernels.ops.mbconv.operators import name_moments
from moat_kernels.ops.mbconv.running_statistics import finish_updates, plan_updates


def mbconv(
    x: Tensor,
    parameters: MBConvParameters,
    description: MBConvDescription,
    *,
    training: bool = False,
    recompute: str = "auto",
    drop_path_scale: Tensor | None = None,
) -> Tensor:
    """The inverted bottleneck of MBConv and MOAT blocks (MOAT paper, section 3), fused.

    x: [B, C_in, H, W], float64/32/16 or bfloat16, any memory format (channels_last is fastest).
    parameters: the tensors; their shapes stand in MBConvParameters. Running statistics are
        updated in place where a norm measures the batch.
    description: what is computed; see MBConvDescription.
    training: norms normalise with the batch's statistics (unless frozen), else the running ones.
    recompute: what the backward pass recomputes instead of saving: "none" (keeps both wide
        convolution outputs), "expand" (keeps one), "block" (keeps only x), "auto" (the fastest).
    drop_path_scale: [B], multiplies each sample's residual: 0, or 1/p where it survives.

    Returns [B, C_out, H_out, W_out] in x's memory format. Under autocast the convolutions run in
    autocast's dtype, the norms' statistics in float32. Raises ValueError or TypeError naming the
    argument. Not differentiable twice, nor with respect to `drop_path_scale`.
    """
    plan = plan_call(x, parameters, description, training, recompute, drop_path_scale)
    # What runs without Python holds operators of PyTorch and of the native extension only.
    exported = is_exporting() and not plan.moment_counts
    description = plan.description
    updates = plan_updates(plan.moment_counts, parameters, description, plan.value_counts)
    moments: Moments
    # The torch backend chooses by the number of rows, which an export may hold open.
    if plan.backend == "reference" or (exported and plan.backend == "torch"):
        output, moments = reference.mbconv(x, parameters, description, drop_path_scale)
    elif plan.differentiable and not exported:
        collected: dict[str, tuple[Tensor, ...]] = {}
        tensors, running = _operands(parameters, plan)
        output, *measured = _MBConv.apply(
            x, drop_path_scale, plan, updates, collected, *tensors, *running
        )
        moments = name_moments(plan.moment_counts, measured) if measured else collected
    elif (is_watched() or type(x) is not Tensor) and not exported:
        output, moments = _call_operators(x, parameters, plan, drop_path_scale)
    else:
        output, moments = _call_backend(x, parameters, plan, drop_path_scale, updates)
    if plan.moment_counts:
        finish_updates(parameters, description, updates, moments)
    return output


def _operands(
    parameters: MBConvParameters, plan: Plan
) -> tuple[list[Tensor | None], list[Tensor | None]]:
    """The parameters as `flatten` lists them."""
    tensors, running = flatten(parameters)
    # Running statistics that are about to be updated must not be saved for backward.
    return tensors, [
        None if NORMS[index // 2] in plan.moment_counts else tensor
        for index, tensor in enumerate(running)
    ]


def _call_backend(
    x: Tensor,
    parameters: MBConvParameters,
    plan: Plan,
    drop_path_scale: Tensor | None,
    updates: Mapping[str, RunningUpdate],
) -> tuple[Tensor, Moments]:
    """Output and moments of a call without gradients."""
    backend, description = BACKENDS[plan.backend], plan.description
    with autocast_off(x):
        if not plan.moment_counts:
            output = backend.evaluate(x, parameters, description, drop_path_scale, plan.dtype)
            return in_format_of(output, x), {}
        result = backend.forward(
            x, parameters, description, "block", drop_path_scale, plan.dtype, updates
        )
        return in_format_of(result.output, x), result.moments


def _call_operators(
    x: Tensor, parameters: MBConvParameters, plan: Plan, drop_path_scale: Tensor | None
) -> tuple[Tensor, Moments]:
    """`_call_backend` by the operators that compilers and dispatch modes see."""
    tensors, running = _operands(parameters, plan)
    arguments = (x, tensors, running, drop_path_scale, plan.description.encode(), plan.dtype)
    if not plan.moment_counts:
        return torch.ops.moat_kernels.mbconv_evaluate(*arguments, plan.backend), {}
    output, *measured = torch.ops.moat_kernels.mbconv_forward(*arguments, "block", plan.backend)
    return output, name_moments(plan.moment_counts, measured)


class _MBConv(torch.autograd.Function):
    """Saves x, the parameters and what the backend asks for.

    Moments are its results where operators are watched; else they are put into `collected`.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        drop_path_scale: Tensor | None,
        plan: Plan,
        updates: Mapping[str, RunningUpdate],
        collected: dict[str, tuple[Tensor, ...]],
        *tensors: Tensor | None,
    ) -> tuple[Tensor, ...]:
        parameters, running = tensors[: len(PARAMETER_NAMES)], tensors[len(PARAMETER_NAMES) :]
        moments: list[Tensor] = []
        if is_watched():
            choices = (plan.description.encode(), plan.dtype, plan.recompute, plan.backend)
            output, *rest = torch.ops.moat_kernels.mbconv_forward(
                x, parameters, running, drop_path_scale, *choices
            )
            count = sum(plan.moment_counts.values())
            moments, saved = rest[:count], rest[count:]
        else:
            with autocast_off(x):
                result = BACKENDS[plan.backend].forward(
                    x,
                    unflatten(parameters, running),
                    plan.description,
                    plan.recompute,
                    drop_path_scale,
                    plan.dtype,
                    updates,
                )
            output, saved = in_format_of(result.output, x), result.saved
            collected.update(result.moments)
        ctx.save_for_backward(x, drop_path_scale, *tensors, *saved)
        ctx.plan = plan
        ctx.mark_non_differentiable(*moments)
        ctx.set_materialize_grads(False)
        return output, *moments

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
        if grad is None:
            return (None,) * len(ctx.needs_input_grad)
        count, end = len(PARAMETER_NAMES), len(PARAMETER_NAMES) + 2 * len(NORMS)
        needs = [ctx.needs_input_grad[0], *ctx.needs_input_grad[5 : 5 + count]]
        x, drop_path_scale, *rest = ctx.saved_tensors
        plan = ctx.plan
        tensors = (grad, x, rest[:count], rest[count:end], drop_path_scale, rest[end:])
        choices = (plan.dtype, plan.recompute, plan.backend, needs)
        if is_watched():
            description = plan.description.encode()
            listed = torch.ops.moat_kernels.mbconv_backward(*tensors, description, *choices)
        else:
            listed = operators.backward(*tensors, plan.description, *choices)
        gradients = iter(listed)
        grad_x, *grad_parameters = [next(gradients) if needed else None for needed in needs]
        return (grad_x, *(None,) * 4, *grad_parameters, *(None,) * (2 * len(NORMS)))
