"""Calls that were made before, replayed: what a backend decides, it decides once for calls alike.

Between a block's forward pass and a launch lie some thirty Python calls: sizes, the launch table,
grids, views, what Triton makes of the arguments. All of it follows from the shapes, strides, dtypes
and alignment of the tensors and from settings. So the second call of a kind is recorded (tape.py),
and later ones only allocate, launch and call what of PyTorch's operators they need.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from moat_kernels.ops.common.device import planned_architecture
from moat_kernels.ops.triton_support import traffic
from moat_kernels.ops.triton_support.choice import is_choosing, user_choices
from moat_kernels.ops.triton_support.launching import is_heard, is_observed, multiplies_as_tf32
from moat_kernels.ops.triton_support.tape import Unreplayable, record
from moat_kernels.ops.triton_support.tape_source import compile_tape

Result = TypeVar("Result")

# Kinds of calls that are kept for each function; beyond it all are forgotten.
MOST_TAPES = 512
# What kernels and launch tables ask of an address.
ALIGNMENT = 16

# The tapes of every function that is replayed.
_all_tapes: list[dict[tuple[Any, ...], Any]] = []

# In place of a tape: the kind of call came once; it cannot be replayed.
_ONCE, _NEVER = object(), object()


def replayed(
    settings: Callable[[], Hashable] = lambda: None,
) -> Callable[[Callable[..., Result]], Callable[..., Result]]:
    """Replay a function of tensors, of lists and named tuples of them, and of hashable values.

    The function must launch kernels by `launch` only, and may look at a tensor's shape, strides,
    dtype, device and alignment, never at its values. What it returns are tensors, None, and tuples,
    lists and dictionaries of them. settings: what else decides what it does.
    """

    def decorate(function: Callable[..., Result]) -> Callable[..., Result]:
        tapes: dict[tuple[Any, ...], Any] = {}
        _all_tapes.append(tapes)

        @functools.wraps(function)
        def call(*arguments: Any) -> Result:
            if not _may_replay():
                return function(*arguments)
            tensors: list[Tensor] = []
            key: list[Any] = [multiplies_as_tf32(), settings()]
            try:
                _describe(arguments, tensors, key, {})
                key.append(user_choices(tensors[0].device))
                kind = tuple(key)
                tape = tapes.get(kind)
            # No tensors, something unhashable, or tensors that are not plain ones.
            except (IndexError, TypeError, Unreplayable):
                return function(*arguments)
            if tape is _NEVER:
                return function(*arguments)
            if tape is None:
                if len(tapes) >= MOST_TAPES:
                    tapes.clear()
                tapes[kind] = _ONCE
                return function(*arguments)
            if tape is _ONCE:
                result, tapes[kind] = _record(function, arguments, tensors)
                return result
            return _on_device(tensors[0].device, tape, tensors)

        return call

    return decorate


def forget() -> None:
    """Forget all tapes: what they were made of was changed behind the scenes, by a test say."""
    for tapes in _all_tapes:
        tapes.clear()


def _record(
    function: Callable[..., Result], arguments: Sequence[Any], tensors: Sequence[Tensor]
) -> tuple[Result, Any]:
    """(what the function returns, the tape or _NEVER)."""
    result, recorder = record(function, arguments, tensors)
    if recorder is None:
        return result, _NEVER
    try:
        return result, compile_tape(recorder, len(tensors), result)
    except Unreplayable:
        return result, _NEVER


def _on_device(device: torch.device, tape: Any, tensors: Sequence[Tensor]) -> Any:
    """Run a tape while `device` is the current one, as its launches expect."""
    if device.type != "cuda" or device.index == torch.cuda.current_device():
        return tape(tensors)
    with torch.cuda.device(device):
        return tape(tensors)


def _may_replay() -> bool:
    """Whether nobody looks at what happens in between, or changes it."""
    return not (
        is_in_torch_dispatch_mode()
        or traffic.recording()
        or is_observed()
        or is_choosing()
        or is_heard()
        or planned_architecture() is not None
    )


def _describe(
    values: Iterable[Any], tensors: list[Tensor], key: list[Any], positions: dict[int, int]
) -> None:
    """Add the tensors in `values` to `tensors`, each once, and all that decides to `key`."""
    for value in values:
        kind = type(value)
        if kind is Tensor or kind is Parameter:
            position = positions.setdefault(id(value), len(tensors))
            if position < len(tensors):
                key += (_describe, position)  # no argument equals that
                continue
            tensors.append(value)
            address = value.data_ptr() % ALIGNMENT
            key += (value.shape, value.stride(), value.dtype, value.device, address)
        elif value is None:
            key.append(None)
        elif isinstance(value, (tuple, list)):
            key += (kind, len(value))
            _describe(value, tensors, key, positions)
        elif isinstance(value, dict):
            key += (kind, len(value), *value)
            _describe(value.values(), tensors, key, positions)
        elif isinstance(value, Tensor):
            raise Unreplayable(f"a {kind.__name__}")
        else:
            key.append(value)
