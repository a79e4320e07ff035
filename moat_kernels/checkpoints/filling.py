"""A state_dict into a model: everything is checked before the first tensor is overwritten."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from typing import Any

import torch

from .errors import CheckpointError
from .state_dicts import StateDict

HEAD_PREFIXES = ("final_layer_norm.", "logits_head.")
_POSITION_EMBEDDING = "relative_position_embedding"
_EXAMPLES = 3


def check_target(target: Mapping[str, Any]) -> None:
    """Raise if a tensor of the model, by name, is none that values can be copied into."""
    for name, tensor in target.items():
        if (kind := _unusual_kind(tensor)) is not None:
            raise CheckpointError(
                f"the model's {name} is {kind}: checkpoints are loaded into dense tensors; load "
                "before quantising, sharding or offloading, and after to_empty"
            )
        if tensor.is_inference() and not torch.is_inference_mode_enabled():
            raise CheckpointError(
                f"the model's {name} was made in inference mode, outside of which it cannot change"
            )


def check_fit(state_dict: StateDict, target: StateDict) -> None:
    """Raise if ``state_dict`` of a file has other names, shapes or kinds of tensors."""
    _check_names(state_dict, target)
    for name, tensor in state_dict.items():
        if (kind := _unusual_kind(tensor)) is not None:
            raise CheckpointError(f"{name} is {kind} in the file; only dense tensors are loaded")
    _check_shapes(state_dict, target)
    for name, tensor in target.items():
        if _number_kind(state_dict[name].dtype) != _number_kind(tensor.dtype):
            raise CheckpointError(
                f"{name} is {state_dict[name].dtype} in the file, {tensor.dtype} in the model"
            )
    _check_shared(state_dict, target)


def fill(model: torch.nn.Module, state_dict: StateDict) -> None:
    """Copy ``state_dict``, which fits, into ``model``; what it held is put back on any error."""
    tensors = model.state_dict(keep_vars=True).values()
    before = [(tensor, tensor.detach().clone()) for tensor in tensors]
    try:
        model.load_state_dict(state_dict)
    except BaseException as error:
        for tensor, value in before:
            # A tensor that refuses to be written still has its value.
            with torch.no_grad(), contextlib.suppress(RuntimeError):
                tensor.copy_(value)
        if not isinstance(error, Exception):
            raise
        raise CheckpointError(
            f"could not be copied into the model, which is as before: {error}"
        ) from error


def _check_names(state_dict: StateDict, target: StateDict) -> None:
    missing = [name for name in target if name not in state_dict]
    unexpected = [name for name in state_dict if name not in target]
    if not missing and not unexpected:
        return
    if not missing and all(name.endswith(_POSITION_EMBEDDING) for name in unexpected):
        raise CheckpointError(
            f"has position embeddings ({_some(unexpected)}), which change the function, "
            "but the model has none: build it with position_embedding=True"
        )
    if not unexpected and all(name.endswith(_POSITION_EMBEDDING) for name in missing):
        raise CheckpointError(
            f"has no position embeddings ({_some(missing)}), but the model has: "
            "build it with position_embedding=False"
        )
    if not unexpected and all(name.startswith(HEAD_PREFIXES) for name in missing):
        raise CheckpointError(
            f"has no classifier head ({_some(missing)}), but the model has: "
            "build it with features_only=True or num_classes=0"
        )
    raise CheckpointError(
        f"does not fit the model; missing in the file: {_some(missing)}; "
        f"not in the model: {_some(unexpected)}"
    )


def _check_shapes(state_dict: StateDict, target: StateDict) -> None:
    differing = [name for name in target if state_dict[name].shape != target[name].shape]
    if differing:
        shapes = [
            f"{name} is {list(state_dict[name].shape)} in the file, "
            f"{list(target[name].shape)} in the model"
            for name in differing
        ]
        message = f"does not fit the model: {_some(shapes, '; ')}"
        if all(name.startswith("logits_head.") for name in differing):
            classes = state_dict["logits_head.bias"].numel()
            message += (
                f"; build the model with num_classes={classes}, or without head "
                "(features_only=True), or load with fine_tune=True, which leaves its own as it is"
            )
        raise CheckpointError(message)


def _check_shared(state_dict: StateDict, target: StateDict) -> None:
    """Of names that are one tensor in the model, the last would silently win."""
    names: dict[tuple[object, ...], str] = {}
    for name, tensor in target.items():
        place = (tensor.device, tensor.data_ptr(), tensor.shape, tensor.stride())
        first = names.setdefault(place, name) if tensor.numel() else name
        if first != name and not torch.equal(state_dict[first], state_dict[name]):
            raise CheckpointError(
                f"{first} and {name} are one tensor in the model, but not equal in the file"
            )


def _unusual_kind(value: Any) -> str | None:
    """What ``value`` is if it is no dense tensor with data of its own; None if it is one."""
    if type(value) not in (torch.Tensor, torch.nn.Parameter):
        return f"a {type(value).__name__}"
    if value.is_nested:
        return "a nested tensor"
    if value.is_quantized:
        return f"quantised ({value.dtype})"
    if value.layout is not torch.strided:
        return str(value.layout)
    return "on the meta device, without data" if value.is_meta else None


def _number_kind(dtype: torch.dtype) -> str:
    if dtype is torch.bool:
        return "bool"
    if dtype.is_complex:
        return "complex"
    return "floating" if dtype.is_floating_point else "integer"


def _some(items: list[str], separator: str = ", ") -> str:
    shown = separator.join(items[:_EXAMPLES]) or "nothing"
    rest = len(items) - _EXAMPLES
    return f"{shown}{separator}and {rest} more" if rest > 0 else shown
