"""Transformer blocks of other packages: attention, with its norm and its sum where one op has both.

`AttentionAdapter` computes attention where it stands. Its norm, linear layers, drop path and sum
lie in the block around; kernels have all of them as one op (ops/attention_half). Where they do not
cover a call, the block's own modules are called around the attention.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor, nn

from moat_kernels.adapters.base import AttentionAdapter, AttentionReading
from moat_kernels.adapters.freezing import AttentionHalf, HalfReader
from moat_kernels.adapters.reading import NotCovered, refuse_hooks
from moat_kernels.ops.attention_half import api as attention_half
from moat_kernels.ops.attention_half import reference
from moat_kernels.ops.attention_half import training as attention_half_training
from moat_kernels.ops.attention_half.description import Layers
from moat_kernels.ops.common.backends import requested_backend
from moat_kernels.ops.common.spatial import in_format_of
from moat_kernels.tensor_access import is_parametrized


class TransformerAdapter(AttentionAdapter):
    """A block of an attention half and an MLP. A subclass says by `read_half` what the half is."""

    @abstractmethod
    def read_half(self, module: Any, attention: AttentionReading) -> AttentionHalf:
        """The half as it is now, without the MLP. Raises NotCovered."""

    @abstractmethod
    def half_consumed(self, module: Any) -> Iterable[nn.Module]:
        """The modules that are read, not called, where one op computes the half."""

    def run(self, module: nn.Module, recompute: str, *inputs: Any, **options: Any) -> Any:
        self.check_structure(module)
        attention = self.read(module)
        output = self._run_half(module, attention, *inputs, **options)
        return self.compute(module, attention, *inputs, **options) if output is None else output

    @property
    def trials(self) -> tuple[Callable[..., Any], ...]:
        return (self.run, super().run)

    def _run_half(
        self, module: Any, attention: AttentionReading, x: Any, *inputs: Any, **options: Any
    ) -> Tensor | None:
        """The block's output, its attention half by one op; None where that does not cover it."""
        if inputs or options or not isinstance(x, Tensor) or x.dim() != 4:
            return None
        try:
            refuse_hooks(self.half_consumed(module))
            half = self.read_half(module, attention)
            y = _compute_half(half, x.permute(0, 3, 1, 2) if half.rows else x)
        except NotCovered:
            return None
        if y is None:
            return None
        y = y.permute(0, 2, 3, 1) if half.branch_rows else y
        branch = y
        for name in half.branch:
            branch = getattr(module, name)(branch)
        y = y + branch
        if half.rows == half.branch_rows:
            return y if half.rows else in_format_of(y, x)
        return in_format_of(y.permute(0, 3, 1, 2), x)


def _compute_half(half: AttentionHalf, x: Tensor) -> Tensor | None:
    """[B, C, H, W] -> the same in channels_last; None where no backend computes the half."""
    description = half.attention.description
    if half.pool is not None or not half.takes(x.shape[2], x.shape[3]):
        return None
    if any(map(is_parametrized, (half.norm, half.qkv, half.proj))):
        return None  # reading them may change them, and the modules would be called after it
    tensors = half.tensors()
    if half.drop_path is None:
        backend = attention_half.covering(x, tensors, description)
        if backend:
            return attention_half.attention_half(x, tensors, half.eps, description, backend)
    *layers, table = tensors
    trains = attention_half_training.covers(x, layers, table, description)
    if not trains and requested_backend() != "reference":
        return None
    scale = None if half.drop_path is None else half.drop_path.scale(x)
    if not trains:
        return reference.attention_half(x, tensors, half.eps, description, scale)
    named = Layers(*layers)  # type: ignore[arg-type]  # none is missing: they are covered
    return attention_half_training.attention_half(
        x, named, table, half.eps, description, scale, 1.0
    )


class TransformerHalf(HalfReader):
    """Reads for `freeze` the blocks that an adapter fuses."""

    def __init__(self, adapter: TransformerAdapter) -> None:
        self.adapter = adapter
        self.class_name, self.children = adapter.class_name, adapter.children
        self.adapter_key = adapter.key

    def read(self, block: Any) -> AttentionHalf:
        return self.adapter.read_half(block, self.adapter.read(block))
