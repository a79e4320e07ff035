"""Which launch a kernel gets: the user's table, where it has one, goes before the static one."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from contextvars import ContextVar

import torch
from torch import Tensor

from moat_kernels.ops.triton_support import user_table
from moat_kernels.ops.triton_support.launch_table import (
    ANY_SIZE,
    Blocks,
    Chooser,
    LaunchTable,
    Problem,
)
from moat_kernels.ops.triton_support.launching import architecture, device_name

_chooser: ContextVar[Chooser | None] = ContextVar("moat_kernels_launch_chooser", default=None)


def choose(
    table: LaunchTable, kernel: str, like: Tensor, sizes: Sequence[int], size: str = ANY_SIZE
) -> Blocks:
    """The launch of `kernel` on tensors like `like`, for a problem of these sizes."""
    blocks = table.static_launch(kernel, like.element_size(), size, architecture(like.device))
    chooser = _chooser.get() or user_choices(like.device)
    if chooser is None:
        return blocks
    problem = Problem(table.op, kernel, like.dtype, tuple(map(_power_of_2, sizes)))
    return chooser(problem, blocks)


def user_choices(device: torch.device) -> Chooser | None:
    """What was measured on this device; None: nothing was."""
    return user_table.chooser(device_name(device))


def is_choosing() -> bool:
    """Whether `choosing` is asked in this thread."""
    return _chooser.get() is not None


@contextlib.contextmanager
def choosing(choose: Chooser) -> Iterator[None]:
    """Ask `choose` instead of the user's table inside the `with` block, in this thread."""
    token = _chooser.set(choose)
    try:
        yield
    finally:
        _chooser.reset(token)


def _power_of_2(size: int) -> int:
    """The smallest power of 2 that is not below `size`, which torch.compile may hold open."""
    power = 1
    while power < size:
        power *= 2
    return power
