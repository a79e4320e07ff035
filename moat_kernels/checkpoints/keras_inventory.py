"""Sorting out the variables of a Keras MOAT: what is the model's, and what is not."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from .inventory import NO_AVERAGES, NOT_OF_MOAT, OPTIMIZER_SLOT, Inventory, is_slot
from .keras_names import KERAS, POSITION_EMBEDDING, SCOPE
from .tensorflow_bundle import TensorBundle
from .tensorflow_objects import OBJECT_GRAPH_KEY, ObjectVariable

# Keys of what a model's layers hold; metrics and counters are elsewhere.
_KEY_OF_LAYER = re.compile(r"(?:^|/)(?:layer_with_weights-\d+|layer-\d+|variables/\d+)/")
_KEY_OF_OPTIMIZER = re.compile(r"(?:^|/)(?:optimizer|\.OPTIMIZER_SLOT)/")
_FLOATS = ("float16", "bfloat16", "float32", "float64")
_EXAMPLES = 3


def take_keras_inventory(
    bundle: TensorBundle, variables: Sequence[ObjectVariable], *, ema: bool, origin: str
) -> tuple[Inventory, dict[str, str]]:
    """Sort the variables of an object checkpoint; with the tensor's key of each that is used.

    Raises:
        CheckpointError: no variable of a Keras MOAT is there, one is there twice, one is unknown,
            or a layer that no MOAT has holds weights.
    """
    inventory = Inventory(origin, ema, KERAS)
    keys: dict[str, str] = {}
    for variable in variables:
        _sort_in(inventory, keys, variable, bundle)
    if not keys:
        names = [variable.name or variable.key for variable in variables]
        raise inventory.error(
            "an object-based TensorFlow 2 checkpoint, but no variable of a Keras MOAT "
            f"(root_..., stage0_block0_...) among its {len(names)}, "
            f"which begin with {names[:_EXAMPLES]}"
        )
    if ema:
        raise inventory.error(NO_AVERAGES)
    _skip_nameless(inventory, bundle, {variable.key for variable in variables})
    return inventory, keys


def _sort_in(
    inventory: Inventory, keys: dict[str, str], variable: ObjectVariable, bundle: TensorBundle
) -> None:
    name, key = variable.name, variable.key
    known = KERAS.find_variable(name)
    if variable.is_slot or _KEY_OF_OPTIMIZER.search(key) or is_slot(name, KERAS):
        inventory.skipped[key] = OPTIMIZER_SLOT
    elif known is not None:
        if name in keys:
            raise inventory.error(f"{name} is there twice, under {keys[name]} and {key}")
        keys[name], inventory.raw[name] = key, name
        inventory.places[name] = known[0]
    elif name.endswith(POSITION_EMBEDDING):
        raise inventory.error(
            f"{name}: Keras MOATs with relative position embeddings (use_pe=True) are not supported"
        )
    elif SCOPE.match(name):
        raise inventory.error(f"{name} is not a variable that a Keras MOAT is known to have")
    elif _KEY_OF_LAYER.search(key) and _is_float(bundle, key):
        raise inventory.error(f"{name or key} is in a layer that no Keras MOAT is known to have")
    else:
        inventory.skipped[key] = NOT_OF_MOAT


def _is_float(bundle: TensorBundle, key: str) -> bool:
    entry = bundle.entries.get(key)
    return entry is not None and entry.dtype in _FLOATS


def _skip_nameless(inventory: Inventory, bundle: TensorBundle, named: Iterable[str]) -> None:
    skipped = {key: "no object has it" for key in bundle.entries if key not in named}
    # The object graph is not skipped: the names are from there.
    strings = {key: why for key, why in bundle.skipped.items() if key != OBJECT_GRAPH_KEY}
    inventory.skipped = {**skipped, **strings, **inventory.skipped}
