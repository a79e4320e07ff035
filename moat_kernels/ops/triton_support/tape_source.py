"""A tape as a Python function: straight lines without a decision, written as source and compiled.

def replay(inputs):
    (v0, v1, ) = inputs                                         the tensor of each slot
    stream = get_stream(0)
    memory = empty((1024,), (1,), dtype=c3, device=c4)          of small temporary tensors
    small = memory.data_ptr()
    v9 = empty((64, 128), (128, 1), dtype=c5, device=c6)
    p0 = v0.data_ptr()
    p9 = v9.data_ptr()
    run7(784, 1, 1, stream, function8, metadata9, None, None, None, p0, small + 512, p9, 64)
    v10 = operator10(v9, strided(v1, (4, 4), (4, 1), 0))
    del v9
    return Forward11(v10, [])
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from moat_kernels.ops.triton_support.launching import Launched
from moat_kernels.ops.triton_support.tape import (
    Allocation,
    Launch,
    Layout,
    Operation,
    Recorder,
    Step,
    slots_in,
)

Replay = Callable[[Sequence[Tensor]], Any]

# What Python writes as it reads it; other constants get names.
_WRITTEN = (type(None), bool, int, str)

# Bytes of memory that shares an allocation with others; and multiples that each of them begins at.
LARGEST_SMALL, PLACE = 1 << 18, 512


def compile_tape(recorder: Recorder, inputs: int, result: Any) -> Replay:
    """The function of the inputs that does what was recorded and returns what is like `result`.

    Raises Unreplayable if the result holds a tensor of which the recorder does not know.
    """
    return _Writer(recorder, inputs).write(recorder.described(result))


class _Writer:
    def __init__(self, recorder: Recorder, inputs: int) -> None:
        self.slots, self.steps = recorder.slots, recorder.steps
        self.inputs = inputs
        self.names: dict[str, Any] = {"empty": torch.empty_strided, "strided": _strided}
        self.lines: list[str] = []
        # Of slots: where the source has their address; and those that it has a tensor of.
        self.addresses: dict[int, str] = {}
        self.held = set(range(inputs))

    def write(self, returned: Any) -> Replay:
        names = "".join(f"v{slot}, " for slot in range(self.inputs))
        self.lines += ["def replay(inputs):", f"    ({names}) = inputs"]
        kept = {*range(self.inputs), *slots_in(returned)}
        last_use = {slot: n for n, step in enumerate(self.steps) for slot in step.uses()}
        used = kept | last_use.keys()
        self._write_stream()
        self._place_small(used - kept)
        for number, step in enumerate(self.steps):
            self._write_step(step, used)
            for slot, last in last_use.items():
                if last == number and slot in self.held - kept:
                    self._line(f"del v{slot}")
        self._line(f"return {self._expression(returned)}")
        exec("\n".join(self.lines), self.names)
        replay: Replay = self.names["replay"]
        return replay

    def _line(self, text: str) -> None:
        self.lines.append(f"    {text}")

    def _constant(self, value: Any, kind: str = "c") -> str:
        name = f"{kind}{len(self.names)}"
        self.names[name] = value
        return name

    def _write_stream(self) -> None:
        if any(isinstance(step, Launch) and step.launched.compiled for step in self.steps):
            from triton.runtime.driver import driver

            self.names["get_stream"] = driver.active.get_current_stream
            self._line(f"stream = get_stream({driver.active.get_current_device()})")

    def _place_small(self, candidates: set[int]) -> None:
        """One allocation for all small memory of which nothing but launches gets the address."""
        candidates &= {step.slot for step in self.steps if isinstance(step, Allocation)}
        for step in self.steps:
            by_address = isinstance(step, Launch) and step.launched.compiled
            candidates -= set() if by_address else set(step.uses())
        end = 0
        for slot in sorted(candidates):
            size = self.slots[slot].untyped_storage().nbytes()
            if size <= LARGEST_SMALL:
                self.addresses[slot] = f"small + {end}"
                end += -(-size // PLACE) * PLACE
        if end:
            byte, device = self._constant(torch.uint8), self._constant(self.slots[0].device)
            self._line(f"memory = empty(({end},), (1,), dtype={byte}, device={device})")
            self._line("small = memory.data_ptr()")

    def _write_step(self, step: Step, used: set[int]) -> None:
        if isinstance(step, Allocation):
            if step.slot in used and step.slot not in self.addresses:
                self._allocate(step.slot)
        elif isinstance(step, Operation):
            self._operate(step)
        elif step.launched.compiled:
            self._launch(step)
        else:
            self._interpret(step)

    def _allocate(self, slot: int) -> None:
        like = self.slots[slot]
        sizes = f"{tuple(like.shape)}, {like.stride()}"
        dtype, device = self._constant(like.dtype), self._constant(like.device)
        self._line(f"v{slot} = empty({sizes}, dtype={dtype}, device={device})")
        self.held.add(slot)

    def _operate(self, step: Operation) -> None:
        results = [f"v{slot}" if slot is not None else "_" for slot in step.results]
        self.held.update(slot for slot in step.results if slot is not None)
        target = f"[{', '.join(results)}]" if step.unpacked else "".join(results)
        arguments = [self._expression(each) for each in step.arguments]
        arguments += [f"{name}={self._expression(each)}" for name, each in step.options.items()]
        call = f"{self._constant(step.operator, 'operator')}({', '.join(arguments)})"
        self._line(f"{target} = {call}" if target else call)

    def _launch(self, step: Launch) -> None:
        """By what the kernel was compiled to, with addresses."""
        compiled = step.launched.compiled
        run = self._constant(compiled.run, "run")
        function = self._constant(compiled.function, "function")
        metadata = self._constant(compiled.packed_metadata, "metadata")
        grid = (*step.launched.grid, 1, 1)[:3]
        arguments = [self._address(each) for each in _bound(step.launched, step.arguments)]
        fixed = f"{grid[0]}, {grid[1]}, {grid[2]}, stream, {function}, {metadata}, None, None, None"
        self._line(f"{run}({fixed}, {', '.join(arguments)})")

    def _interpret(self, step: Launch) -> None:
        launched = step.launched
        kernel = self._constant(launched.kernel, "kernel")
        arguments = ", ".join(self._expression(each) for each in step.arguments)
        options = self._constant(dict(launched.options))
        self._line(f"{kernel}[{tuple(launched.grid)}]({arguments}, **{options})")

    def _address(self, value: Any) -> str:
        """An argument of a launch."""
        if not isinstance(value, Layout):
            return self._expression(value)
        slot = value.slot
        if slot not in self.addresses:
            self.addresses[slot] = f"p{slot}"
            self._line(f"p{slot} = v{slot}.data_ptr()")
        first = self.addresses[slot]
        offset = value.offset * value.dtype.itemsize
        return f"{first} + {offset}" if offset else first

    def _expression(self, value: Any) -> str:
        if isinstance(value, Layout):
            return self._tensor(value)
        if type(value) in _WRITTEN:
            return repr(value)
        if isinstance(value, dict):
            pairs = (f"{name!r}: {self._expression(each)}" for name, each in value.items())
            return f"{{{', '.join(pairs)}}}"
        if type(value) is list:
            return f"[{', '.join(map(self._expression, value))}]"
        if type(value) is tuple:
            return f"({''.join(f'{self._expression(each)}, ' for each in value)})"
        if isinstance(value, tuple) and hasattr(value, "_fields"):
            kind = self._constant(type(value), type(value).__name__)
            return f"{kind}({', '.join(map(self._expression, value))})"
        return self._constant(value)

    def _tensor(self, layout: Layout) -> str:
        base, name = self.slots[layout.slot], f"v{layout.slot}"
        whole = Layout(layout.slot, tuple(base.shape), base.stride(), 0, base.dtype)
        if layout == whole:
            return name
        dtype = "" if layout.dtype == base.dtype else f", {self._constant(layout.dtype)}"
        if layout.slot >= self.inputs and not base.storage_offset() and not dtype:
            return f"{name}.as_strided({layout.size}, {layout.stride}, {layout.offset})"
        return f"strided({name}, {layout.size}, {layout.stride}, {layout.offset}{dtype})"


def _strided(
    base: Tensor,
    size: tuple[int, ...],
    stride: tuple[int, ...],
    offset: int,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """A view of `base`, in elements of `dtype` from its first on."""
    if dtype is not None:
        base = base.view(dtype)
    return base.as_strided(size, stride, base.storage_offset() + offset)


def _bound(launched: Launched, arguments: Sequence[Any]) -> list[Any]:
    """All arguments in the order of the kernel's signature, compile-time ones included."""
    names = launched.kernel.arg_names
    given = dict(zip(names, arguments, strict=False))
    return [given[name] if name in given else launched.options[name] for name in names]
