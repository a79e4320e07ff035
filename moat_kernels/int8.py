"""`freeze` in int8: which steps of a model's frozen parts multiply bytes.

A MOAT or a block of this package is tried by itself, on what it reads. Other packages' blocks are
small parts of models, whose errors come together at their end, so each of their steps is tried
within the whole model.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from moat_kernels.adapters.freezing import Operands
from moat_kernels.calibration import (
    LayerError,
    check_results,
    numbers_of,
    observe,
    without_the_worst,
)
from moat_kernels.ops.frozen import FrozenSequence, FrozenStep, Quantizations

# Batches on which steps are tried within a model, each with a pass of the whole model.
_TRIED_BATCHES = 8


class Part(Protocol):
    """What takes the place of another package's block in a frozen model."""

    int8_report: list[LayerError]

    @property
    def sequence(self) -> FrozenSequence: ...

    def use(self, steps: Sequence[FrozenStep]) -> None: ...

    def operands(self, module: nn.Module) -> list[Operands]:
        """Of each step; none if it is of this package. module: in whose place it is."""

    def steps_in_int8(
        self, module: nn.Module, quantizations: Sequence[Quantizations]
    ) -> list[FrozenStep]:
        """Its steps, of which those that can multiply in int8 do. quantizations: of each."""

    def unfrozen_names(self) -> tuple[str, ...]:
        """Of the module's children that are in no step."""


def quantize(model: nn.Module, batches: Sequence[Any], frozen: dict[int, Any]) -> list[LayerError]:
    """Make frozen parts multiply in int8, or put what does in their place; -> what they do."""
    own: dict[str, nn.Module] = {}
    foreign: dict[str, nn.Module] = {}
    for name, module in model.named_modules():
        if id(module) in frozen:
            (foreign if frozen[id(module)].operands(module) else own)[name] = module
    operands = {id(module): frozen[id(module)].operands(module) for module in foreign.values()}
    observations = observe(model, batches, own.values(), operands)
    report: list[LayerError] = []
    for name, module in own.items():
        if observations.inputs[id(module)]:
            part = type(frozen[id(module)])(module, torch.bfloat16, observations)
            frozen[id(module)] = part
            report += [_named(layer, name) for layer in part.int8_report]
    candidates = [
        _Candidate(
            part := frozen[id(module)],
            part.sequence.steps,
            part.steps_in_int8(module, observations.quantizations(module)),
        )
        for module in foreign.values()
    ]
    if candidates:
        trial = copy.deepcopy(model, dict(frozen))
        _choose(candidates, trial, batches, observations.results)
    for name, candidate in zip(foreign, candidates, strict=True):
        report += [_named(layer, name) for layer in candidate.part.int8_report]
        left = {"no step computes it": candidate.part.unfrozen_names()}
        report += [_named(layer, name) for layer in unfrozen_layers(left)]
    return report


def unfrozen_layers(names: Mapping[str, Iterable[str]]) -> list[LayerError]:
    """names: of modules, by the reason why they are not frozen."""
    return [
        LayerError(name, math.nan, False, reason)
        for reason, paths in names.items()
        for name in paths
    ]


def _named(layer: LayerError, name: str) -> LayerError:
    """As a layer of the module called `name`; empty: of the model itself."""
    return layer._replace(step=f"{name}: {layer.step}") if name else layer


class _Candidate(NamedTuple):
    """plain, quantized: the steps of a part."""

    part: Part
    plain: Sequence[FrozenStep]
    quantized: Sequence[FrozenStep]

    def use_int8(self, indices: Iterable[int]) -> None:
        """In these steps."""
        steps = list(self.plain)
        for index in indices:
            steps[index] = self.quantized[index]
        self.part.use(steps)


@torch.no_grad()
def _choose(
    candidates: Sequence[_Candidate],
    trial: Callable[[Any], Any],
    batches: Sequence[Any],
    results: Sequence[Sequence[Tensor]],
) -> None:
    """Make the candidates use int8 as far as the errors allow, and report it.

    trial: the model that they are parts of. results: the stock model's of each batch.
    """
    tried = range(0, len(batches), math.ceil(len(batches) / _TRIED_BATCHES))
    expected = [results[i] for i in tried]
    check_results(x for numbers in expected for x in numbers)
    scale = sum(_squares(x) for numbers in expected for x in numbers) or 1.0

    def squared_error() -> float:
        total = 0.0
        for i, numbers in zip(tried, expected, strict=True):
            found = numbers_of(trial(batches[i]))
            if [x.shape for x in found] != [x.shape for x in numbers]:
                return math.inf
            total += sum(_squares(a - b) for a, b in zip(found, numbers, strict=True))
        return total / scale

    without = squared_error()
    added: dict[tuple[int, int], float] = {}
    for number, candidate in enumerate(candidates):
        for index, step in enumerate(candidate.quantized):
            if step.int8:
                candidate.use_int8([index])
                error = squared_error()
                added[number, index] = (
                    math.inf if math.isinf(without) else max(error - without, 0.0)
                )
        candidate.use_int8([])
    kept = without_the_worst(added)
    for number, candidate in enumerate(candidates):
        candidate.use_int8(index for of, index in kept if of == number)
        candidate.part.int8_report[:] = [
            LayerError(candidate.plain[index].kind, error**0.5, (of, index) in kept)
            for (of, index), error in added.items()
            if of == number
        ]


def _squares(x: Tensor) -> float:
    return float(x.double().square().sum())
