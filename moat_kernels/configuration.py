"""The configuration that a MOAT's weights were made for, which their shapes do not tell.

It travels in a state_dict's metadata, where PyTorch keeps the versions of modules, and in the
header of a .safetensors file; neither adds a name to the state_dict.
"""

from __future__ import annotations

import json
from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

METADATA_KEY = "moat"

# The rest, widths for example, names and shapes of tensors tell. How these change what a model
# computes is exact: windows are cut, tables resized and maps strided at every call, which official
# code does with the weights of another configuration too.
_ADAPTED = {
    "window_size": "attention is cut into the model's windows, position tables are resized to them",
    "global_attention_at_end": "attention is cut into the model's windows",
    "output_stride": "the model's strides are used",
}
_FIXED = {"pool_size": "the model's pool is used, results differ until it is trained"}


class ConfigurationError(ValueError):
    """Weights were made for a model that computes something else."""


def adaptations(
    found: Mapping[str, Any], own: Mapping[str, Any], fine_tune: bool = False
) -> list[str]:
    """What a model of the configuration `own` does otherwise than the one the weights are from.

    Raises ConfigurationError where that would give other results than the weights were made for,
    unless these are but a start (`fine_tune`).
    """
    differing = {
        name: value for name, value in _plain(found).items() if value != _plain(own).get(name)
    }
    for name in differing:
        if name in _FIXED and not fine_tune:
            raise ConfigurationError(
                f"{name} is {found[name]!r} for these weights, {own[name]!r} in the model, which "
                f"changes what it computes: build it with {name}={found[name]!r}, or take them as "
                "a start for training: load_checkpoint(..., fine_tune=True), "
                "load_state_dict(dict(state_dict))"
            )
        if name not in own:
            raise ConfigurationError(
                f"these weights are for a model with {name}={found[name]!r}, which this version of "
                "moat_kernels does not know"
            )
    told = {**_ADAPTED, **_FIXED}
    return [
        f"{name} was {found[name]!r}, is {own[name]!r}: {told[name]}"
        for name in differing
        if name in told
    ]


def configurations_of(state_dict: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The configurations of the MOATs that a state_dict has the weights of, by their paths."""
    metadata = getattr(state_dict, "_metadata", None) or {}
    return {
        path: entry[METADATA_KEY]
        for path, entry in metadata.items()
        if isinstance(entry, dict) and isinstance(entry.get(METADATA_KEY), dict)
    }


def encode(configurations: Mapping[str, Any]) -> str:
    """`configurations_of`, as text for a file's header."""
    return json.dumps(configurations)


def with_configurations(state_dict: Mapping[str, Any], text: str) -> OrderedDict[str, Any]:
    """The state_dict with what `encode` wrote as metadata. Raises ConfigurationError."""
    try:
        configurations = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ConfigurationError(f"its configuration is damaged: {error}") from error
    if not isinstance(configurations, dict) or not all(
        isinstance(entry, dict) for entry in configurations.values()
    ):
        raise ConfigurationError(f"its configuration is damaged: {text[:80]!r}")
    described: OrderedDict[str, Any] = OrderedDict(state_dict)
    described._metadata = {  # type: ignore[attr-defined]
        path: {METADATA_KEY: configuration} for path, configuration in configurations.items()
    }
    return described


def _plain(value: Any) -> Any:
    """The same with lists in place of tuples, as JSON has it. Raises ConfigurationError."""
    try:
        return json.loads(json.dumps(value))
    except (TypeError, ValueError, RecursionError) as error:
        raise ConfigurationError(f"its configuration is damaged: {error}") from error
