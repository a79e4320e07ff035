"""Methods, classes and hooks that have a say; and those that have none."""

from __future__ import annotations

from random import Random
from typing import Any

from torch import Tensor, nn

from support.edited_pairs import CALLS
from support.edits.making import (
    Edit,
    at,
    find,
)
from support.patches import HOOKS, METHOD_PATCHES, public_methods


def patched_method(rng: Random, root: nn.Module) -> Edit | None:
    path, module = find(rng, root, nn.Module)
    called = set() if isinstance(module, nn.ModuleList) else {"forward"}
    uncalled = {"extra_repr", "reset_classifier", "get_classifier", "no_weight_decay"}
    uncalled |= {"parameter_groups", "frozen_steps", "steps_of_stages", "steps_of_head"}
    uncalled |= {"channels", "strides"}
    uncalled |= {"group_matcher", "set_grad_checkpointing"}
    uncalled |= {"prune_intermediate_layers", "forward_intermediates"}
    uncalled |= {"read", "read_attention_half"}
    methods = sorted((public_methods(type(module)) | called) - uncalled)
    if not methods:
        return None
    method, kind = rng.choice(methods), rng.choice(list(METHOD_PATCHES))
    return at(path, f"{method} patched {kind}", lambda m: METHOD_PATCHES[kind](m, method))


def subclass_without_change(rng: Random, root: nn.Module) -> Edit | None:
    path, _ = find(rng, root, nn.Module)

    def change(module: nn.Module) -> None:
        module.__class__ = type(f"My{type(module).__name__}", (type(module),), {})

    return at(path, "a subclass that changes nothing", change)


def hooked(rng: Random, root: nn.Module) -> Edit | None:
    path, _ = find(rng, root, nn.Module)
    kind = rng.choice(list(HOOKS))
    return at(path, kind, HOOKS[kind])


def watched(rng: Random, root: nn.Module) -> Edit | None:
    """A hook that only looks, as a profiler's."""
    path, _ = find(rng, root, nn.Module)

    def look(module: nn.Module, inputs: Any, output: Any) -> None:
        CALLS.append(f"{path} {tuple(output.shape) if isinstance(output, Tensor) else ''}")

    return at(path, "a hook that looks", lambda module: module.register_forward_hook(look))


def hooked_and_unhooked(rng: Random, root: nn.Module) -> Edit | None:
    path, _ = find(rng, root, nn.Module)
    kind = rng.choice(["forward hook", "full backward hook", "forward pre-hook"])
    return at(path, f"{kind}, removed again", lambda module: HOOKS[kind](module).remove())
