"""The launches of one training step of `mbconv` on fake tensors, and what they move."""

from __future__ import annotations

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from moat_kernels.ops.mbconv.description import (
    PARAMETER_NAMES,
)
from moat_kernels.ops.mbconv.dispatch import resolve_frozen
from moat_kernels.ops.mbconv.triton import backend as triton_backend
from moat_kernels.ops.triton_support.traffic import Pass, record_passes
from support.mbconv_cases import Case, make_parameters, map_tensors


def training_passes(
    case: Case,
    dtype: torch.dtype,
    recompute: str,
    batch: int,
    height: int,
    width: int,
    device: str = "cpu",
) -> tuple[list[Pass], list[Pass]]:
    """(forward, backward)."""
    parameters = map_tensors(make_parameters(case, dtype), lambda tensor: tensor.to(device))
    x = torch.empty(batch, case.in_channels, height, width, dtype=dtype, device=device)
    x = x.to(memory_format=torch.channels_last)
    description = resolve_frozen(case.description, parameters, training=True)
    needed = frozenset(("x", *PARAMETER_NAMES))
    with FakeTensorMode() as mode:
        arguments = (map_tensors(parameters, mode.from_tensor), description, recompute, None, None)
        with record_passes() as forward:
            result = triton_backend.forward(mode.from_tensor(x), *arguments, {})
        with record_passes() as backward:
            grad = torch.empty_like(result.output)
            triton_backend.backward(grad, mode.from_tensor(x), *arguments, result.saved, needed)
    return forward, backward


def wide_crossings(passes: list[Pass], wide: int) -> int:
    """How often E-wide rows cross DRAM."""
    return sum(
        len(shape) == 2 and shape[1] == wide and shape[0] > wide
        for one in passes
        for shape in (crossing.shape for crossing in (*one.reads, *one.writes))
    )
