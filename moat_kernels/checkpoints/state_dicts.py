"""Which dict of tensors in a checkpoint is the state_dict of a model, and what its names mean.

Training scripts wrap state_dicts (``{"model": ..., "optimizer": ..., "epoch": 3}``), and wrappers
of modules put prefixes before all names (``module.``, ``_orig_mod.``).
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

import torch

from .errors import CheckpointError

StateDict = dict[str, torch.Tensor]

# DistributedDataParallel and AveragedModel; Lightning; torch.compile.
_PREFIXES = ("module.", "model.", "_orig_mod.")
_MAXIMUM_PREFIXES = 8
#: What torch.optim.swa_utils.AveragedModel has beside the module that it wraps.
AVERAGED_MODEL_COUNTER = "n_averaged"
# {"ema": {"model": {"state_dict": ...}}} is as deep as checkpoints get.
_MAXIMUM_DEPTH = 4
_EXAMPLES = 8


def choose_state_dict(
    content: Any, names: Collection[str], key: str | None, prefer: Sequence[str] = ()
) -> tuple[str, StateDict]:
    """The state_dict in ``content`` for a model with ``names``, and the key that leads to it.

    Args:
        content: what a file holds: a state_dict, or dicts around one.
        names: the names in the model's state_dict.
        key: where the state_dict is (``"model_ema"``, ``"ema.state_dict"``); None takes the only
            one that has all names of the model, or else the only one that has any, or else the
            only one.
        prefer: keys of which the first that is there is taken where several would do.

    Raises:
        CheckpointError: there is none, none at ``key``, or several.
    """
    if not isinstance(content, dict):
        raise CheckpointError(f"holds a {type(content).__name__}, not a state_dict")
    found = _find_state_dicts(content)
    if not found:
        raise CheckpointError(f"no state_dict: {_stray(content)}")
    if key is not None:
        if key not in found:
            raise CheckpointError(f"no state_dict at key={key!r}; there is {_account(found)}")
        return key, found[key]
    candidates = _candidates(found, names)
    preferred = [name for name in prefer if name in candidates]
    if preferred:
        return preferred[0], candidates[preferred[0]]
    if len(candidates) > 1:
        raise CheckpointError(
            f"which state_dict to take is not clear, there is {_account(candidates)}; choose one "
            f"by load_checkpoint(model, path, key={next(iter(candidates))!r}), or by --key of the "
            "command line"
        )
    return next(iter(candidates.items()))


def beside(content: Mapping[Any, Any], key: str, above: str = "") -> list[str]:
    """The names of everything in ``content`` that is not in the state_dict at ``key``."""
    if above == key:
        return []
    names = []
    for name, value in content.items():
        joined = _join(above, str(name))
        if isinstance(value, dict) and f"{key}.".startswith(f"{joined}."):
            names += beside(value, key, joined)
        else:
            names.append(joined)
    return names


def common_prefix(names: Iterable[str]) -> str:
    """The prefixes of wrappers that all ``names`` carry, ``module._orig_mod.`` for example."""
    names = [name for name in names if name != AVERAGED_MODEL_COUNTER]
    prefix = ""
    for _ in range(_MAXIMUM_PREFIXES if names else 0):
        longer = (prefix + part for part in _PREFIXES)
        found = next((p for p in longer if all(name.startswith(p) for name in names)), None)
        if found is None:
            break
        prefix = found
    return prefix


def _find_state_dicts(content: dict[Any, Any]) -> dict[str, StateDict]:
    """All dicts of tensors in ``content``, by the keys that lead there, joined by dots."""
    found: dict[str, StateDict] = {}
    level, seen = [("", content)], {id(content)}
    for _ in range(_MAXIMUM_DEPTH):
        below = []
        for name, mapping in level:
            if mapping and all(_is_named_tensor(item) for item in mapping.items()):
                found[name] = mapping
                continue
            for key, value in mapping.items():
                # A pickle may hold one dict in several places, even within itself.
                if isinstance(key, str) and isinstance(value, dict) and id(value) not in seen:
                    seen.add(id(value))
                    below.append((_join(name, key), value))
        level = below
    return found


def _is_named_tensor(item: tuple[Any, Any]) -> bool:
    return isinstance(item[0], str) and isinstance(item[1], torch.Tensor)


def _candidates(found: dict[str, StateDict], names: Collection[str]) -> dict[str, StateDict]:
    """Those of ``found`` that have all of ``names``; else those that have any; else all."""
    wanted = _bare_names(names)
    shared = {key: len(wanted & _bare_names(mapping)) for key, mapping in found.items()}
    complete = {key: found[key] for key in found if shared[key] == len(wanted)}
    return complete or {key: found[key] for key in found if shared[key]} or found


def _bare_names(names: Collection[str]) -> set[str]:
    prefix = common_prefix(names)
    return {name.removeprefix(prefix) for name in names}


def _join(above: str, key: str) -> str:
    return f"{above}.{key}" if above else key


def _account(found: Mapping[str, StateDict]) -> str:
    items = [f"{key!r} ({len(mapping)} tensors)" for key, mapping in found.items()]
    rest = len(items) - _EXAMPLES
    return ", ".join(items[:_EXAMPLES]) + (f" and {rest} more" if rest > 0 else "")


def _stray(content: Mapping[Any, Any]) -> str:
    """What is in ``content`` that no state_dict has."""
    strays = [item for item in content.items() if not _is_named_tensor(item)]
    if not strays:
        return "it is empty"
    name, value = strays[0]
    if isinstance(value, torch.Tensor):
        return f"{name!r} is not the name of a tensor"
    return f"{name!r} is a {type(value).__name__}, not a tensor"
