"""TensorFlow's variables of a MOAT -> a state_dict of ours."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from .architecture import official_configuration
from .errors import CheckpointError
from .inventory import Inventory, find_places, take_inventory
from .names import find_parameter
from .report import CheckpointReport
from .rules import Place, Rule, Shape

# A size with a name, and the variable it was first seen in: {"inner": (64, "moat/.../kernel")}.
_Sizes = dict[str, tuple[int, str]]


@dataclass(frozen=True)
class ConvertedCheckpoint:
    """A state_dict in our names and layouts, and the report of how it was made.

    configuration: what the weights were made for, as far as the file or its layout tells.
    """

    state_dict: dict[str, torch.Tensor]
    report: CheckpointReport
    configuration: dict[str, Any] | None = None


def convert_variables(
    mapping: Mapping[str, np.ndarray], *, ema: bool = False, origin: str = "variables"
) -> ConvertedCheckpoint:
    """Turn official variables, by their official names, into a state_dict.

    Accepts a whole model (``moat/stem/...``, ``moat/block_02_01/...``, with or without the
    classifier head) or a single block (``moat/expand_conv/kernel``, ``mbconv/se/...``). Names may
    end in ``:0``. Variables outside these scopes (``global_step``), optimizer slots and the
    averages that were not asked for are skipped and reported. Only what is used is read from
    ``mapping``.

    Args:
        mapping: names -> arrays in TensorFlow's layouts, float16, float32 or float64.
        ema: take ``<name>/ExponentialMovingAverage`` instead of ``<name>`` wherever it exists.
        origin: what messages call the source of the variables.

    Returns:
        The state_dict (new contiguous CPU tensors in the dtypes of the variables; the batch norms'
        ``num_batches_tracked`` is 0) and the report.

    Raises:
        CheckpointError: a variable is missing, unknown, or has a shape or dtype that does not fit,
            or ``ema`` was asked for and there is no average at all.
    """
    inventory = take_inventory(mapping, ema=ema, origin=origin)
    converted = convert_inventory(mapping, inventory)
    return replace(converted, configuration=official_configuration(converted.state_dict))


def convert_inventory(
    mapping: Mapping[str, np.ndarray], inventory: Inventory
) -> ConvertedCheckpoint:
    """The state_dict of the variables in ``inventory``, whose values ``mapping`` has by name.

    Raises:
        CheckpointError: a variable is missing, or has a shape or dtype that does not fit.
    """
    plan = {place: _rules_of(inventory, place) for place in find_places(inventory)}
    _check_position_embeddings(inventory, plan)
    result = ConvertedCheckpoint({}, CheckpointReport(inventory.origin, skipped=inventory.skipped))
    previous: tuple[int, str] | None = None
    for place, rules in plan.items():
        sizes: _Sizes = {}
        if previous is not None:
            sizes["channels" if place.kind == "head" else "in_channels"] = previous
        for rule in rules:
            _convert(mapping, inventory, place, rule, sizes, result)
        if place.section.optional:
            _check_shortcut(inventory, place, sizes)
        previous = sizes["channels"]
    return result


def convert_parameter(parameter: str, arrays: Sequence[np.ndarray]) -> torch.Tensor:
    """Bring the official arrays of one parameter into our layout.

    Args:
        parameter: our name of it.
        arrays: one array for each of its ``official_names``: the variables, or whatever is shaped
            like them, gradients for example.
    """
    rule = find_parameter(parameter)[1]
    if len(arrays) != len(rule.variables):
        raise CheckpointError(
            f"{parameter!r} is made of {len(rule.variables)} arrays, {len(arrays)} were given"
        )
    return _to_tensor(rule.layout(arrays))


def _rules_of(inventory: Inventory, place: Place) -> list[Rule]:
    """The rules that apply at ``place``: those of every group that the checkpoint has a part of."""
    prefix = place.variable_prefix
    groups = {
        name
        for name, rules in place.section.optional.items()
        for rule in rules
        if any(prefix + variable in inventory.places for variable in rule.variables)
    }
    if {"se", "attention"} <= groups:
        raise inventory.error(
            f"{inventory.full_name(prefix)} has both squeeze-and-excitation and attention, "
            "which no block of MOAT has"
        )
    if "position_embedding" in groups:
        groups.add("attention")
    rules = list(place.section.required)
    for name, group in place.section.optional.items():
        if name in groups:
            rules += group
    for rule in rules:
        for variable in rule.variables:
            inventory.required_key(prefix + variable)
    return rules


def _check_position_embeddings(inventory: Inventory, plan: dict[Place, list[Rule]]) -> None:
    """Either all attention blocks of a model have a position embedding, or none has."""
    embeddings = [
        place.variable_prefix + embedding.variables[0]
        for place, rules in plan.items()
        if any(rule.parameter == "attention.qkv.weight" for rule in rules)
        for embedding in place.section.optional.get("position_embedding", ())
    ]
    if any(embedding in inventory.places for embedding in embeddings):
        for embedding in embeddings:
            inventory.required_key(embedding)


def _convert(
    mapping: Mapping[str, np.ndarray],
    inventory: Inventory,
    place: Place,
    rule: Rule,
    sizes: _Sizes,
    result: ConvertedCheckpoint,
) -> None:
    """Add the parameter of ``rule`` to ``result``, and the sizes it fixes to ``sizes``."""
    prefix = place.variable_prefix
    source = inventory.source(rule, prefix)
    keys = tuple(inventory.required_key(prefix + variable) for variable in rule.variables)
    arrays = [np.asarray(mapping[key]) for key in keys]
    for key, array in zip(keys, arrays, strict=True):
        _check_array(inventory, key, array, rule.shape, sizes)
    name = place.parameter_prefix + rule.parameter
    result.state_dict[name] = _to_tensor(rule.layout(arrays))
    result.report.loaded[name] = keys
    result.report.source[name] = source


def _check_array(
    inventory: Inventory, key: str, array: np.ndarray, shape: Shape, sizes: _Sizes
) -> None:
    if array.dtype.kind != "f" or array.dtype.itemsize > 8:
        raise inventory.error(
            f"{key} has dtype {array.dtype}, expected float16, float32 or float64"
        )
    known = dict(sizes)
    fits = len(array.shape) == len(shape)
    for size, expected in zip(array.shape, shape, strict=False):
        if isinstance(expected, str):
            expected = known.setdefault(expected, (size, key))[0]
        fits = fits and size == expected and size > 0
    if not fits:
        raise inventory.error(f"{key} has shape {list(array.shape)}, {_expectation(shape, sizes)}")
    sizes.update(known)


def _expectation(shape: Shape, sizes: _Sizes) -> str:
    text = ", ".join(f"{size}={sizes[size][0]}" if size in sizes else str(size) for size in shape)
    origins = sorted({sizes[size][1] for size in shape if size in sizes})
    return f"expected [{text}]" + (f" to fit {', '.join(origins)}" if origins else "")


def _check_shortcut(inventory: Inventory, place: Place, sizes: _Sizes) -> None:
    inputs, outputs = sizes["in_channels"][0], sizes["channels"][0]
    kernel = place.variable_prefix + place.section.optional["shortcut_conv"][0].variables[0]
    if inputs != outputs and kernel not in inventory.places:
        raise inventory.error(
            f"{inventory.full_name(kernel)} is missing, expected shape [1, 1, {inputs}, {outputs}]"
        )
    if inputs == outputs and kernel in inventory.places:
        raise inventory.error(
            f"{inventory.full_name(kernel)} is not expected: the block keeps its {inputs} channels"
        )


def _to_tensor(array: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.array(array, dtype=array.dtype.newbyteorder("="), order="C"))
