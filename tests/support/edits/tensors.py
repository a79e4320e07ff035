"""Parameters that are other tensors, or none: frozen, shared, computed, elsewhere."""

from __future__ import annotations

from collections.abc import Callable
from random import Random
from typing import Any

import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize

from moat_kernels import reference
from moat_kernels.drop_path import DropPath
from support.edited_modules import (
    Doubled,
    Scaled,
    Scaling,
)
from support.edits.making import (
    BatchNorm,
    Edit,
    at,
    both,
    find,
    setting,
)


def _holders(rng: Random, root: nn.Module, dims: int = 1) -> tuple[str, Any, str]:
    """Path, module and name of a parameter of at least `dims` dimensions."""
    found = [
        (path, module, name)
        for path, module in root.named_modules()
        for name, parameter in module.named_parameters(recurse=False)
        if parameter.dim() >= dims and ".parametrizations" not in path
    ]
    return rng.choice(found) if found else ("", None, "")


def parametrized(rng: Random, root: nn.Module) -> Edit | None:
    path, module, name = _holders(rng, root)
    if module is None:
        return None
    makes: dict[str, Callable[[nn.Module], object]] = {
        "doubled": lambda m: parametrize.register_parametrization(m, name, Doubled()),
        "scaled by a parameter": lambda m: parametrize.register_parametrization(
            m, name, Scaling().to(getattr(m, name).dtype)
        ),
        "doubled and undone": lambda m: (
            parametrize.register_parametrization(m, name, Doubled()),
            parametrize.remove_parametrizations(m, name),
        ),
    }
    if getattr(module, name).dim() > 1:
        makes |= {
            "weight_norm": lambda m: parametrizations.weight_norm(m, name),
            "spectral_norm": lambda m: (
                torch.default_generator.manual_seed(3),
                parametrizations.spectral_norm(m, name),
            ),
            "old weight_norm": lambda m: nn.utils.weight_norm(m, name),
            "old spectral_norm": lambda m: (
                torch.default_generator.manual_seed(3),
                nn.utils.spectral_norm(m, name),
            ),
        }
    text = rng.choice(list(makes))
    return at(path, f"{name} {text}", makes[text])


def another_tensor(rng: Random, root: nn.Module) -> Edit | None:
    path, module, name = _holders(rng, root)
    if module is None:
        return None

    def attribute(m: nn.Module) -> None:
        tensor = m._parameters[name]
        delattr(m, name)
        setattr(m, name, (tensor * 1.5).detach())

    def buffer(m: nn.Module) -> None:
        tensor = m._parameters[name].detach() * 1.5
        delattr(m, name)
        m.register_buffer(name, tensor)

    def subclass(m: nn.Module) -> None:
        setattr(m, name, nn.Parameter(Scaled.of(m._parameters[name].detach())))

    def transposed(m: nn.Module) -> None:
        tensor = m._parameters[name].detach()
        dims = list(range(tensor.dim()))[::-1]
        setattr(m, name, nn.Parameter(tensor.permute(dims).contiguous().permute(dims)))

    def expanded(m: nn.Module) -> None:
        tensor = m._parameters[name].detach()
        setattr(m, name, nn.Parameter(tensor[:1].expand_as(tensor), requires_grad=False))

    def in_another_memory(m: nn.Module) -> None:
        m._parameters[name].data = m._parameters[name].data * 1.5

    def shadowed(m: nn.Module) -> None:
        m.__dict__[name] = m._parameters[name].detach() * 1.5

    def by_a_property(m: nn.Module) -> None:
        meant = property(lambda self: 1.5 * self._parameters[name])
        m.__class__ = type(f"My{type(m).__name__}", (type(m),), {name: meant})

    changes: dict[str, Callable[[nn.Module], None]] = {
        "is an attribute": attribute,
        "is a buffer": buffer,
        "is a tensor subclass": subclass,
        "has other strides": transposed,
        "has stride 0": expanded,
        "in another dtype": lambda m: setattr(
            m, name, nn.Parameter(m._parameters[name].detach().to(torch.bfloat16))
        ),
        "frozen": lambda m: m._parameters[name].requires_grad_(False),
        "another value, by .data": lambda m: m._parameters[name].data.mul_(1.5),
        "other memory, by .data": in_another_memory,
        "shadowed by an attribute": shadowed,
        "a property of a subclass": by_a_property,
        "on the meta device but in calls": offload,
    }
    text = rng.choice(list(changes))
    return at(path, f"{name} {text}", changes[text])


def offload(module: nn.Module) -> None:
    """As accelerate's cpu_offload: the weights are elsewhere, and come for each call."""
    here = dict(module._parameters)
    away = {
        name: tensor if tensor is None else nn.Parameter(tensor.detach().to("meta"))
        for name, tensor in here.items()
    }
    original = module.forward

    def forward(*inputs: Any, **options: Any) -> Any:
        module._parameters.update(here)
        try:
            return original(*inputs, **options)
        finally:
            module._parameters.update(away)

    module._parameters.update(away)
    module.forward = forward


def something_else_inside(rng: Random, root: nn.Module) -> Edit | None:
    """Parts that nobody calls."""
    path, _ = find(rng, root, nn.Module)
    changes: dict[str, Callable[[nn.Module], object]] = {
        "another child": lambda m: m.add_module("another", nn.Linear(2, 2)),
        "another parameter": lambda m: m.register_parameter("extra", nn.Parameter(torch.ones(2))),
        "another buffer": lambda m: m.register_buffer("extra", torch.ones(2)),
        "another attribute": setting(extra=("a", 1)),
    }
    text = rng.choice(list(changes))
    return at(path, text, changes[text])


def frozen_parameters(rng: Random, root: nn.Module) -> Edit | None:
    path, _ = find(rng, root, nn.Module)
    return at(path, "requires_grad_(False)", lambda module: module.requires_grad_(False))


def another_dtype(rng: Random, root: nn.Module) -> Edit | None:
    path, _ = find(rng, root, nn.Conv2d, nn.Linear, BatchNorm, nn.LayerNorm, reference.MBConvBlock)
    dtype = rng.choice([torch.float64, torch.float32, torch.bfloat16])
    return at(path, f"to({dtype})", lambda module: module.to(dtype))


def shared(rng: Random, root: nn.Module) -> Edit | None:
    """The same module, or the same parameter, in two places."""
    kind = rng.choice([BatchNorm, nn.Conv2d, nn.Linear, DropPath, reference.MBConvBlock])
    here, there = (find(rng, root, kind, inner=True) for _ in range(2))
    shapes = [
        [parameter.shape for parameter in module.parameters()] if module is not None else None
        for _, module in (here, there)
    ]
    if here[1] is there[1] or shapes[0] != shapes[1]:
        return None

    def module(root: nn.Module) -> None:
        owner, _, name = there[0].rpartition(".")
        root.get_submodule(owner)._modules[name] = root.get_submodule(here[0])

    def weight(root: nn.Module) -> None:
        root.get_submodule(there[0]).weight = root.get_submodule(here[0]).weight

    if hasattr(here[1], "weight") and rng.random() < 0.4:
        return Edit(f"{there[0]}.weight = {here[0]}.weight", both(weight))
    return Edit(f"{there[0]} = {here[0]}", both(module))
