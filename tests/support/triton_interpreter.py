"""Correct bfloat16 in Triton's interpreter, which runs kernels on the CPU without a GPU.

The interpreter holds bfloat16 as its bits, in uint16, and up to Triton 3.9 computes with those as
if they were numbers: products and sums are garbage, silently, and conversions from float32 are cut
off rather than rounded. `install` makes arithmetic, matrix products and conversions right, and
turns every other operation on bfloat16 into an error: a kernel should widen to float32 first.
It also makes the interpreter twice as fast, and Triton 3.6's work with NumPy 2.5.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import triton.language as tl
from triton.runtime import interpreter
from triton.runtime.interpreter import InterpreterBuilder, ReduceScanOpInterface, TensorHandle


def _is_bfloat16(handle: Any) -> bool:
    return isinstance(handle, TensorHandle) and handle.dtype.scalar == tl.bfloat16


def _widen(handle: TensorHandle) -> TensorHandle:
    """bfloat16 bits as float32 numbers; other types as they are."""
    if not _is_bfloat16(handle):
        return handle
    return TensorHandle((handle.data.astype(np.uint32) << 16).view(np.float32), tl.float32)


def _round(values: np.ndarray) -> TensorHandle:
    """float32 numbers as bfloat16 bits, rounded to nearest even."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return TensorHandle(np.where(np.isnan(values), np.uint16(0x7FC0), rounded), tl.bfloat16)


def _refuse(name: str, original: Callable) -> Callable:
    def checked(self: Any, *arguments: Any) -> Any:
        if any(map(_is_bfloat16, arguments)):
            raise NotImplementedError(f"{name} on bfloat16 in the interpreter: widen to float32")
        return original(self, *arguments)

    return checked


def install(monkeypatch: pytest.MonkeyPatch) -> None:
    """Patch the interpreter until `monkeypatch` is undone."""
    _correct_bfloat16(monkeypatch)
    _speed_up(monkeypatch)
    _index_by_scalars(monkeypatch)


def _index_by_scalars(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton 3.6 calls int() on arrays of one element, which NumPy 2.5 refuses."""
    patch_tensor = interpreter._patch_lang_tensor

    def patched(tensor: Any, scope: Any) -> None:
        patch_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    monkeypatch.setattr(interpreter, "_patch_lang_tensor", patched)


def _correct_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    builder = InterpreterBuilder
    dot, binary, cast = builder.create_dot, builder.binary_op, builder.cast_impl

    def create_dot(self: Any, a: Any, b: Any, *arguments: Any) -> Any:
        return dot(self, _widen(a), _widen(b), *arguments)

    def binary_op(self: Any, left: Any, right: Any, operation: Callable) -> Any:
        if not _is_bfloat16(left):
            return binary(self, left, right, operation)
        result = binary(self, _widen(left), _widen(right), operation)
        return _round(result.data) if result.data.dtype == np.float32 else result

    def cast_impl(self: Any, source: Any, target: Any) -> Any:
        if target.scalar != tl.bfloat16:
            return cast(self, _widen(source), target)
        return source if _is_bfloat16(source) else _round(source.data.astype(np.float32))

    monkeypatch.setattr(builder, "create_dot", create_dot)
    monkeypatch.setattr(builder, "binary_op", binary_op)
    monkeypatch.setattr(builder, "cast_impl", cast_impl)
    # The conversions hold the original by name, but look `cast_impl` up when called.
    for name in ("unary_op", "create_fma", "create_clampf", "create_erf", "create_rsqrt"):
        monkeypatch.setattr(builder, name, _refuse(name, getattr(builder, name)))

    check_tensor = ReduceScanOpInterface.check_tensor

    def checked(self: Any, inputs: Any) -> None:
        if any(x.dtype.scalar == tl.bfloat16 for x in inputs):
            raise NotImplementedError("reduction of bfloat16 in the interpreter: widen to float32")
        check_tensor(self, inputs)

    monkeypatch.setattr(ReduceScanOpInterface, "check_tensor", checked)


def _speed_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave out checks of integer overflow, and prepare each module once rather than per call."""
    options = dataclasses.replace(interpreter.interpreter_builder.options, sanitize_overflow=False)
    monkeypatch.setattr(interpreter.interpreter_builder, "options", options)
    prepared: set[str] = set()

    def call(self: Any, *arguments: Any, **options: Any) -> Any:
        """A kernel calls another function."""
        if self.fn.__module__ not in prepared:
            interpreter._patch_lang(self.fn)
            prepared.add(self.fn.__module__)
        try:
            return self.rewrite()(*arguments, **options)
        except Exception as error:
            raise interpreter.InterpreterError(repr(error)) from error

    monkeypatch.setattr(interpreter.InterpretedFunction, "__call__", call)
