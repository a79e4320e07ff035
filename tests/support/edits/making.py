"""What an edit is: the same change, made to both modules of a pair."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from random import Random
from typing import Any

import torch
from torch import Tensor, nn

from support.edited_pairs import Pair

BatchNorm = nn.modules.batchnorm._BatchNorm


class Impossible(Exception):
    """The edit cannot be made to the plain module either."""


@dataclass(frozen=True)
class Edit:
    """text: for the report. settle: what follows each change of mode."""

    text: str
    apply: Callable[[Pair], None]
    settle: Callable[[nn.Module], None] | None = None


def both(change: Callable[[nn.Module], object]) -> Callable[[Pair], None]:
    def apply(pair: Pair) -> None:
        try:
            change(pair.plain)
        except Exception as error:
            raise Impossible(repr(error)) from error
        change(pair.fused)

    return apply


def at(path: str, text: str, change: Callable[[Any], object]) -> Edit:
    return Edit(f"{path or 'itself'}: {text}", both(lambda root: change(root.get_submodule(path))))


def replacing(path: str, text: str, make: Callable[[Any], nn.Module]) -> Edit:
    """make: what takes the place of the module that it is given."""

    def change(root: nn.Module) -> None:
        owner, _, name = path.rpartition(".")
        old = root.get_submodule(path)
        torch.default_generator.manual_seed(11)
        new = make(old)
        if new is not old:
            make_like(new, old)
        root.get_submodule(owner)._modules[name] = new

    return Edit(f"{path} = {text}", both(change))


def make_like(new: nn.Module, old: nn.Module) -> None:
    """In the dtype of what it replaces, with weights that matter."""
    tensor = next(iter([*old.parameters(), *old.buffers()]), None)
    if tensor is not None:
        new.to(tensor.dtype)
    mine = set(old.modules())
    for module in new.modules():
        if module in mine:
            continue
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.dim() > 1:
                nn.init.normal_(parameter, std=parameter[0].numel() ** -0.5)
            else:
                nn.init.normal_(parameter, 1.0 if name == "weight" else 0.0, 0.2)
        if isinstance(module, BatchNorm) and module.running_var is not None:
            nn.init.uniform_(module.running_var, 0.5, 1.5)
            nn.init.normal_(module.running_mean, std=0.2)


def find(rng: Random, root: nn.Module, *kinds: type, inner: bool = False) -> tuple[str, Any]:
    """The path and the module of one of `kinds`, at random; ("", None) if there is none."""
    found = [
        (path, module)
        for path, module in root.named_modules()
        if isinstance(module, kinds) and (path or not inner)
    ]
    return rng.choice(found) if found else ("", None)


def random_tensor(shape: Sequence[int], like: Tensor, std: float = 0.5) -> Tensor:
    generator = torch.Generator().manual_seed(len(shape) + sum(shape))
    return (torch.randn(shape, generator=generator) * std).to(like.dtype)


def setting(**values: Any) -> Callable[[nn.Module], None]:
    def change(module: nn.Module) -> None:
        for name, value in values.items():
            setattr(module, name, value)

    return change
