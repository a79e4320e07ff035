"""What an adapter is: how one implementation's module is computed by one of the ops."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from moat_kernels.adapters.outline import Outline, Seen, places
from moat_kernels.adapters.reading import (
    Bottleneck,
    BottleneckModules,
    DropPathReading,
    NotCovered,
    child_names,
    read_tensors,
    refuse_hooks,
    tensor_names,
)
from moat_kernels.drop_path import DropPath
from moat_kernels.ops.common.backends import warn_once
from moat_kernels.ops.mbconv import mbconv
from moat_kernels.ops.mbconv.description import MBConvDescription
from moat_kernels.ops.window_attention import WindowAttentionDescription, window_attention
from moat_kernels.tracing import is_traced, record_call


@dataclass(frozen=True)
class FusedClass:
    """The base and the attributes of the class that a fused module gets."""

    base: type[nn.Module]
    attributes: dict[str, Any]


class Adapter(ABC):
    """Computes modules of one class of one implementation by a fused op.

    An adapter is found by the name of the module's class and the names of its children; the other
    package is never imported. It keeps nothing of a module: what was read at a call holds for
    another one only if the module has the same outline then (outline.py).

    implementation: the package or repository, for reports.
    class_name: the class of the modules.
    children, optional: names of the children that a module has, and of those that it may have.
        One that has others besides is left alone.
    tensors: names of the parameters and buffers that it may hold itself.
    op: the op that computes it.
    covers, leaves: for the table of supported cases.
    method: the module's method that is replaced.
    compared: whether `fuse` runs both ways before it fuses a module.
    """

    implementation: str
    class_name: str
    children: tuple[str, ...]
    optional: tuple[str, ...] = ()
    tensors: tuple[str, ...] = ()
    op: str
    covers: str = ""
    leaves: str = ""
    method: str = "forward"
    compared: bool = True

    @property
    def key(self) -> str:
        """Identifies the adapter, in pickles too."""
        return f"{self.implementation}: {self.class_name}"

    def is_for(self, kind: type) -> bool:
        """Whether a class has the name of this implementation's."""
        return kind.__name__ == self.class_name

    def recognises(self, module: nn.Module) -> bool:
        """Whether a module of such a class has this implementation's structure."""
        return child_names(module).issuperset(self.children)

    def check_structure(self, module: nn.Module) -> None:
        """Raise NotCovered for children or tensors of unknown use, or hooks that would not run."""
        unknown = child_names(module).difference(self.children, self.optional)
        unknown |= tensor_names(module).difference(self.tensors)
        if unknown:
            raise NotCovered(f"unknown {', '.join(sorted(unknown))}")
        refuse_hooks(self.consumed(module))

    def consumed(self, module: nn.Module) -> Iterable[nn.Module]:
        """The modules inside that are read, not called, once this one is fused."""
        return list(module.modules())[1:]

    @abstractmethod
    def check(self, module: nn.Module) -> None:
        """Raise NotCovered if the module, as it is now, cannot be fused."""

    @abstractmethod
    def run(self, module: nn.Module, recompute: str, *inputs: Any, **options: Any) -> Any:
        """What `method` returns. Raises NotCovered before anything is changed."""

    @property
    def trials(self) -> tuple[Callable[..., Any], ...]:
        """The ways in which `run` may compute a module, each called like it, that `fuse` tries."""
        return (self.run,)

    @abstractmethod
    def example(self, module: nn.Module) -> tuple[Tensor, ...]:
        """Small inputs for `method`, in float64, on which `fuse` compares both ways."""

    def fused_class(self, stock: type[nn.Module], recompute: str) -> FusedClass:
        """How a module of class `stock` is made to be computed by `run`."""
        adapter = self

        def method(module: nn.Module, *inputs: Any, **options: Any) -> Any:
            if any(map(is_traced, inputs)):
                if adapter.method == "forward":
                    return record_call(module, *inputs, **options)
                return getattr(stock, adapter.method)(module, *inputs, **options)
            try:
                return adapter.run(module, recompute, *inputs, **options)
            except NotCovered as obstacle:
                reason = str(obstacle)
            warn_once(f"{stock.__name__}: {reason}; running unfused")
            return getattr(stock, adapter.method)(module, *inputs, **options)

        return FusedClass(stock, {self.method: method})


class _KeptBottleneck(NamedTuple):
    """What of a bottleneck follows from its outline. places: of `BottleneckModules`."""

    description: MBConvDescription
    drop_path: DropPathReading | None
    places: tuple[int | None, ...]


class MBConvAdapter(Adapter):
    """An inverted bottleneck. A subclass says by `read` which module plays which part.

    outline: tells of which blocks `read` need not be asked again; None: it is asked in every call.
    """

    op = "mbconv"
    outline: Outline[_KeptBottleneck] | None = None

    @abstractmethod
    def read(self, block: Any) -> Bottleneck:
        """The block as the op takes it: see `reading.read_bottleneck`. Raises NotCovered."""

    def check(self, module: nn.Module) -> None:
        self.check_structure(module)
        self.read(module)

    def _read_again(self, module: nn.Module) -> Bottleneck:
        """What `check` and `read` find, by the module's outline if it has one."""
        seen = None if self.outline is None else self.outline.look(module)
        if seen is not None and seen.kept is not None:
            description, drop_path, found = seen.kept
            modules = BottleneckModules(*seen.at(found))
            return Bottleneck(description, modules, read_tensors(modules), drop_path)
        self.check_structure(module)
        bottleneck = self.read(module)
        if seen is not None:
            self._keep(seen, bottleneck)
        return bottleneck

    def _keep(self, seen: Seen[_KeptBottleneck], bottleneck: Bottleneck) -> None:
        found, drop_path = places(seen.modules, bottleneck.modules), bottleneck.drop_path
        if self.outline is None or found is None or isinstance(drop_path, DropPath):
            return  # a drop path of this package is a module, which may change
        self.outline.keep(seen, _KeptBottleneck(bottleneck.description, drop_path, found))

    def run(self, module: nn.Module, recompute: str, *inputs: Any, **options: Any) -> Any:
        bottleneck = self._read_again(module)
        (x,) = inputs
        drop_path = bottleneck.drop_path
        return mbconv(
            x,
            bottleneck.parameters,
            bottleneck.description,
            training=True,  # which norms measure the batch is told by their own training flags
            recompute=recompute,
            drop_path_scale=None if drop_path is None else drop_path.scale(x),
        )

    def example(self, module: nn.Module) -> tuple[Tensor, ...]:
        parameters = self.read(module).parameters
        return (torch.randn(2, parameters.expand_weight.shape[1], 6, 8, dtype=torch.float64),)


@dataclass(frozen=True)
class AttentionReading:
    """What `functional.window_attention` needs beside qkv."""

    description: WindowAttentionDescription
    bias_table: Tensor | None

    def attend(self, qkv: Tensor) -> Tensor:
        """[B, H, W, 3*heads*head_dim] -> [B, H, W, heads*head_dim]."""
        return window_attention(qkv, self.bias_table, self.description)


class AttentionAdapter(Adapter):
    """Self-attention. The projections, norms and dropouts around it are called as they are."""

    op = "window_attention"

    @abstractmethod
    def read(self, module: Any) -> AttentionReading:
        """The attention as the op takes it. Raises NotCovered."""

    @abstractmethod
    def compute(
        self, module: Any, attention: AttentionReading, *inputs: Any, **options: Any
    ) -> Tensor:
        """What `method` returns. Raises NotCovered for inputs that the op does not take."""

    def check(self, module: nn.Module) -> None:
        self.check_structure(module)
        self.read(module)

    def run(self, module: nn.Module, recompute: str, *inputs: Any, **options: Any) -> Any:
        self.check_structure(module)
        return self.compute(module, self.read(module), *inputs, **options)
