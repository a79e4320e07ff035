"""The operator library of this package, shared by all ops: `torch.ops.moat_kernels.*`."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterable, Iterator
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from moat_kernels.ops.common.flops import register_flops

Implementation = Callable[..., Tensor | list[Tensor] | tuple[Tensor, ...]]

# A fragment: the native extension, where it is built, defines the library itself.
LIBRARY = torch.library.Library("moat_kernels", "FRAGMENT")

# What `define_op` registered, by the operator's name: for modes that look inside the operators.
IMPLEMENTATIONS: dict[str, Implementation] = {}


def define_op(
    schema: str,
    implementation: Implementation,
    fake: Implementation,
    flops: Callable[..., int] | None = None,
) -> None:
    """Register an op with one implementation for every device and one for fake tensors.

    flops: as `register_flops` takes it; None: nothing of it counts.
    """
    name = schema.partition("(")[0]
    IMPLEMENTATIONS[name] = implementation
    LIBRARY.define(schema)
    LIBRARY.impl(name, implementation, "CompositeExplicitAutograd")
    register_fake(name, fake, LIBRARY)
    if flops is not None:
        register_flops(name, flops)


def register_fake(
    name: str, fake: Callable[..., Any], library: torch.library.Library | None = None
) -> None:
    """Register what gives the shapes of an op's results, for fake and meta tensors.

    PyTorch asks it as well where one tensor is on meta and others are not: its results would be
    memory that nobody writes, so such calls raise RuntimeError.
    """

    @functools.wraps(fake)
    def checked(*arguments: Any) -> Any:
        devices = {str(tensor.device) for tensor in _tensors_in(arguments)}
        if len(devices) > 1:
            raise RuntimeError(
                f"{name}: all tensors must be on one device, got {', '.join(sorted(devices))}"
            )
        return fake(*arguments)

    torch.library.register_fake(f"moat_kernels::{name}", checked, lib=library)


def _tensors_in(arguments: Iterable[Any]) -> Iterator[Tensor]:
    """The tensors among the arguments and in lists of them."""
    for argument in arguments:
        if isinstance(argument, Tensor):
            yield argument
        elif isinstance(argument, (list, tuple)):
            yield from _tensors_in(argument)


def is_watched() -> bool:
    """Whether something must see the operators: a compiler or a dispatch mode.

    Other calls go straight to the implementation: dispatching to Python takes 0.05 to 0.1 ms.
    """
    if torch.compiler.is_compiling():
        return True
    return is_in_torch_dispatch_mode() and not _looks_inside.get()


_looks_inside: ContextVar[bool] = ContextVar("moat_kernels_looks_inside", default=False)


@contextlib.contextmanager
def looking_inside() -> Iterator[None]:
    """Inside the `with` block, in this thread, calls go the way they do without dispatch modes.

    For a mode that wants to see what the operators are made of.
    """
    token = _looks_inside.set(True)
    try:
        yield
    finally:
        _looks_inside.reset(token)
