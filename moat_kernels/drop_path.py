"""Stochastic depth: a sample of the batch loses its residual."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator, Sequence
from contextvars import ContextVar
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes


class DropPath(nn.Module):
    """In training multiplies each sample by 0 with probability `probability`, else by 1/p.

    p = 1 - probability is the official survival probability. Identity in eval.
    """

    def __init__(self, probability: float = 0.0) -> None:
        super().__init__()
        if not 0.0 <= probability < 1.0:
            raise ValueError(f"drop_path must be within [0, 1), got {probability!r}")
        self.probability = probability

    def draw(self, x: Tensor) -> Tensor | None:
        """Which samples keep their residual this time, [B]: 1 or 0; None where nothing drops.

        In x's dtype, or float32 for float64, whose draws on CUDA devices are others.
        """
        if not self.training or self.probability == 0.0:
            return None
        drawn = _take(self, x)
        if drawn is not None:
            return drawn.kept
        kept = torch.empty(x.shape[0], dtype=_drawn_dtype(x), device=x.device)
        return kept.bernoulli_(1.0 - self.probability)

    def scale(self, x: Tensor) -> Tensor | None:
        """A new draw, [B] in x's dtype: 0 or 1/p for each sample; None where nothing drops."""
        drawn = _take(self, x)
        if drawn is not None:
            return drawn.scale
        kept = self.draw(x)
        return None if kept is None else kept.to(x.dtype).div_(1.0 - self.probability)

    def forward(self, x: Tensor) -> Tensor:
        scale = self.scale(x)
        return x if scale is None else x * scale[:, None, None, None]

    def extra_repr(self) -> str:
        return f"probability={self.probability}"


class _Drawn(NamedTuple):
    """What `DropPath.draw` and `DropPath.scale` give, [B] each."""

    kept: Tensor
    scale: Tensor


# By the id of a DropPath what is drawn for it and not taken yet, in order.
_waiting: ContextVar[dict[int, list[_Drawn]] | None] = ContextVar(
    "moat_kernels_drop_path_drawn", default=None
)


@contextlib.contextmanager
def drawing_together(modules: Sequence[DropPath], x: Tensor) -> Iterator[None]:
    """Inside the `with` block, in this thread, modules take what is drawn for all of them at once.

    Two launches on a GPU, in place of one or two for each. modules: those in training that drop
    something, each as often as it draws for a map of x's batch, dtype and device. One that draws
    once more, or for another map, draws by itself; so does one in a part whose activations are
    recomputed (torch.utils.checkpoint), which must draw the same again.
    """
    probabilities = tuple(module.probability for module in modules)
    keep, factors = _rates(probabilities, x.dtype, x.device)
    kept = torch.empty(len(modules), x.shape[0], dtype=_drawn_dtype(x), device=x.device)
    kept.bernoulli_(keep)
    scales = kept.to(x.dtype) * factors
    waiting: dict[int, list[_Drawn]] = {}
    for module, *drawn in zip(modules, kept.unbind(), scales.unbind(), strict=True):
        waiting.setdefault(id(module), []).append(_Drawn(*drawn))
    token = _waiting.set(waiting)
    try:
        yield
    finally:
        _waiting.reset(token)


@functools.lru_cache(maxsize=64)
def _rates(
    probabilities: tuple[float, ...], dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor]:
    """(the survival probabilities, float32, and 1 by each, in `dtype`), [n, 1].

    Kept, as copying them to a GPU makes the host wait.
    """
    with _disable_current_modes():
        keep = torch.tensor([[1.0 - each] for each in probabilities], dtype=torch.float64)
        return keep.to(device, torch.float32), (1.0 / keep).to(device, dtype)


def _drawn_dtype(x: Tensor) -> torch.dtype:
    return torch.float32 if x.dtype == torch.float64 else x.dtype


def _take(module: DropPath, x: Tensor) -> _Drawn | None:
    """The next that was drawn for a module together with others, if it is for maps like x."""
    if torch.compiler.is_compiling():
        return None
    waiting = _waiting.get()
    drawn = waiting.get(id(module)) if waiting else None
    # Checkpointing runs without gradients, or hooks what is saved.
    if not drawn or not torch.is_grad_enabled() or saves_by_hooks():
        return None
    scale = drawn[0].scale
    fits = scale.shape == x.shape[:1] and scale.dtype == x.dtype and scale.device == x.device
    return drawn.pop(0) if fits else None


def saves_by_hooks() -> bool:
    """Whether hooks see each tensor that is saved for the backward pass."""
    return torch._C._autograd._top_saved_tensors_default_hooks(False) is not None
