"""Autocast at the boundary of an op: which dtype it asks for, and switching it off inside."""

from __future__ import annotations

import contextlib
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
    if not _is_on(kind) or x.dtype == torch.float64:
        return None
    return torch.get_autocast_dtype(kind)


class _Off:
    """`torch.autocast(kind, enabled=False)` where autocast is on; that takes four times as long."""

    __slots__ = ("kind",)

    def __init__(self, kind: str) -> None:
        self.kind = kind

    def __enter__(self) -> None:
        torch.set_autocast_enabled(self.kind, False)

    def __exit__(self, *_: object) -> None:
        torch.set_autocast_enabled(self.kind, True)


_UNCHANGED = contextlib.nullcontext()


def autocast_off(x: Tensor) -> contextlib.AbstractContextManager[Any]:
    """Inside the `with` block autocast is off for x's device."""
    kind = device_type(x)
    if not _is_on(kind):
        return _UNCHANGED
    return torch.autocast(kind, enabled=False) if torch.compiler.is_compiling() else _Off(kind)


def _is_on(kind: str) -> bool:
    """Whether autocast is on for a type of device; some, meta among them, have none."""
    # Asking whether there is one takes a microsecond.
    known = kind in ("cpu", "cuda") or torch.amp.is_autocast_available(kind)
    return known and torch.is_autocast_enabled(kind)


def without_autocast(function: Callable[..., Result]) -> Callable[..., Result]:
    """Run `function`, whose first argument is a tensor, with autocast off for that device."""

    @functools.wraps(function)
    def wrapped(x: Tensor, *arguments: Any) -> Result:
        with autocast_off(x):
            return function(x, *arguments)

    return wrapped
