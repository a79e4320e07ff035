"""`mbconv`: the function that users and modules call, and its autograd function."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from moat_kernels.ops.common.autocast import autocast_off
from moat_kernels.ops.common.backends import is_exporting
from moat_kernels.ops.common.registration import is_watched
from moat_kernels.ops.common.spatial import in_format_of
from moat_kernels.ops.mbconv import operators, reference
from moat_kernels.ops.mbconv.description import (
    NORMS,
    PARAMETER_NAMES,
    MBConvDescription,
    MBConvParameters,
    flatten,
)
from moat_kernels.ops.mbconv.dispatch import BACKENDS, Plan, plan_call
from moat_kernels.ops.mbconv.running_statistics import (
    finish_updates,
    list_updated,
    plan_updates,
)


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
    description, counts = plan.description, plan.value_counts
    # What runs without Python holds operators of PyTorch and of the native extension only.
    exported = is_exporting() and not counts
    # The torch backend chooses by the number of rows, which an export may hold open.
    if plan.backend == "reference" or (exported and plan.backend == "torch"):
        updates = plan_updates(counts, parameters, description)
        output, moments = reference.mbconv(x, parameters, description, drop_path_scale)
        finish_updates(parameters, description, updates, moments)
        return output
    if plan.differentiable and not exported:
        tensors, running = _operands(parameters, plan)
        if is_watched():
            updated, places = list_updated(parameters, counts)
            operands = (*tensors, *running, *updated)
            return _MBConv.apply(x, drop_path_scale, plan, None, places, *operands)
        return _MBConv.apply(x, drop_path_scale, plan, parameters, None, *tensors, *running)
    if (is_watched() or counts or type(x) is not Tensor) and not exported:
        return _call_operators(x, parameters, plan, drop_path_scale)
    with autocast_off(x):
        output = BACKENDS[plan.backend].evaluate(
            x, parameters, description, drop_path_scale, plan.dtype
        )
        return in_format_of(output, x)


def _operands(
    parameters: MBConvParameters, plan: Plan
) -> tuple[list[Tensor | None], list[Tensor | None]]:
    """The parameters as `flatten` lists them."""
    tensors, running = flatten(parameters)
    # Running statistics that are about to be updated must not be saved for backward.
    return tensors, [
        None if NORMS[index // 2] in plan.value_counts else tensor
        for index, tensor in enumerate(running)
    ]


def _call_operators(
    x: Tensor, parameters: MBConvParameters, plan: Plan, drop_path_scale: Tensor | None
) -> Tensor:
    """A call without gradients by the operators that compilers and dispatch modes see.

    And one that measures its batch all the same, which nobody does often.
    """
    tensors, running = _operands(parameters, plan)
    description = plan.description.encode()
    if not plan.value_counts:
        return torch.ops.moat_kernels.mbconv_evaluate(
            x, tensors, running, drop_path_scale, description, plan.dtype, plan.backend
        )
    updated, places = list_updated(parameters, plan.value_counts)
    choices = (description, places, plan.dtype, "block", plan.backend)
    output, _ = operators.call_forward(x, tensors, running, updated, drop_path_scale, *choices)
    return output


class _MBConv(torch.autograd.Function):
    """Saves x, the parameters and what the backend asks for; updates running statistics."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        drop_path_scale: Tensor | None,
        plan: Plan,
        named: MBConvParameters | None,
        places: list[int] | None,
        *tensors: Tensor | None,
    ) -> Tensor:
        """named: the parameters; None where operators are watched, which take them from `tensors`.

        tensors: as `_operands` lists them; behind them, with `places`, those of `list_updated`.
        """
        count, end = len(PARAMETER_NAMES), len(PARAMETER_NAMES) + 2 * len(NORMS)
        operands = tensors[:end]
        if named is None:
            output, saved = operators.call_forward(
                *(x, operands[:count], operands[count:], tensors[end:], drop_path_scale),
                *(plan.description.encode(), places, plan.dtype, plan.recompute, plan.backend),
            )
        else:
            updates = plan_updates(plan.value_counts, named, plan.description)
            with autocast_off(x):
                output, moments, saved = BACKENDS[plan.backend].forward(
                    *(x, named, plan.description, plan.recompute, drop_path_scale, plan.dtype),
                    updates,
                )
            finish_updates(named, plan.description, updates, moments)
            output = in_format_of(output, x)
        ctx.save_for_backward(x, drop_path_scale, *operands, *saved)
        ctx.plan = plan
        ctx.set_materialize_grads(False)
        return output

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor | None) -> tuple[Tensor | None, ...]:
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
        others = len(ctx.needs_input_grad) - 5 - count
        return (grad_x, *(None,) * 4, *grad_parameters, *(None,) * others)
