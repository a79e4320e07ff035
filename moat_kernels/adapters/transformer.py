"""Transformer blocks of other packages: attention, with its norm and its sum where one op has both.

`AttentionAdapter` computes attention where it stands. Its norm, linear layers, drop path and sum
lie in the block around; kernels have all of them as one op (ops/attention_half). Where they do not
cover a call, the block's own modules are called around the attention.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from moat_kernels.adapters.base import AttentionAdapter, AttentionReading
from moat_kernels.adapters.freezing import AttentionHalf, HalfLayers, HalfReader, layer_tensors
from moat_kernels.adapters.outline import Outline, Seen, places
from moat_kernels.adapters.reading import DropPathReading, NotCovered, refuse_hooks
from moat_kernels.drop_path import DropPath
from moat_kernels.ops.attention_half import api as attention_half
from moat_kernels.ops.attention_half import reference
from moat_kernels.ops.attention_half import training as attention_half_training
from moat_kernels.ops.attention_half.description import Layers
from moat_kernels.ops.attention_half.dispatch import TRAINING, may_cover, way_to_compute
from moat_kernels.ops.common.autocast import autocast_dtype
from moat_kernels.ops.common.backends import requested_backend
from moat_kernels.ops.common.spatial import in_format_of
from moat_kernels.ops.window_attention import WindowAttentionDescription
from moat_kernels.tensor_access import child, is_parametrized, tensor_of


class OneOp(NamedTuple):
    """An attention half that one op may compute: what follows from classes and settings.

    layers: places of `HalfLayers` among the modules that the block was told by.
    channels: what the norm is over. eps: the norm's. Others: as of AttentionHalf.
    """

    layers: tuple[int | None, ...]
    channels: tuple[int, ...]
    eps: float
    drop_path: DropPathReading | DropPath | None
    map_size: tuple[int, int] | None
    rows: bool
    branch: tuple[str, ...]
    branch_rows: bool

    def takes(self, y: Tensor, window: tuple[int, int] | None) -> bool:
        """Whether the norm and attention take a map [B, C, H, W]."""
        _, channels, height, width = y.shape
        if self.channels != (channels,):
            return False
        if self.map_size is not None:
            return (height, width) == self.map_size
        return window is None or not (height % window[0] or width % window[1])


class Kept(NamedTuple):
    """What of a block follows from its outline. half: None where no op computes all of it."""

    description: WindowAttentionDescription
    half: OneOp | None


class TransformerAdapter(AttentionAdapter):
    """A block of an attention half and an MLP. A subclass says by `read_half` what the half is.

    outline: tells of which blocks nothing but tensors need be read again.
    """

    outline: Outline[Kept]

    @abstractmethod
    def describe(self, module: Any) -> WindowAttentionDescription:
        """The attention as it is now, but for its tensors. Raises NotCovered."""

    @abstractmethod
    def read_table(self, module: Any, known: bool = False) -> Tensor | None:
        """The bias table, to be read once in a call. Raises NotCovered.

        known: whether the block's outline was, so that no class need be checked.
        """

    @abstractmethod
    def read_half(self, module: Any, attention: AttentionReading) -> AttentionHalf:
        """The half as it is now, without the MLP. Raises NotCovered."""

    @abstractmethod
    def half_consumed(self, module: Any) -> Iterable[nn.Module]:
        """The modules that are read, not called, where one op computes the half.

        Those of `consumed` need not be among them.
        """

    def read(self, module: Any) -> AttentionReading:
        return AttentionReading(self.describe(module), self.read_table(module))

    def run(self, module: nn.Module, recompute: str, *inputs: Any, **options: Any) -> Any:
        seen = self.outline.look(module)
        kept = None if seen is None else seen.kept
        modules: Sequence[nn.Module | None] = () if seen is None else seen.modules
        table_known = kept is not None
        if kept is None:
            kept, modules = self._read_block(module, seen)
        attention = AttentionReading(kept.description, self.read_table(module, table_known))
        if kept.half is not None and len(inputs) == 1 and not options:
            output = _run_half(module, kept.half, modules, attention, inputs[0])
            if output is not None:
                return output
        return self.compute(module, attention, *inputs, **options)

    @property
    def trials(self) -> tuple[Callable[..., Any], ...]:
        return (self.run, super().run)

    def _read_block(
        self, module: nn.Module, seen: Seen[Kept] | None
    ) -> tuple[Kept, Sequence[nn.Module | None]]:
        """What the block is, and the modules that the half's layers are among."""
        self.check_structure(module)
        description = self.describe(module)
        try:
            half, layers = self._read_layers(module, description)
        except NotCovered:
            half, layers = None, None
        if half is None or layers is None:
            kept = Kept(description, None)
            if seen is not None:
                self.outline.keep(seen, kept)
            return kept, ()
        kept = Kept(description, half)
        if seen is not None and not isinstance(half.drop_path, DropPath):
            found = places(seen.modules, layers)
            if found is not None:
                self.outline.keep(seen, Kept(description, half._replace(layers=found)))
        return kept, layers

    def _read_layers(
        self, module: nn.Module, description: WindowAttentionDescription
    ) -> tuple[OneOp | None, HalfLayers | None]:
        """The half and its layers, at the places 0 to 3. Raises NotCovered."""
        refuse_hooks(self.half_consumed(module))
        half = self.read_half(module, AttentionReading(description, None))
        layers = half.check_layers()
        # Reading a parametrized one may change it, and where no kernel covers the call it would be
        # called after that.
        parametrized = any(layer is not None and is_parametrized(layer) for layer in layers)
        if half.pool is not None or parametrized:
            return None, None
        norm: Any = layers.norm
        one_op = OneOp(
            tuple(range(len(layers))),
            norm.normalized_shape,
            half.eps,
            half.drop_path,
            half.map_size,
            half.rows,
            half.branch,
            half.branch_rows,
        )
        return one_op, layers


def _run_half(
    module: nn.Module,
    half: OneOp,
    modules: Sequence[nn.Module | None],
    attention: AttentionReading,
    x: Any,
) -> Tensor | None:
    """The block's output, its attention half by one op; None where that does not cover it."""
    if not isinstance(x, Tensor) or x.dim() != 4:
        return None
    layers: Any = [None if place is None else modules[place] for place in half.layers]
    y = _compute_half(
        half, HalfLayers(*layers), attention, x.permute(0, 3, 1, 2) if half.rows else x
    )
    if y is None:
        return None
    y = y.permute(0, 2, 3, 1) if half.branch_rows else y
    branch = y
    for name in half.branch:
        branch = child(module, name)(branch)
    y = y + branch
    if half.rows == half.branch_rows:
        return _in_format_of_rows(y, x) if half.rows else in_format_of(y, x)
    return in_format_of(y.permute(0, 3, 1, 2), x)


def _in_format_of_rows(y: Tensor, x: Tensor) -> Tensor:
    """As `in_format_of`, of [B, H, W, C]."""
    if x.is_contiguous():
        return y.contiguous()
    return in_format_of(y.permute(0, 3, 1, 2), x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


def _compute_half(
    half: OneOp, layers: HalfLayers, attention: AttentionReading, y: Tensor
) -> Tensor | None:
    """[B, C, H, W] -> the same in channels_last; None where no backend computes the half."""
    description, drop_path = attention.description, half.drop_path
    if not half.takes(y, description.window_size):
        return None
    if not (may_cover(y) or _is_specified()):
        return None
    if layers.layer_scale is not None:
        # The products' weights are scaled: float16 may not hold them, nor their gradients.
        if torch.float16 in (autocast_dtype(y), y.dtype):
            return None
        # What the branch is multiplied by decides the dtype of the sum.
        y = y.to(torch.promote_types(y.dtype, tensor_of(layers.layer_scale, "gamma").dtype))
    try:
        tensors = [*layer_tensors(*layers), attention.bias_table]
    except NotCovered:
        return None
    way = way_to_compute(y, tensors, description, drop_path is not None)
    if way in attention_half.BACKENDS:
        return attention_half.attention_half(y, tensors, half.eps, description, way)
    if way == TRAINING:
        kept = None if drop_path is None else drop_path.draw(y)
        factor = 1.0 if drop_path is None else _factor(drop_path)
        six: Any = tensors[:-1]  # none is missing: they are covered
        return attention_half_training.attention_half(
            *(y, Layers(*six), tensors[-1], half.eps, description, kept, factor)
        )
    if not _is_specified():
        return None
    scale = None if drop_path is None else drop_path.scale(y)
    return reference.attention_half(y, tensors, half.eps, description, scale)


def _is_specified() -> bool:
    """Whether the specification is to compute the half, which covers every call."""
    return requested_backend() == "reference"


def _factor(drop_path: DropPathReading | DropPath) -> float:
    """Of the samples that are kept."""
    survival = 1.0 - drop_path.probability
    return 1.0 / survival if survival > 0 else 1.0


class TransformerHalf(HalfReader):
    """Reads for `freeze` the blocks that an adapter fuses."""

    def __init__(self, adapter: TransformerAdapter) -> None:
        self.adapter = adapter
        self.class_name, self.children = adapter.class_name, adapter.children
        self.adapter_key = adapter.key

    def read(self, block: Any) -> AttentionHalf:
        return self.adapter.read_half(block, self.adapter.read(block))
