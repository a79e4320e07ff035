"""Modules seen through their parametrizations, and their tensors read quickly."""

from __future__ import annotations

from typing import Any

from torch import nn


def tensor_of(module: nn.Module | None, name: str) -> Any:
    """`module.name`: a parameter, a buffer, or what a parametrization computes; None of None.

    nn.Module looks attributes up in Python, which takes a microsecond or more for each.
    """
    if module is None:
        return None
    for tensors in (module._parameters, module._buffers):
        if name in tensors:
            return tensors[name]
    return getattr(module, name)


def child(module: nn.Module | None, name: str) -> Any:
    """`module.name`, mostly another module; None of None. As quick as `tensor_of`."""
    if module is None:
        return None
    modules = module._modules
    return modules[name] if name in modules else getattr(module, name)


def is_parametrized(module: nn.Module) -> bool:
    """Whether torch.nn.utils.parametrize computes a tensor of the module."""
    return "parametrizations" in module._modules


def plain_class(module: nn.Module) -> type[nn.Module]:
    """The module's class, without the subclass that parametrizations give it."""
    kind = type(module)
    return kind.__bases__[0] if is_parametrized(module) else kind
