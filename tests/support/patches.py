"""Ways to have a say in what a module computes: methods, classes and hooks that change the result.

What is changed becomes value + 0.3 sin(3 value), or of that kind: neither a norm nor a linear layer
that follows hides it.
"""

from __future__ import annotations

import dataclasses
import inspect
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as hooks_of_all

from moat_kernels.normalization import Norm, NormParameters
from moat_kernels.ops.mbconv import MBConvDescription

PACKAGE = "moat_kernels"


def bend(value: Tensor) -> Tensor:
    """Another value for each value, also up to scale and shift; a variance stays positive."""
    return value + 0.3 * torch.sin(3 * value) if value.is_floating_point() else value


def alter(value: Any, *inputs: Any) -> Any:
    """A result of a module's method, changed. inputs: of the method, where it returned None."""
    if isinstance(value, Tensor):
        return bend(value)
    if value is None:  # DropPath.scale where nothing drops
        (x,) = inputs
        return 1 + 0.5 * torch.tanh(x.mean((1, 2, 3)))
    if isinstance(value, NormParameters):
        return value._replace(weight=bend(value.weight), running_var=bend(value.running_var))
    if isinstance(value, Norm):
        return dataclasses.replace(value, eps=0.5)
    if isinstance(value, MBConvDescription):
        return dataclasses.replace(value, pre_norm=alter(value.pre_norm))
    if isinstance(value, tuple) and hasattr(value, "_replace"):  # MBConvParameters
        return value._replace(**{name: alter(part) for name, part in _tensors(value).items()})
    if isinstance(value, dict):
        return type(value)((name, alter(part)) for name, part in value.items())
    if isinstance(value, list | tuple):
        return type(value)(alter(part) for part in value)
    raise TypeError(f"no way to change a {type(value).__name__}: add one, or exclude the method")


def _tensors(value: Any) -> dict[str, Tensor]:
    return {name: part for name, part in value._asdict().items() if isinstance(part, Tensor)}


def public_methods(kind: type[nn.Module]) -> set[str]:
    """Names of the functions that the class has of this package's classes."""
    return {
        name
        for base in kind.__mro__
        if base.__module__.split(".")[0] == PACKAGE
        for name, value in vars(base).items()
        if inspect.isfunction(value) and not name.startswith("_")
    }


def on_the_instance(module: nn.Module, method: str) -> None:
    """`module.method = f`, where f calls what was there before."""
    original = getattr(module, method)

    def patched(*inputs: Any, **options: Any) -> Any:
        return alter(original(*inputs, **options), *inputs)

    setattr(module, method, patched)


def bound_to_the_instance(module: nn.Module, method: str) -> None:
    """The same by types.MethodType: a copy of the module gets a method of its own."""
    original = getattr(type(module), method)

    def patched(self: nn.Module, *inputs: Any, **options: Any) -> Any:
        return alter(original(self, *inputs, **options), *inputs)

    setattr(module, method, types.MethodType(patched, module))


def overriding(kind: type[nn.Module], method: str) -> type[nn.Module]:
    """A subclass whose `method` changes what its base's returns."""

    def patched(self: nn.Module, *inputs: Any, **options: Any) -> Any:
        return alter(getattr(kind, method)(self, *inputs, **options), *inputs)

    return type(kind)(f"Patched{kind.__name__}", (kind,), {method: patched})


def by_class(module: nn.Module, method: str) -> None:
    """`module.__class__ = Patched`."""
    module.__class__ = overriding(type(module), method)


@contextmanager
def patched_class(kind: type[nn.Module], method: str) -> Iterator[None]:
    """In the `with` block `kind` itself has another `method`, as tracers patch nn.Conv2d."""
    own, original = vars(kind).get(method), getattr(kind, method)

    def patched(self: nn.Module, *inputs: Any, **options: Any) -> Any:
        return alter(original(self, *inputs, **options), *inputs)

    setattr(kind, method, patched)
    try:
        yield
    finally:
        if own is None:
            delattr(kind, method)
        else:
            setattr(kind, method, own)


Method = Callable[[nn.Module, str], None]
METHOD_PATCHES: dict[str, Method] = {
    "on the instance": on_the_instance,
    "bound to the instance": bound_to_the_instance,
    "by class": by_class,
}


def _forward_hook(module: nn.Module, inputs: Any, output: Any) -> Any:
    return alter(output)


def _forward_hook_with_options(module: nn.Module, inputs: Any, options: Any, output: Any) -> Any:
    return alter(output)


def _pre_hook(module: nn.Module, inputs: Any) -> Any:
    return alter(inputs)


def _pre_hook_with_options(module: nn.Module, inputs: Any, options: Any) -> Any:
    return alter(inputs), options


def _backward_hook(module: nn.Module, grads: Any, output_grads: Any) -> Any:
    return tuple(grad if grad is None else bend(grad) for grad in grads)


def _backward_pre_hook(module: nn.Module, grads: Any) -> Any:
    return tuple(grad if grad is None else bend(grad) for grad in grads)


def _weight_hook(module: nn.Module, inputs: Any) -> None:
    """As accelerate and old-style weight norm: what the module holds is made when it is called."""
    for name in ("weight", "bias"):
        tensor = module._parameters.get(name)
        if tensor is not None:
            del module._parameters[name]
            setattr(module, name, bend(tensor))
            module.hidden = {**getattr(module, "hidden", {}), name: tensor}


def _weight_hook_after(module: nn.Module, inputs: Any, output: Any) -> None:
    for name, tensor in getattr(module, "hidden", {}).items():
        delattr(module, name)
        module.register_parameter(name, tensor)
    module.hidden = {}


def _weights_at_the_call(module: nn.Module) -> None:
    module.register_forward_pre_hook(_weight_hook)
    module.register_forward_hook(_weight_hook_after)


HOOKS: dict[str, Callable[[nn.Module], Any]] = {
    "forward hook": lambda module: module.register_forward_hook(_forward_hook),
    "forward hook with options": lambda module: module.register_forward_hook(
        _forward_hook_with_options, with_kwargs=True
    ),
    "forward pre-hook": lambda module: module.register_forward_pre_hook(_pre_hook),
    "forward pre-hook with options": lambda module: module.register_forward_pre_hook(
        _pre_hook_with_options, with_kwargs=True
    ),
    "full backward hook": lambda module: module.register_full_backward_hook(_backward_hook),
    "full backward pre-hook": lambda module: module.register_full_backward_pre_hook(
        _backward_pre_hook
    ),
    "weights made at the call": _weights_at_the_call,
}


def _for_marked(hook: Callable[..., Any]) -> Callable[..., Any]:
    """A hook for all modules that acts on those called `mark`ed: copies of modules stay so."""

    def act(module: nn.Module, *rest: Any) -> Any:
        return hook(module, *rest) if "marked" in module.__dict__ else None

    return act


def mark(module: nn.Module) -> None:
    module.marked = True


# Of all modules at once: each returns a handle.
GLOBAL_HOOKS: dict[str, Callable[[], Any]] = {
    "forward hook": lambda: hooks_of_all.register_module_forward_hook(_for_marked(_forward_hook)),
    "forward pre-hook": lambda: hooks_of_all.register_module_forward_pre_hook(
        _for_marked(_pre_hook)
    ),
    "full backward hook": lambda: hooks_of_all.register_module_full_backward_hook(
        _for_marked(_backward_hook)
    ),
    "full backward pre-hook": lambda: hooks_of_all.register_module_full_backward_pre_hook(
        _for_marked(_backward_pre_hook)
    ),
}
