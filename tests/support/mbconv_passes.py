"""The kernels of one training step of `mbconv` on tensors without data, and what they move."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from moat_kernels.ops.common.device import planning
from moat_kernels.ops.mbconv.description import (
    PARAMETER_NAMES,
    MBConvDescription,
    MBConvParameters,
)
from moat_kernels.ops.mbconv.dispatch import resolve_frozen
from moat_kernels.ops.mbconv.triton import backend as triton_backend
from moat_kernels.ops.triton_support.traffic import Pass, record_passes
from moat_kernels.plan.meter import Meter
from support.mbconv_cases import Case, make_parameters, map_tensors


@contextmanager
def _all_passes() -> Iterator[list[Pass]]:
    """Those of BLAS and of PyTorch too."""
    with record_passes() as passes, Meter(passes):
        yield passes


def training_passes(
    case: Case,
    dtype: torch.dtype,
    recompute: str,
    batch: int,
    height: int,
    width: int,
    device: str = "meta",
) -> tuple[list[Pass], list[Pass]]:
    """(forward, backward).

    device: "meta" stands for an A100, where all kernels of this package are Triton's; elsewhere the
    tensors are fake, and this package's kernels are listed alone.
    """
    parameters = map_tensors(make_parameters(case, dtype), lambda tensor: tensor.to(device))
    x = torch.empty(batch, case.in_channels, height, width, dtype=dtype, device=device)
    x = x.to(memory_format=torch.channels_last)
    description = resolve_frozen(case.description, parameters, training=True)
    if device == "meta":
        with planning(80):
            return _step(x, parameters, description, recompute, _all_passes)
    with FakeTensorMode() as mode:
        fakes = map_tensors(parameters, mode.from_tensor)
        return _step(mode.from_tensor(x), fakes, description, recompute, record_passes)


def _step(
    x: Tensor,
    parameters: MBConvParameters,
    description: MBConvDescription,
    recompute: str,
    recording: Callable[[], AbstractContextManager[list[Pass]]],
) -> tuple[list[Pass], list[Pass]]:
    arguments = (parameters, description, recompute, None, None)
    needed = frozenset(("x", *PARAMETER_NAMES))
    with recording() as forward:
        result = triton_backend.forward(x, *arguments, {})
    grad = torch.empty_like(result.output)
    with recording() as backward:
        triton_backend.backward(grad, x, *arguments, result.saved, needed)
    return forward, backward


def wide_crossings(passes: list[Pass], wide: int) -> int:
    """How often E-wide rows cross DRAM."""
    return sum(
        len(shape) == 2 and shape[1] == wide and shape[0] > wide
        for one in passes
        for shape in (crossing.shape for crossing in (*one.reads, *one.writes))
    )
