"""Chains: frozen modules that run one behind the other, in one native call.

Frozen modules take and return tensors of the model's dtype. Where nothing else happens between two
of them, their maps need not be converted to that and back. So a container that calls its children
in turn becomes a `FrozenChain`: a subclass of its own class, which computes runs of frozen children
by one sequence of steps, as long as these are still the children and nobody wants to see their
calls.

nn.Sequential is such a container, and classes of other packages are known by name. These are tried
out on the first input that comes: both ways give the same bits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from moat_kernels.inspection import are_touched, hooks_for_all_modules
from moat_kernels.ops.common.backends import warn_once
from moat_kernels.ops.common.spatial import in_format_of
from moat_kernels.ops.frozen import FrozenSequence


@dataclass(frozen=True)
class Container:
    """A class of modules of which one method calls children in turn.

    children: names of them, which may be missing; None: all.
    maps: whether what passes between the children is what the method takes. Else that is maps
        [B, C, H, W], between the children they may lie as [B, H, W, C], and all must be frozen.
    """

    class_name: str
    children: tuple[str, ...] | None
    method: str = "forward"
    maps: bool = True


_ALL_IN_TURN = Container("", None)


def _container_of(module: nn.Module, known: Sequence[Container]) -> Container | None:
    """What is known of a module as a container. All of an nn.ModuleList is called in turn."""
    if type(module) in (nn.Sequential, nn.ModuleList):
        return _ALL_IN_TURN
    name = type(module).__name__
    return next((container for container in known if container.class_name == name), None)


@dataclass
class _Run:
    """Frozen modules in turn. keeps_format: whether the result has the format of the input."""

    sequences: list[FrozenSequence]
    keeps_format: bool = True
    sequence: FrozenSequence = field(init=False)

    def join(self) -> None:
        self.sequence = self.sequences[0].followed_by(self.sequences[1:])

    def __call__(self, x: Tensor) -> Tensor:
        y = self.sequence.result(x)
        return in_format_of(y, x) if self.keeps_format else y


class _Leaf(NamedTuple):
    """A module that a container calls. sequence: all that it computes, if it is a frozen one."""

    module: nn.Module
    sequence: FrozenSequence | None


class _Chain:
    """What a container computes, in place of calling its children.

    containers: itself and those inside, with the children that they had. parts: runs, and modules
    that are called.
    """

    def __init__(
        self,
        containers: list[tuple[nn.Module, tuple[nn.Module | None, ...]]],
        leaves: list[_Leaf],
        proved: bool,
    ) -> None:
        self._containers = containers
        frozen = [leaf.module for leaf in leaves if leaf.sequence is not None]
        self._inside = [*frozen, *(module for module, _ in containers[1:])]
        self._parts = _parts_of(leaves)
        self.proved = proved

    @property
    def joins(self) -> bool:
        """Whether any native call computes more than one module."""
        return any(isinstance(part, _Run) and len(part.sequences) > 1 for part in self._parts)

    def holds(self) -> bool:
        """Whether the children are what they were, and run as their classes do."""
        return (
            all(
                tuple(module._modules.values()) == children for module, children in self._containers
            )
            and not are_touched(self._inside)
            and not hooks_for_all_modules()
        )

    def __call__(self, x: Tensor) -> Tensor:
        for part in self._parts:
            x = part(x)
        return x


def _parts_of(leaves: Iterable[_Leaf]) -> list[_Run | nn.Module]:
    parts: list[_Run | nn.Module] = []
    for leaf in leaves:
        if leaf.sequence is None:
            parts.append(leaf.module)
            continue
        last = parts[-1] if parts else None
        if not isinstance(last, _Run) or not last.sequences[-1].leads_to(leaf.sequence):
            last = _Run([])
            parts.append(last)
        last.sequences.append(leaf.sequence)
        last.keeps_format &= getattr(leaf.module, "keeps_format", True)
    for part in parts:
        if isinstance(part, _Run):
            part.join()
    return parts


def chain_containers(model: nn.Module, known: Sequence[Container]) -> None:
    """Let containers in a frozen model compute runs of frozen children by one native call."""
    chains = []
    for module in model.modules():
        container = _container_of(module, known)
        if container is None or type(module) is nn.ModuleList:
            continue
        containers: list[tuple[nn.Module, tuple[nn.Module | None, ...]]] = []
        leaves = list(_leaves(module, container, known, containers))
        proved = all(type(inner) is nn.Sequential for inner, _ in containers)
        chain = _Chain(containers, leaves, proved)
        if chain.joins and (container.maps or _are_frozen(leaves)):
            chains.append((module, container.method, chain))
    for module, method, chain in chains:
        module.__class__ = _chained_class(type(module), method)
        module._frozen_chain = chain  # type: ignore[assignment]


def _leaves(
    module: nn.Module,
    container: Container,
    known: Sequence[Container],
    containers: list[tuple[nn.Module, tuple[nn.Module | None, ...]]],
) -> Iterator[_Leaf]:
    """The modules that a container calls in turn, those of containers inside in their place."""
    containers.append((module, tuple(module._modules.values())))
    names = list(module._modules) if container.children is None else container.children
    for name in names:
        child = module._modules.get(name)
        if child is None:
            continue
        inner = _container_of(child, known)
        inside: list[tuple[nn.Module, tuple[nn.Module | None, ...]]] = []
        leaves = [] if inner is None else list(_leaves(child, inner, known, inside))
        if inner is None or not (inner.maps or _are_frozen(leaves)):
            rows = container.maps and getattr(child, "reads_rows", False)
            yield _Leaf(child, None if rows else getattr(child, "whole_sequence", None))
            continue
        containers += inside
        yield from leaves


def _are_frozen(leaves: Iterable[_Leaf]) -> bool:
    return all(leaf.sequence is not None for leaf in leaves)


class FrozenChain(nn.Module):
    """What every class of a chained container has."""

    _frozen_chain: _Chain


_CLASSES: dict[tuple[type, str], type[FrozenChain]] = {}


def _chained_class(kind: type[nn.Module], method: str) -> type[FrozenChain]:
    """The class of chained containers of class `kind`; always the same."""
    if (kind, method) not in _CLASSES:
        stock = getattr(kind, method)
        attributes = {
            method: _chained(stock),
            "__module__": __name__,
            "__doc__": f"{kind.__name__} with frozen modules inside; see moat_kernels.freeze.",
        }
        metaclass: Any = type(kind)
        _CLASSES[kind, method] = metaclass(
            f"Frozen{kind.__name__}", (FrozenChain, kind), attributes
        )
    return _CLASSES[kind, method]


def _chained(stock: Callable[..., Any]) -> Callable[..., Any]:
    @torch.compiler.disable
    def method(module: nn.Module, *inputs: Any, **options: Any) -> Any:
        chain: _Chain | None = module.__dict__.get("_frozen_chain")
        if chain is None or options or len(inputs) != 1 or not chain.holds():
            return stock(module, *inputs, **options)
        if chain.proved:
            return chain(*inputs)
        expected = stock(module, *inputs)
        if expected.numel():
            if not _is_same(chain(*inputs), expected):
                module._frozen_chain = None  # type: ignore[assignment]
                warn_once(
                    f"freeze: the results of {type(module).__name__} differ from those of the code "
                    "that its names are known from; its frozen modules run one by one"
                )
            chain.proved = True
        return expected

    return method


def _is_same(actual: Tensor, expected: Tensor) -> bool:
    return (
        actual.shape == expected.shape
        and actual.dtype == expected.dtype
        and torch.equal(actual.nan_to_num(), expected.nan_to_num())
    )
