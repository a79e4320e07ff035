"""What int8 needs to know of a model's values, observed on batches that the user gives.

Every operand of an int8 product has one scale, for the whole tensor; weights have one per output
channel. Which layers multiply in int8 is chosen by what each alone does to the results: of a MOAT
or a block of this package to its own, of other packages' blocks to those of the whole model.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from moat_kernels import reference
from moat_kernels.adapters.freezing import Operands
from moat_kernels.adapters.fused import stock_class
from moat_kernels.modules import FusedAttention, FusedMBConv, FusedMOATBlock
from moat_kernels.ops.frozen import FrozenSequence, FrozenStep, Quantization, Quantizations

# Values of an operand that are kept of each batch; their smallest and largest are exact.
_KEPT_VALUES = 1 << 12
# Shares of the range on either side of 0 that bytes may span: values beyond are clamped.
_SHARES = (1.0, 0.95, 0.9, 0.85, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3)
# Root mean square error of the results, over theirs, that int8 may add: some twice of what bfloat16
# does to a MOAT by itself.
_MOST_ERROR = 0.015
_STOCK = {
    FusedMBConv: reference.MBConvBlock,
    FusedMOATBlock: reference.MOATBlock,
    FusedAttention: reference.Attention,
}


Key = TypeVar("Key", bound=Hashable)


def quantization_of(values: Tensor) -> Quantization:
    """The bytes that come closest to `values`, in the mean square; a byte of them is exactly 0."""
    values = values.double()
    low, high = min(float(values.min()), 0.0), max(float(values.max()), 0.0)

    def error(quantization: Quantization) -> float:
        scale, zero = quantization
        bytes_ = (values / scale).round().add(zero).clamp(0, 255)
        return float(((bytes_ - zero) * scale - values).square().sum())

    def span(low: float, high: float) -> Quantization:
        scale = (high - low) / 255 or 1.0
        return Quantization(scale, round(-low / scale))

    high = min((share * high for share in _SHARES), key=lambda end: error(span(low, end)))
    low = min((share * low for share in _SHARES), key=lambda end: error(span(end, high)))
    return span(low, high)


class Operand:
    """Values that a layer read: a sample of each batch."""

    def __init__(self) -> None:
        self._samples: list[Tensor] = []

    def add(self, values: Tensor) -> None:
        flat = values.detach().flatten()
        if not flat.numel():
            return
        bounds = torch.stack(flat.aminmax())  # NaN if any value is
        if not torch.isfinite(bounds).all():
            raise ValueError("calibration gave values that are not finite inside the model")
        # Evenly spaced, with an odd step, so that channels of an even number all have their turn.
        step = flat.numel() // _KEPT_VALUES | 1
        self._samples.append(torch.cat([flat[::step], bounds]).float())

    @property
    def seen(self) -> bool:
        return bool(self._samples)

    def quantization(self) -> Quantization:
        return quantization_of(torch.cat(self._samples))


@dataclass
class Observations:
    """What calibration batches brought, by id of the modules of the model that was observed.

    operands: of each block the operands of its steps' int8 products, in pairs.
    inputs: of each module that was asked for.
    results: the model's of each batch, as `numbers_of` has them.
    """

    operands: dict[int, list[tuple[Operand, Operand]]] = field(default_factory=dict)
    inputs: dict[int, list[Tensor]] = field(default_factory=dict)
    results: list[list[Tensor]] = field(default_factory=list)

    def quantizations(self, block: nn.Module) -> list[Quantizations]:
        """Of each step of a block; none of one that no batch came to, or of another class."""
        pairs = self.operands.get(id(block), [])
        if not all(operand.seen for pair in pairs for operand in pair):
            return []
        return [(first.quantization(), second.quantization()) for first, second in pairs]


def numbers_of(result: Any) -> list[Tensor]:
    """The tensors of floating-point numbers in what a model returns."""
    leaves = tree_leaves(result)
    return [x for x in leaves if isinstance(x, Tensor) and x.is_floating_point()]


@torch.no_grad()
def observe(
    model: nn.Module,
    batches: Sequence[Any],
    modules: Iterable[nn.Module],
    operands: Mapping[int, Sequence[Operands]],
) -> Observations:
    """Run the stock form of a copy of `model` on each batch.

    modules: whose inputs to keep. operands: of other packages' blocks, by id.
    Raises ValueError if there is no batch, or one from which blocks get values that are not finite.
    """
    if not batches:
        raise ValueError("calibration must hold at least one batch")
    observations = Observations()
    memo: dict[int, Any] = {}
    stock = copy.deepcopy(model, memo).eval()
    own = {
        id(block): _operands_of(block)
        for block in model.modules()
        if isinstance(block, FusedMBConv | FusedMOATBlock) and type(block) in _STOCK
    }
    for block, pairs in {**own, **operands}.items():
        observations.operands[block] = [
            (_watch(memo[id(first)]), _watch(memo[id(second)])) for first, second in pairs
        ]
    for module in modules:
        kept = observations.inputs[id(module)] = []
        _on_input(memo[id(module)], partial(_keep, kept))
    for module in stock.modules():
        module.__class__ = _STOCK.get(type(module), type(module))
    for block in operands:
        for module in memo[block].modules():
            module.__class__ = stock_class(module)
    observations.results = [numbers_of(stock(batch)) for batch in batches]
    return observations


class LayerError(NamedTuple):
    """What int8 in one step alone does.

    step: its kind and number or, in a model of other modules, the name of its module and its kind.
    error: that int8 adds to the results, root mean square over theirs; infinite if they cannot be
        compared, as their number changes; NaN where nothing was tried.
    int8: whether the frozen module multiplies in int8 there.
    reason: why a module is not frozen at all, or part of one.
    """

    step: str
    error: float
    int8: bool
    reason: str = ""


def choose_int8(
    plain: Sequence[FrozenStep],
    quantized: Sequence[FrozenStep],
    exact: Sequence[FrozenStep],
    inputs: Sequence[Tensor],
) -> tuple[list[FrozenStep], list[LayerError]]:
    """Steps of `quantized` as far as _MOST_ERROR allows, the rest of `plain`; and why.

    exact: the same in float32.
    """
    last = [len(plain) - 1]

    def results(steps: Sequence[FrozenStep]) -> Tensor:
        sequence = FrozenSequence(steps)
        return torch.cat([sequence.outputs(x, last)[0].flatten() for x in inputs]).double()

    expected = results(exact)
    check_results([expected])
    scale = float(expected.square().mean()) or 1.0

    def squared_error(steps: Sequence[FrozenStep]) -> float:
        return float((results(steps) - expected).square().mean()) / scale

    without = squared_error(plain)
    added = {
        index: max(squared_error([*plain[:index], step, *plain[index + 1 :]]) - without, 0.0)
        for index, step in enumerate(quantized)
        if step.int8
    }
    kept = without_the_worst(added)
    report = [
        LayerError(f"{plain[index].kind} {index}", error**0.5, index in kept)
        for index, error in added.items()
    ]
    return [quantized[i] if i in kept else plain[i] for i in range(len(plain))], report


def without_the_worst(added: Mapping[Key, float]) -> list[Key]:
    """Steps whose errors fit into _MOST_ERROR; added: their squares, which add."""
    kept = sorted(added, key=added.__getitem__)
    while sum(added[key] for key in kept) > _MOST_ERROR**2:
        kept.pop()
    return kept


def check_results(results: Iterable[Tensor]) -> None:
    if not all(torch.isfinite(x).all() for x in results):
        raise ValueError("calibration gave results that are not finite")


def _keep(kept: list[Tensor], x: Tensor) -> None:
    kept.append(x.detach().clone())


def _operands_of(block: FusedMBConv | FusedMOATBlock) -> list[Operands]:
    pairs: list[Operands] = [(block, block.shrink_conv)]
    if isinstance(block, FusedMOATBlock):
        pairs.append((block.attention.qkv, block.attention.proj))
    return pairs


def _watch(module: nn.Module) -> Operand:
    operand = Operand()
    _on_input(module, operand.add)
    return operand


def _on_input(module: nn.Module, take: Callable[[Tensor], None]) -> None:
    module.register_forward_pre_hook(lambda _, inputs: take(inputs[0]))
