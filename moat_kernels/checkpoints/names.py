"""The official variable names and layouts of MOAT, and the parameters of ours they correspond to.

One table, :data:`BLOCK` with :data:`STEM` and :data:`HEAD`, drives both directions. Shapes are the
official ones (TensorFlow: convolutions [height, width, in, out], depthwise [height, width,
channels, 1], attention projections [channels, heads, head_dim]); a word in a shape is a size that
is free, but the same wherever the word appears in the same block.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from .errors import CheckpointError

Layout = Callable[[Sequence[np.ndarray]], np.ndarray]

#: Scopes the official names begin with: a whole model or a MOAT block, and a single MBConv block.
SCOPES = ("moat", "mbconv")


@dataclass(frozen=True)
class Rule:
    """How one parameter is made of official variables; names are relative to their module.

    ``variables`` have one ``shape`` each. Without variables the parameter is a counter that starts
    at 0.
    """

    parameter: str
    variables: tuple[str, ...]
    shape: tuple[int | str, ...]
    layout: Layout


@dataclass(frozen=True)
class Section:
    """The rules of a module. A file holds an optional group wholly or not at all."""

    required: tuple[Rule, ...]
    optional: dict[str, tuple[Rule, ...]]

    @property
    def rules(self) -> tuple[Rule, ...]:
        return sum(self.optional.values(), self.required)


def _same(arrays: Sequence[np.ndarray]) -> np.ndarray:
    return arrays[0]


def _convolution_kernel(arrays: Sequence[np.ndarray]) -> np.ndarray:
    return arrays[0].transpose(3, 2, 0, 1)


def _depthwise_kernel(arrays: Sequence[np.ndarray]) -> np.ndarray:
    return arrays[0].transpose(2, 3, 0, 1)


def _classifier_kernel(arrays: Sequence[np.ndarray]) -> np.ndarray:
    return arrays[0][0, 0].T


def _packed_projection(arrays: Sequence[np.ndarray]) -> np.ndarray:
    """q, k, v [channels, heads, head_dim] -> [3 * heads * head_dim, channels]."""
    return np.concatenate([array.reshape(len(array), -1).T for array in arrays])


def _packed_bias(arrays: Sequence[np.ndarray]) -> np.ndarray:
    """q, k, v [heads, head_dim] -> [3 * heads * head_dim]."""
    return np.concatenate([array.reshape(-1) for array in arrays])


def _output_projection(arrays: Sequence[np.ndarray]) -> np.ndarray:
    """o [heads, head_dim, channels] -> [channels, heads * head_dim]."""
    return arrays[0].reshape(-1, arrays[0].shape[-1]).T


def _counter(arrays: Sequence[np.ndarray]) -> np.ndarray:
    return np.zeros((), dtype=np.int64)


def _weight(module: str, variable: str, shape: tuple[int | str, ...], layout: Layout) -> Rule:
    return Rule(f"{module}.weight", (variable,), shape, layout)


def _bias(module: str, variable: str, size: str) -> Rule:
    return Rule(f"{module}.bias", (variable,), (size,), _same)


def _convolution(
    module: str, variable: str, kernel: int, inputs: str, outputs: str, *, bias: bool = True
) -> tuple[Rule, ...]:
    shape = (kernel, kernel, inputs, outputs)
    rules = (_weight(module, f"{variable}/kernel", shape, _convolution_kernel),)
    return (*rules, _bias(module, f"{variable}/bias", outputs)) if bias else rules


def _layer_norm(name: str, size: str) -> tuple[Rule, ...]:
    return _weight(name, f"{name}/gamma", (size,), _same), _bias(name, f"{name}/beta", size)


def _batch_norm(name: str, size: str) -> tuple[Rule, ...]:
    return (
        *_layer_norm(name, size),
        Rule(f"{name}.running_mean", (f"{name}/moving_mean",), (size,), _same),
        Rule(f"{name}.running_var", (f"{name}/moving_variance",), (size,), _same),
        Rule(f"{name}.num_batches_tracked", (), (), _counter),
    )


def _query_key_value(leaf: str) -> tuple[str, ...]:
    return tuple(f"attention/{projection}/{leaf}" for projection in "qkv")


STEM = Section(
    required=(
        *_convolution("conv_0", "conv_0", 3, "image_channels", "width"),
        *_batch_norm("norm_0", "width"),
        *_convolution("conv_1", "conv_1", 3, "width", "channels"),
    ),
    optional={},
)

BLOCK = Section(
    required=(
        *_convolution("expand_conv", "expand_conv", 1, "in_channels", "inner", bias=False),
        *_batch_norm("pre_norm", "in_channels"),
        *_batch_norm("expand_norm", "inner"),
        _weight(
            "depthwise_conv",
            "depthwise_conv/depthwise_kernel",
            (3, 3, "inner", 1),
            _depthwise_kernel,
        ),
        *_batch_norm("depthwise_norm", "inner"),
        *_convolution("shrink_conv", "shrink_conv", 1, "inner", "channels"),
    ),
    optional={
        "shortcut_conv": _convolution(
            "shortcut_conv", "shortcut_conv", 1, "in_channels", "channels"
        ),
        "se": (
            *_convolution("se.reduce", "se/reduce_conv2d", 1, "inner", "reduced"),
            *_convolution("se.expand", "se/expand_conv2d", 1, "reduced", "inner"),
        ),
        "attention": (
            *_layer_norm("attention_norm", "channels"),
            Rule(
                "attention.qkv.weight",
                _query_key_value("weight"),
                ("channels", "heads", "head_dim"),
                _packed_projection,
            ),
            Rule(
                "attention.qkv.bias", _query_key_value("bias"), ("heads", "head_dim"), _packed_bias
            ),
            _weight(
                "attention.proj",
                "attention/o/weight",
                ("heads", "head_dim", "channels"),
                _output_projection,
            ),
            _bias("attention.proj", "attention/o/bias", "channels"),
        ),
        "position_embedding": (
            Rule(
                "attention.relative_position_embedding",
                ("attention/relative_position_embedding",),
                ("heads", "extent", "extent"),
                _same,
            ),
        ),
    },
)

HEAD = Section(
    required=(
        *_layer_norm("final_layer_norm", "channels"),
        _weight(
            "logits_head",
            "logits_head/kernel",
            (1, 1, "channels", "classes"),
            _classifier_kernel,
        ),
        _bias("logits_head", "logits_head/bias", "classes"),
    ),
    optional={},
)


_SECTIONS = {"stem": STEM, "block": BLOCK, "head": HEAD, "single": BLOCK}


@dataclass(frozen=True)
class Place:
    """Where a module stands in a model: ``kind`` is stem, block (with stage and index) or head,
    or single for a block that is no part of a model."""

    kind: str
    stage: int = 0
    index: int = 0

    @property
    def section(self) -> Section:
        return _SECTIONS[self.kind]

    @property
    def parameter_prefix(self) -> str:
        block = f"stages.{self.stage}.{self.index}."
        return {"stem": "stem.", "block": block}.get(self.kind, "")

    @property
    def variable_prefix(self) -> str:
        block = f"block_{self.stage:02d}_{self.index:02d}/"
        return {"stem": "stem/", "block": block}.get(self.kind, "")


_RULES_BY_PARAMETER = {
    kind: {rule.parameter: rule for rule in section.rules} for kind, section in _SECTIONS.items()
}
_RULES_BY_VARIABLE = {
    kind: {variable: rule for rule in section.rules for variable in rule.variables}
    for kind, section in _SECTIONS.items()
}
_PARAMETER_PATTERN = re.compile(r"(?:(stem)\.|stages\.(\d{1,4})\.(\d{1,4})\.)?(.+)")
_VARIABLE_PATTERN = re.compile(r"(?:(stem)/|block_(\d{1,4})_(\d{1,4})/)?(.+)")


def find_variable(name: str) -> tuple[Place, Rule] | None:
    """The place and rule of an official variable, given without scope; None if unknown."""
    found = _find(name, _VARIABLE_PATTERN, _RULES_BY_VARIABLE)
    if found is None or not name.startswith(found[0].variable_prefix):
        return None
    return found


def official_names(parameter: str, scope: str = "moat") -> tuple[str, ...]:
    """The official variables that ``parameter`` of a model, or of a single block, is made of.

    >>> official_names("stages.2.1.expand_conv.weight")
    ('moat/block_02_01/expand_conv/kernel',)
    >>> official_names("attention.qkv.bias")
    ('moat/attention/q/bias', 'moat/attention/k/bias', 'moat/attention/v/bias')

    ``num_batches_tracked`` of a batch norm has no official counterpart: an empty tuple.

    Raises:
        CheckpointError: MOAT has no parameter of this name.
    """
    place, rule = find_parameter(parameter)
    return tuple(f"{scope}/{place.variable_prefix}{variable}" for variable in rule.variables)


def find_parameter(name: str) -> tuple[Place, Rule]:
    """The place and rule of a parameter of ours."""
    found = _find(name, _PARAMETER_PATTERN, _RULES_BY_PARAMETER)
    if found is None or not name.startswith(found[0].parameter_prefix):
        raise CheckpointError(f"MOAT has no parameter {name!r}")
    return found


def _find(
    name: str, pattern: re.Pattern[str], rules: dict[str, dict[str, Rule]]
) -> tuple[Place, Rule] | None:
    match = pattern.fullmatch(name)
    if match is None:
        return None
    stem, stage, index, rest = match.groups()
    if stem is not None:
        place = Place("stem")
    elif stage is not None:
        place = Place("block", int(stage), int(index))
    else:
        place = Place("head" if rest in rules["head"] else "single")
    rule = rules[place.kind].get(rest)
    return None if rule is None else (place, rule)
