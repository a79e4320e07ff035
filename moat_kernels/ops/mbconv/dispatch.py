"""Who computes a call of `mbconv`: decided once for all calls alike."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from moat_kernels.ops.common.autocast import autocast_dtype
from moat_kernels.ops.common.backends import choose_backend, is_eager, requested_backend
from moat_kernels.ops.common.device import device_type
from moat_kernels.ops.mbconv.checks import check_mbconv
from moat_kernels.ops.mbconv.contract import Backend
from moat_kernels.ops.mbconv.cpu import backend as cpu_backend
from moat_kernels.ops.mbconv.description import (
    NORMS,
    MBConvDescription,
    MBConvParameters,
    NormParameters,
    needs_gradient,
)
from moat_kernels.ops.mbconv.running_statistics import count_values
from moat_kernels.ops.mbconv.torch import backend as torch_backend
from moat_kernels.ops.mbconv.triton import backend as triton_backend

BACKENDS: Mapping[str, Backend] = {
    "torch": torch_backend,
    "cpu": cpu_backend,
    "triton": triton_backend,
}

# What recompute="auto" stands for. Saving both wide tensors is the fastest everywhere: a CPU takes
# them from memory that is used again (docs/cpu_kernels.md has the table), a GPU crosses DRAM least
# often.
FASTEST_RECOMPUTE = "none"


@dataclass(frozen=True)
class Plan:
    """How a call is computed: what follows from shapes, dtypes, devices and settings alone.

    description: with `frozen` resolved. backend: a key of BACKENDS, or "reference".
    recompute: "none", "expand" or "block". differentiable: whether autograd records the call.
    dtype: what autocast wants the convolutions in; None: it is off. value_counts: by the name of
    each norm that measures its batch, how many values of each channel this process measures.
    """

    description: MBConvDescription
    backend: str
    recompute: str
    differentiable: bool
    dtype: torch.dtype | None
    value_counts: Mapping[str, int]


# Plans of checked calls by `_signature`. Threads may race to add the same plan, which is harmless.
_plans: dict[tuple[Any, ...], Plan] = {}
_MOST_PLANS = 1024


def plan_call(
    x: Tensor,
    parameters: MBConvParameters,
    description: MBConvDescription,
    training: bool,
    recompute: str,
    drop_path_scale: Tensor | None,
) -> Plan:
    """The plan of a call; raises as `mbconv` does."""
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
) -> Plan:
    """Check a call and choose who computes it."""
    check_mbconv(x, parameters, description, training, recompute, drop_path_scale)
    description = resolve_frozen(description, parameters, training)
    backend = choose_backend(
        "mbconv",
        x.device,
        BACKENDS,
        lambda candidate: candidate.unsupported(x, parameters, description),
    )
    return Plan(
        description,
        backend,
        FASTEST_RECOMPUTE if recompute == "auto" else recompute,
        needs_gradient(x, parameters),
        autocast_dtype(x),
        count_values(x, parameters, description),
    )


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
