"""What kernels move and compute, as their launchers declare it: the numbers of a roofline.

A launcher names the tensors that its kernel reads and writes; each crosses DRAM once, whatever
else comes from a cache.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from contextvars import ContextVar
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Part:
    """`count` of `of` equal parts of a tensor: what a kernel touches of it."""

    tensor: Tensor
    count: int
    of: int


Touched = Tensor | Part | None


@dataclass(frozen=True)
class Crossing:
    """A tensor between DRAM and a kernel, once: its shape and the bytes that move."""

    shape: torch.Size
    bytes: int


@dataclass(frozen=True)
class Pass:
    """One launch of a kernel.

    reads, writes: what crosses DRAM. flops: of its products and stencils, 2 for each multiply and
    add; what else it computes is not counted. arithmetic: the unit that multiplies: "bfloat16",
    "float16", "tf32", "tf32x3" (three TF32 products for each of float32), "float32" or "float64"
    (no tensor core).
    """

    kernel: str
    reads: tuple[Crossing, ...]
    writes: tuple[Crossing, ...]
    flops: int
    arithmetic: str

    @property
    def bytes(self) -> int:
        """All that crosses DRAM."""
        return sum(crossing.bytes for crossing in (*self.reads, *self.writes))


_passes: ContextVar[list[Pass] | None] = ContextVar("kernel_passes", default=None)


@contextlib.contextmanager
def record_passes() -> Iterator[list[Pass]]:
    """Collect the launches inside the `with` block, of real tensors, fake ones or meta tensors.

    Sees this thread only: on a machine with a GPU, autograd runs backward passes in another,
    unless under `torch.autograd.set_multithreading_enabled(False)`.
    """
    passes: list[Pass] = []
    token = _passes.set(passes)
    try:
        yield passes
    finally:
        _passes.reset(token)


def recording() -> bool:
    """Whether launches are being collected."""
    return _passes.get() is not None


def record(
    kernel: str,
    arguments: Sequence[object],
    reads: Sequence[Touched],
    writes: Sequence[Touched],
    flops: int,
    arithmetic: str,
) -> None:
    """Add a launch to those being collected; every tensor in `arguments` must be declared.

    A tensor that stands twice in `reads` crosses once; None stands for an optional one that is not
    there.
    """
    passes = _passes.get()
    if passes is None:
        return
    declared = {id(_tensor(touched)) for touched in (*reads, *writes)}
    for position, argument in enumerate(arguments):
        if isinstance(argument, Tensor) and id(argument) not in declared:
            raise ValueError(
                f"{kernel}: its argument {position}, a tensor of shape {tuple(argument.shape)}, is "
                "in neither reads nor writes"
            )
    passes.append(Pass(kernel, _crossings(reads), _crossings(writes), flops, arithmetic))


def _crossings(side: Sequence[Touched]) -> tuple[Crossing, ...]:
    return tuple(crossing_of(touched) for touched in dict.fromkeys(side) if touched is not None)


def _tensor(touched: Touched) -> Tensor | None:
    return touched.tensor if isinstance(touched, Part) else touched


def crossing_of(touched: Tensor | Part) -> Crossing:
    """What moves when a kernel goes over a tensor once; elements that share memory move once."""
    if isinstance(touched, Part):
        whole = crossing_of(touched.tensor)
        return Crossing(whole.shape, whole.bytes * touched.count // touched.of)
    sizes = zip(touched.shape, touched.stride(), strict=True)
    elements = math.prod(size for size, stride in sizes if stride != 0 or size == 0)
    return Crossing(touched.shape, elements * touched.element_size())
