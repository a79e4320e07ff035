"""Autocast at the boundary of an op: which dtype it asks for, and switching it off inside."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

from moat_kernels.ops.common.device import device_type

Result = TypeVar("Result")


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """The dtype that autocast wants matrix products of `x` in; None: autocast is off for it."""
    kind = device_type(x)
    if not torch.is_autocast_enabled(kind) or x.dtype == torch.float64:
        return None
    return torch.get_autocast_dtype(kind)


def without_autocast(function: Callable[..., Result]) -> Callable[..., Result]:
    """Run `function`, whose first argument is a tensor, with autocast off for that device."""

    @functools.wraps(function)
    def wrapped(x: Tensor, *arguments: Any) -> Result:
        kind = device_type(x)
        if not torch.is_autocast_enabled(kind):  # entering a context takes longer
            return function(x, *arguments)
        with torch.autocast(kind, enabled=False):
            return function(x, *arguments)

    return wrapped
