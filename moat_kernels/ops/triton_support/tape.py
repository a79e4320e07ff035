"""A recorded call: allocations, PyTorch's operators and launches, in their order.

While a call is recorded, a dispatch mode sees PyTorch's operators and `launch` tells of its
launches. Tensors are told apart by their memory: that of the arguments, and what operators
allocate. Views are no steps: they are where in that memory a tensor lies.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from moat_kernels.ops.common.registration import looking_inside
from moat_kernels.ops.triton_support.launching import Launched, listening

_ALLOCATIONS = (
    torch.ops.aten.empty.memory_format,
    torch.ops.aten.empty_like.default,
    torch.ops.aten.empty_strided.default,
    torch.ops.aten.new_empty.default,
    torch.ops.aten.new_empty_strided.default,
)


class Unreplayable(Exception):
    """The call cannot be replayed; the text says why."""


@dataclass(frozen=True)
class Layout:
    """Where a tensor lies: in the memory of which slot, and how. offset: in elements."""

    slot: int
    size: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int
    dtype: torch.dtype


@dataclass(frozen=True)
class Allocation:
    """Memory of a slot that a kernel or an operator will write."""

    slot: int

    def uses(self) -> Iterator[int]:
        return iter(())


@dataclass(frozen=True)
class Operation:
    """A call of an operator. arguments, options: with a Layout for each tensor.

    results: of each tensor that it returns its slot; None where that was there before.
    unpacked: whether it returns them in a list or a tuple.
    """

    operator: Any
    arguments: tuple[Any, ...]
    options: dict[str, Any]
    results: tuple[int | None, ...]
    unpacked: bool

    def uses(self) -> Iterator[int]:
        return slots_in((self.arguments, self.options))


@dataclass(frozen=True)
class Launch:
    """A launch. arguments: with a Layout for each tensor."""

    launched: Launched
    arguments: tuple[Any, ...]

    def uses(self) -> Iterator[int]:
        return slots_in(self.arguments)


Step = Allocation | Operation | Launch


def slots_in(value: Any) -> Iterator[int]:
    """The slots of the layouts in lists, tuples and dictionaries."""
    if isinstance(value, Layout):
        yield value.slot
    elif isinstance(value, (tuple, list)):
        for each in value:
            yield from slots_in(each)
    elif isinstance(value, dict):
        yield from slots_in(tuple(value.values()))


class Recorder(TorchDispatchMode):
    """Collects the steps of what runs inside.

    slots: a tensor for each, kept so that nothing else gets its memory; the arguments come first.
    failure: why the steps are not what happened; None: they are.
    """

    def __init__(self, arguments: Sequence[Tensor]) -> None:
        super().__init__()
        self.slots: list[Tensor] = []
        self.steps: list[Step] = []
        self.failure: Unreplayable | None = None
        self._in_storage: dict[int, list[int]] = {}
        for tensor in arguments:
            self._add(tensor)
        for slots in self._in_storage.values():
            spans = sorted(_span(self.slots[slot]) for slot in slots)
            if any(end > begin for (_, end), (begin, _) in pairwise(spans)):
                self.failure = Unreplayable("arguments that share memory")

    def _add(self, tensor: Tensor) -> int:
        slot = len(self.slots)
        self.slots.append(tensor)
        self._in_storage.setdefault(_storage(tensor), []).append(slot)
        return slot

    def described(self, value: Any) -> Any:
        """`value` with a Layout for each tensor in it; raises Unreplayable for an unknown one."""
        if isinstance(value, Tensor):
            return self._layout(value)
        if isinstance(value, dict):
            return {name: self.described(each) for name, each in value.items()}
        if type(value) in (tuple, list):
            return type(value)(map(self.described, value))
        if isinstance(value, tuple) and hasattr(value, "_fields"):
            return type(value)(*map(self.described, value))
        return value

    def _layout(self, tensor: Tensor) -> Layout:
        slots = self._in_storage.get(_storage(tensor), [])
        begin, end = _span(tensor)
        for slot in slots:
            first, last = _span(self.slots[slot])
            # Arguments may be parts of one storage.
            if len(slots) == 1 or (first <= begin and end <= last):
                offset, rest = divmod(begin - first, tensor.element_size())
                if not rest:
                    size, stride = tuple(tensor.shape), tensor.stride()
                    return Layout(slot, size, stride, offset, tensor.dtype)
        raise Unreplayable("a tensor that was neither given nor made")

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        try:
            self._see(func, args, kwargs or {}, result)
        except Unreplayable as failure:
            self.failure = failure
        return result

    def _see(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> None:
        leaves = tree_leaves(result)
        returned = [each for each in leaves if isinstance(each, Tensor)]
        given = [each for each in tree_leaves((args, kwargs)) if isinstance(each, Tensor)]
        if given and not returned and not func._schema.is_mutable:
            raise Unreplayable(f"{func}, which looks at values")
        if func in _ALLOCATIONS:
            self.steps.append(Allocation(self._add(result)))
            return
        is_new = [_storage(each) not in self._in_storage for each in returned]
        if any(is_new) or func._schema.is_mutable:
            if returned and len(returned) < len(leaves):
                raise Unreplayable(f"{func}, which returns more than tensors")
            arguments, options = self.described((args, kwargs))
            pairs = zip(returned, is_new, strict=True)
            slots = tuple(self._add(each) if new else None for each, new in pairs)
            unpacked = isinstance(result, (tuple, list))
            self.steps.append(Operation(func, arguments, options, slots, unpacked))

    def hear(self, launched: Launched) -> None:
        """For `listening`."""
        try:
            self.steps.append(Launch(launched, self.described(tuple(launched.arguments))))
        except Unreplayable as failure:
            self.failure = failure


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _span(tensor: Tensor) -> tuple[int, int]:
    """Addresses of the first byte and behind the last one."""
    begin = tensor.data_ptr()
    if not tensor.numel():
        return begin, begin
    sides = zip(tensor.shape, tensor.stride(), strict=True)
    last = sum((size - 1) * stride for size, stride in sides)
    return begin, begin + (last + 1) * tensor.element_size()


def record(
    function: Callable[..., Any], arguments: Sequence[Any], tensors: Sequence[Tensor]
) -> tuple[Any, Recorder | None]:
    """(what the function returns, what it did; None: it cannot be replayed).

    tensors: those among its arguments.
    """
    recorder = Recorder(tensors)
    with looking_inside(), listening(recorder.hear), recorder:
        result = function(*arguments)
    return result, None if recorder.failure else recorder
