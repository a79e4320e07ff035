"""Models and state_dicts to load into one another."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

StateDict = dict[str, torch.Tensor]

WEIGHTS = {"stem.weight": torch.full((2, 3), 5.0), "stem.bias": torch.full((2,), 6.0)}


def module_with(state_dict: StateDict) -> torch.nn.Module:
    """A module whose state_dict has these names, shapes and dtypes, and zeros."""
    root = torch.nn.Module()
    for name, tensor in state_dict.items():
        *path, leaf = name.split(".")
        module = root
        for part in path:
            if part not in dict(module.named_children()):
                module.add_module(part, torch.nn.Module())
            module = module.get_submodule(part)
        module.register_buffer(leaf, torch.zeros_like(tensor))
    return root


def is_untouched(model: torch.nn.Module) -> bool:
    return not any(tensor.any() for tensor in model.state_dict().values())


def has_weights(model: torch.nn.Module) -> bool:
    return all(torch.equal(t, WEIGHTS[name]) for name, t in model.state_dict().items())


def saved(folder: Path, content: Any) -> Path:
    torch.save(content, folder / "x.ckpt")
    return folder / "x.ckpt"
