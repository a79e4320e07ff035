"""`mbconv`: argument checks, choice of the backend, operator schema and autograd."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from moat_kernels.ops.common.autocast import autocast_dtype, without_autocast
from moat_kernels.ops.common.backends import (
    choose_backend,
    is_eager,
    is_exporting,
    requested_backend,
)
from moat_kernels.ops.common.device import device_type
from moat_kernels.ops.common.registration import define_op, is_watched
from moat_kernels.ops.common.spatial import in_format_of
from moat_kernels.ops.mbconv import reference
from moat_kernels.ops.mbconv.algebra.running_statistics import update_running_statistics
from moat_kernels.ops.mbconv.checks import check_mbconv
from moat_kernels.ops.mbconv.cpu import backend as cpu_backend
from moat_kernels.ops.mbconv.description import (
    NORMS,
    WEIGHTS,
    MBConvDescription,
    MBConvParameters,
    NormParameters,
)
from moat_kernels.ops.mbconv.torch import backend as torch_backend
from moat_kernels.ops.mbconv.triton import backend as triton_backend

IMPLEMENTATIONS = {"torch": torch_backend, "cpu": cpu_backend, "triton": triton_backend}

# Names of the differentiable tensors, in the order of the operator's `parameters`.
PARAMETER_NAMES = WEIGHTS + tuple(f"{norm}_{part}" for norm in NORMS for part in ("weight", "bias"))


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
    plan = _plan(x, parameters, description, training, recompute, drop_path_scale)
    if plan.backend == "reference":
        output, moments = reference.mbconv(x, parameters, plan.description, drop_path_scale)
    elif plan.is_plain and not is_in_torch_dispatch_mode():
        implementation = IMPLEMENTATIONS[plan.backend]
        result = implementation.forward(x, parameters, plan.description, "block", drop_path_scale)
        return in_format_of(result.output, x)
    else:
        output, moments = _fused(
            x, parameters, plan.description, recompute, plan.backend, drop_path_scale
        )
    update_running_statistics(x, output, parameters, plan.description, moments)
    return output


@dataclass(frozen=True)
class _Plan:
    """How a call is computed: what follows from shapes, dtypes, devices and settings alone.

    description: with `frozen` resolved. is_plain: an eager call that measures no batch and needs
        no gradient, which skips the operator: dispatching to Python takes 0.1 ms.
    """

    description: MBConvDescription
    backend: str
    is_plain: bool


# Plans of checked calls by `_signature`. Threads may race to add the same plan, which is harmless.
_plans: dict[tuple[Any, ...], _Plan] = {}
_MOST_PLANS = 1024


def _plan(
    x: Tensor,
    parameters: MBConvParameters,
    description: MBConvDescription,
    training: bool,
    recompute: str,
    drop_path_scale: Tensor | None,
) -> _Plan:
    """The plan of a call, made once for all calls alike; raises as `mbconv` does."""
    arguments = (x, parameters, description, training, recompute, drop_path_scale)
    if not is_eager() or type(x) is not Tensor:  # sizes may be symbols
        return _make_plan(*arguments)
    try:
        signature = _signature(*arguments)
        plan = _plans.get(signature)
    except (AttributeError, TypeError):  # an argument of a wrong type, which the checks name
        return _make_plan(*arguments)
    if plan is None:
        plan = _make_plan(*arguments)
        if len(_plans) >= _MOST_PLANS:
            _plans.clear()
        _plans[signature] = plan
    return plan


def _signature(
    x: Tensor,
    parameters: MBConvParameters,
    description: MBConvDescription,
    training: bool,
    recompute: str,
    drop_path_scale: Tensor | None,
) -> tuple[Any, ...]:
    """All that `_make_plan` looks at."""
    tensors = [x, drop_path_scale]
    for value in parameters:
        if isinstance(value, NormParameters):
            tensors += value
        else:
            tensors.append(value)
    return (
        description,
        training,
        recompute,
        requested_backend(),
        autocast_dtype(x),
        device_type(x),
        torch.is_grad_enabled(),
        *[t if t is None else (t.shape, t.dtype, t.device, t.requires_grad) for t in tensors],
    )


def _make_plan(
    x: Tensor,
    parameters: MBConvParameters,
    description: MBConvDescription,
    training: bool,
    recompute: str,
    drop_path_scale: Tensor | None,
) -> _Plan:
    """Check a call and choose who computes it."""
    check_mbconv(x, parameters, description, training, recompute, drop_path_scale)
    description = resolve_frozen(description, parameters, training)
    backend = choose_backend(
        "mbconv",
        x.device,
        IMPLEMENTATIONS,
        lambda implementation: _unsupported(implementation, x, parameters, description),
    )
    is_plain = not (
        not is_eager()
        or type(x) is not Tensor
        or autocast_dtype(x) is not None
        or any(_moment_count(description, name) for name in NORMS)
        or _needs_gradient(x, flatten(parameters)[0])
    )
    return _Plan(description, backend, is_plain)


def _unsupported(
    implementation: Any, x: Tensor, parameters: MBConvParameters, description: MBConvDescription
) -> str:
    """Why `implementation` does not cover a call; empty if it does."""
    if description.synchronized and not getattr(implementation, "SYNCHRONIZES", False):
        return "synchronised norms"
    return implementation.unsupported(x, parameters, description)


def resolve_frozen(
    description: MBConvDescription, parameters: MBConvParameters, training: bool
) -> MBConvDescription:
    """The description with `frozen` set on exactly the norms that use running statistics.

    These share nothing with other ranks.
    """
    norms = {}
    for name in NORMS:
        norm = getattr(description, name)
        if norm is not None:
            tracked = getattr(parameters, name).running_mean is not None
            frozen = tracked and (norm.frozen or not training)
            group = None if frozen else norm.process_group
            if frozen != norm.frozen or group != norm.process_group:
                norms[name] = dataclasses.replace(norm, frozen=frozen, process_group=group)
    return dataclasses.replace(description, **norms) if norms else description


def flatten(parameters: MBConvParameters) -> tuple[list[Tensor | None], list[Tensor | None]]:
    """(differentiable tensors in the order of PARAMETER_NAMES, running mean and var per norm)."""
    tensors = [getattr(parameters, name) for name in WEIGHTS]
    running = []
    for name in NORMS:
        norm = getattr(parameters, name)
        tensors += [norm.weight, norm.bias]
        running += [norm.running_mean, norm.running_var]
    return tensors, running


def unflatten(
    tensors: Sequence[Tensor | None], running: Sequence[Tensor | None]
) -> MBConvParameters:
    """The inverse of `flatten`."""
    fields: dict[str, Any] = dict(zip(WEIGHTS, tensors, strict=False))
    for index, name in enumerate(NORMS):
        affine = tensors[len(WEIGHTS) + 2 * index : len(WEIGHTS) + 2 * index + 2]
        fields[name] = NormParameters(*affine, *running[2 * index : 2 * index + 2])
    return MBConvParameters(**fields)


def _fused(
    x: Tensor,
    parameters: MBConvParameters,
    description: MBConvDescription,
    recompute: str,
    backend: str,
    drop_path_scale: Tensor | None,
) -> tuple[Tensor, dict[str, tuple[Tensor, ...]]]:
    tensors, running = flatten(parameters)
    dtype = autocast_dtype(x)
    if dtype is not None:
        tensors = [
            tensor if tensor is None or index >= len(WEIGHTS) else tensor.to(dtype)
            for index, tensor in enumerate(tensors)
        ]
    # Running statistics that are about to be updated must not be saved for backward.
    running = [
        tensor if _is_frozen(description, index // 2) else None
        for index, tensor in enumerate(running)
    ]
    counts = {name: _moment_count(description, name) for name in NORMS}
    choices = (description.encode(), recompute, backend)
    if is_exporting() and not any(counts.values()):
        # What runs without Python holds operators of PyTorch and of the native extension only.
        return _forward_op(x, tensors, running, drop_path_scale, *choices, False)[0], {}
    if _needs_gradient(x, tensors):
        output, *measured = _MBConv.apply(
            x, drop_path_scale, choices, sum(counts.values()), *tensors, *running
        )
    else:
        output, *measured = torch.ops.moat_kernels.mbconv_forward(
            x, tensors, running, drop_path_scale, *choices, False
        )
    remaining = iter(measured)
    moments = {name: tuple(islice(remaining, count)) for name, count in counts.items() if count}
    return output, moments


def _needs_gradient(x: Tensor, tensors: Sequence[Tensor | None]) -> bool:
    return torch.is_grad_enabled() and any(
        tensor is not None and tensor.requires_grad for tensor in (x, *tensors)
    )


def _is_frozen(description: MBConvDescription, index: int) -> bool:
    norm = getattr(description, NORMS[index])
    return norm is not None and norm.frozen


def _moment_count(description: MBConvDescription, name: str) -> int:
    """How many moments the norm called `name` measures; see Stage.batch_moments."""
    norm = getattr(description, name)
    if norm is None or norm.frozen:
        return 0
    return 2 if norm.process_group is None else 3


class _MBConv(torch.autograd.Function):
    """Saves x, the parameters and what the backend asks for; one operator each way."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        drop_path_scale: Tensor | None,
        choices: tuple[str, str, str],
        moment_count: int,
        *tensors: Tensor | None,
    ) -> tuple[Tensor, ...]:
        parameters, running = tensors[: len(PARAMETER_NAMES)], tensors[len(PARAMETER_NAMES) :]
        results = 1 + moment_count
        forward = torch.ops.moat_kernels.mbconv_forward if is_watched() else _forward_op
        outputs = forward(x, parameters, running, drop_path_scale, *choices, True)
        ctx.save_for_backward(x, drop_path_scale, *tensors, *outputs[results:])
        ctx.choices = choices
        ctx.mark_non_differentiable(*outputs[1:results])
        ctx.set_materialize_grads(False)
        return tuple(outputs[:results])

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
        count = len(PARAMETER_NAMES)
        needs = [ctx.needs_input_grad[0], *ctx.needs_input_grad[4 : 4 + count]]
        if grad is None:
            return (None,) * len(ctx.needs_input_grad)
        x, drop_path_scale, *rest = ctx.saved_tensors
        running_end = count + 2 * len(NORMS)
        backward = torch.ops.moat_kernels.mbconv_backward if is_watched() else _backward_op
        gradients = iter(
            backward(
                grad,
                x,
                rest[:count],
                rest[count:running_end],
                drop_path_scale,
                rest[running_end:],
                *ctx.choices,
                needs,
            )
        )
        grad_x, *grad_parameters = [next(gradients) if needed else None for needed in needs]
        return (grad_x, None, None, None, *grad_parameters, *(None,) * (2 * len(NORMS)))


@without_autocast
def _forward_op(
    x: Tensor,
    parameters: Sequence[Tensor | None],
    running: Sequence[Tensor | None],
    drop_path_scale: Tensor | None,
    description: str,
    recompute: str,
    backend: str,
    differentiable: bool,
) -> list[Tensor]:
    implementation = IMPLEMENTATIONS[backend]
    decoded, tensors = MBConvDescription.decode(description), unflatten(parameters, running)
    level = (
        implementation.recompute_level(recompute, x, tensors, decoded)
        if differentiable
        else "block"
    )
    result = implementation.forward(x, tensors, decoded, level, drop_path_scale)
    moments = [tensor.clone() for name in NORMS for tensor in result.moments.get(name, ())]
    saved = result.saved if differentiable else []
    return [in_format_of(result.output, x), *moments, *saved]


@without_autocast
def _backward_op(
    grad: Tensor,
    x: Tensor,
    parameters: Sequence[Tensor | None],
    running: Sequence[Tensor | None],
    drop_path_scale: Tensor | None,
    saved: list[Tensor],
    description: str,
    recompute: str,
    backend: str,
    needs: Sequence[bool],
) -> list[Tensor]:
    implementation = IMPLEMENTATIONS[backend]
    decoded, tensors = MBConvDescription.decode(description), unflatten(parameters, running)
    names = ("x", *PARAMETER_NAMES)
    needed = frozenset(name for name, wanted in zip(names, needs, strict=True) if wanted)
    gradients = implementation.backward(
        grad,
        x,
        tensors,
        decoded,
        implementation.recompute_level(recompute, x, tensors, decoded),
        drop_path_scale,
        saved,
        needed,
    )
    results = []
    for name, source in zip(names, (x, *parameters), strict=True):
        if name in needed and source is not None:
            gradient = gradients[name].reshape(source.shape).to(source.dtype)
            results.append(in_format_of(gradient, x) if name == "x" else gradient.contiguous())
    return results


_ARGUMENTS = "Tensor?[] parameters, Tensor?[] running, Tensor? drop_path_scale"
_CHOICES = "str description, str recompute, str backend"

# -> [output, moments of each norm that measures (Stage.batch_moments), what backward needs ...]
define_op(
    f"mbconv_forward(Tensor x, {_ARGUMENTS}, {_CHOICES}, bool differentiable) -> Tensor[]",
    _forward_op,
    _forward_op,
)
# -> the gradients that `needs` (x, then the parameters) asks for
define_op(
    f"mbconv_backward(Tensor grad, Tensor x, {_ARGUMENTS}, Tensor[] saved, {_CHOICES}, "
    "bool[] needs) -> Tensor[]",
    _backward_op,
    _backward_op,
)
