"""The configuration that a MOAT's weights were made for, which their shapes do not tell.

It travels in a state_dict's metadata, where PyTorch keeps the versions of modules, and in the
header of a .safetensors file; neither adds a name to the state_dict.
"""

from __future__ import annotations

import json
from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

from torch import Tensor

_COLOURS = 3

METADATA_KEY = "moat"
# In that entry, beside the options of the model: how images are prepared, see `Preprocessing`.
PREPROCESSING_KEY = "preprocessing"

# Of official MOAT; what files say nothing of that were written before there were these options.
OFFICIAL: dict[str, Any] = {
    "se_activation": "silu",
    "layer_norm_eps": 1e-5,
    "pixel_scaling": False,
    "channel_order": "rgb",
}

# Of Keras' MOATs, where they differ from official ones.
KERAS: dict[str, Any] = {
    "pool_size": 3,
    "position_embedding": False,
    "se_activation": "gelu",
    "layer_norm_eps": 1e-3,
    "pixel_scaling": True,
    "channel_order": "bgr",
}

# The rest, widths for example, names and shapes of tensors tell. How these change what a model
# computes is exact: windows are cut, tables resized and maps strided at every call, which official
# code does with the weights of another configuration too.
_ADAPTED = {
    "window_size": "attention is cut into the model's windows, position tables are resized to them",
    "global_attention_at_end": "attention is cut into the model's windows",
    "output_stride": "the model's strides are used",
    "channel_order": "the channels of the first convolution are turned round",
}
_FIXED = {
    name: f"the model's {what}, results differ until it is trained"
    for name, what in {
        "pool_size": "pool is used",
        "se_activation": "activation is used",
        "layer_norm_eps": "epsilon is used",
        "pixel_scaling": "input is scaled as its option says",
    }.items()
}


class ConfigurationError(ValueError):
    """Weights were made for a model that computes something else."""


def adaptations(
    found: Mapping[str, Any], own: Mapping[str, Any], fine_tune: bool = False
) -> list[str]:
    """What a model of the configuration `own` does otherwise than the one the weights are from.

    Raises ConfigurationError where that would give other results than the weights were made for,
    unless these are but a start (`fine_tune`).
    """
    told, plain_own = {**OFFICIAL, **_plain(found)}, _plain(own)
    told.pop(PREPROCESSING_KEY, None)
    differing = {name: value for name, value in told.items() if value != plain_own.get(name)}
    for name in differing:
        if name not in own:
            raise ConfigurationError(
                f"these weights are for a model with {name}={told[name]!r}, which this version of "
                "moat_kernels does not know"
            )
    refused = [] if fine_tune else [name for name in differing if name in _FIXED]
    if refused:
        differences = "; ".join(
            f"{name} is {told[name]!r} for these weights, {own[name]!r} in the model"
            for name in refused
        )
        options = ", ".join(f"{name}={told[name]!r}" for name in refused)
        raise ConfigurationError(
            f"{differences}, which changes what it computes: build it with {options} (or all of it "
            "as the file says, by create_model(checkpoint=PATH)), or take the weights as a start "
            "for training: load_checkpoint(..., fine_tune=True), load_state_dict(dict(state_dict))"
        )
    effects = {**_ADAPTED, **_FIXED}
    return [
        f"{name} was {found.get(name, told[name])!r}, is {own[name]!r}: {effects[name]}"
        for name in differing
        if name in effects
    ]


def turns_channels(found: Mapping[str, Any], own: Mapping[str, Any]) -> bool:
    """Whether weights of one configuration read a model's channels in the other order."""
    orders = [told.get("channel_order", OFFICIAL["channel_order"]) for told in (found, own)]
    return orders[0] != orders[1]


def turned(weight: Tensor) -> Tensor:
    """Of a first convolution [C, in_chans, 3, 3], for RGB if it is for BGR, and the reverse."""
    return weight.flip(1) if weight.dim() == 4 and weight.shape[1] == _COLOURS else weight


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
