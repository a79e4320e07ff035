"""What tables of variable names are made of: rules, the layouts they apply, places in a model.

A rule says how a parameter of ours is made of TensorFlow's variables. Shapes are TensorFlow's
(convolutions [height, width, in, out], depthwise [height, width, channels, 1], dense [in, out],
attention projections [channels, heads, head_dim]); a word in a shape is a size that is free, but
the same wherever the word appears in the same module.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

Layout = Callable[[Sequence[np.ndarray]], np.ndarray]
#: Sizes that are fixed, or have a name.
Shape = tuple[int | str, ...]


@dataclass(frozen=True)
class Rule:
    """How one parameter is made of variables; names are relative to their module.

    ``variables`` have one ``shape`` each. Without variables the parameter is a counter that starts
    at 0.
    """

    parameter: str
    variables: tuple[str, ...]
    shape: Shape
    layout: Layout


@dataclass(frozen=True)
class Section:
    """The rules of a module. A file holds an optional group wholly or not at all."""

    required: tuple[Rule, ...]
    optional: dict[str, tuple[Rule, ...]]

    @property
    def rules(self) -> tuple[Rule, ...]:
        return sum(self.optional.values(), self.required)


@dataclass(frozen=True, eq=False)
class Naming:
    """The variable names of one kind of checkpoint.

    Attributes:
        sections: the rules of each kind of module: stem, block and head, and single for a block
            that is no part of a model, where there are such files.
        prefixes: of the variables of each kind, to be formatted with ``stage`` and ``index``.
        pattern: of a variable's name; its groups are the stem's mark, the block's stage and index,
            and the rest.
    """

    sections: Mapping[str, Section]
    prefixes: Mapping[str, str]
    pattern: re.Pattern[str]

    def find_variable(self, name: str) -> tuple[Place, Rule] | None:
        """The place and rule of a variable; None if it is unknown."""
        found = find(name, self.pattern, self._rules_by_variable, self)
        if found is None or not name.startswith(found[0].variable_prefix):
            return None
        return found

    @cached_property
    def _rules_by_variable(self) -> dict[str, dict[str, Rule]]:
        return {
            kind: {variable: rule for rule in section.rules for variable in rule.variables}
            for kind, section in self.sections.items()
        }


@dataclass(frozen=True)
class Place:
    """Where a module stands in a model: ``kind`` is stem, block (with stage and index) or head,
    or single for a block that is no part of a model."""

    kind: str
    naming: Naming
    stage: int = 0
    index: int = 0

    @property
    def section(self) -> Section:
        return self.naming.sections[self.kind]

    @property
    def parameter_prefix(self) -> str:
        block = f"stages.{self.stage}.{self.index}."
        return {"stem": "stem.", "block": block}.get(self.kind, "")

    @property
    def variable_prefix(self) -> str:
        return self.naming.prefixes[self.kind].format(stage=self.stage, index=self.index)


def find(
    name: str, pattern: re.Pattern[str], rules: Mapping[str, Mapping[str, Rule]], naming: Naming
) -> tuple[Place, Rule] | None:
    """The place and rule that ``name`` means, with the rules of each kind of module by name."""
    match = pattern.fullmatch(name)
    if match is None:
        return None
    stem, stage, index, rest = match.groups()
    if stem is not None:
        place = Place("stem", naming)
    elif stage is not None:
        place = Place("block", naming, int(stage), int(index))
    else:
        place = Place("head" if rest in rules["head"] else "single", naming)
    rule = rules.get(place.kind, {}).get(rest)
    return None if rule is None else (place, rule)


def same(arrays: Sequence[np.ndarray]) -> np.ndarray:
    return arrays[0]


def convolution_kernel(arrays: Sequence[np.ndarray]) -> np.ndarray:
    return arrays[0].transpose(3, 2, 0, 1)


def depthwise_kernel(arrays: Sequence[np.ndarray]) -> np.ndarray:
    return arrays[0].transpose(2, 3, 0, 1)


def pointwise_kernel(arrays: Sequence[np.ndarray]) -> np.ndarray:
    """A 1x1 convolution that a linear layer is [1, 1, in, out] -> [out, in]."""
    return arrays[0][0, 0].T


def dense_kernel(arrays: Sequence[np.ndarray]) -> np.ndarray:
    """[in, out] -> [out, in]."""
    return arrays[0].T


def dense_kernel_of_convolution(arrays: Sequence[np.ndarray]) -> np.ndarray:
    """A dense layer that a 1x1 convolution is [in, out] -> [out, in, 1, 1]."""
    return arrays[0].T[:, :, None, None]


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


def weight(module: str, variable: str, shape: Shape, layout: Layout) -> Rule:
    return Rule(f"{module}.weight", (variable,), shape, layout)


def bias(module: str, variable: str, size: str) -> Rule:
    return Rule(f"{module}.bias", (variable,), (size,), same)


def convolution(
    module: str, variable: str, kernel: int, inputs: str, outputs: str
) -> tuple[Rule, ...]:
    return (
        weight(module, f"{variable}/kernel", (kernel, kernel, inputs, outputs), convolution_kernel),
        bias(module, f"{variable}/bias", outputs),
    )


def layer_norm(module: str, variable: str, size: str) -> tuple[Rule, ...]:
    return (
        weight(module, f"{variable}/gamma", (size,), same),
        bias(module, f"{variable}/beta", size),
    )


def batch_norm(module: str, variable: str, size: str) -> tuple[Rule, ...]:
    return (
        *layer_norm(module, variable, size),
        Rule(f"{module}.running_mean", (f"{variable}/moving_mean",), (size,), same),
        Rule(f"{module}.running_var", (f"{variable}/moving_variance",), (size,), same),
        Rule(f"{module}.num_batches_tracked", (), (), _counter),
    )


def attention(norm: str, head_dim: int | str) -> tuple[Rule, ...]:
    """Attention and the layer norm before it, whose variables begin with ``norm``."""

    def of_each(leaf: str) -> tuple[str, ...]:
        return tuple(f"attention/{projection}/{leaf}" for projection in "qkv")

    projection: Shape = ("channels", "heads", head_dim)
    return (
        *layer_norm("attention_norm", norm, "channels"),
        Rule("attention.qkv.weight", of_each("weight"), projection, _packed_projection),
        Rule("attention.qkv.bias", of_each("bias"), ("heads", head_dim), _packed_bias),
        weight(
            "attention.proj",
            "attention/o/weight",
            ("heads", head_dim, "channels"),
            _output_projection,
        ),
        bias("attention.proj", "attention/o/bias", "channels"),
    )
