"""Backbones for dense prediction from 224 to 1344 pixels: inference, and a training step.

Four maps (strides 4 to 32), attention in windows, so that the work of a pixel is the same at every
size; `ms_per_megapixel` tells whether its time is. The smallest size has a batch of 8, so that it
is no smaller than a large image in parts. The last group compares what a frozen backbone takes for
two maps with what it takes for the last alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import pytest
import torch
from bench_mbconv import FROZEN, FUSED
from images import measured_images
from interleaved import Comparison, Contender, Group, contenders_of
from peers import compiled
from torch import Tensor, nn

import moat_kernels as mk


class Size(NamedTuple):
    """Square images."""

    side: int
    batch: int

    def __str__(self) -> str:
        return f"{self.side} px"

    @property
    def pixels(self) -> int:
        return self.batch * self.side**2


SIZES = (Size(224, 8), Size(641, 1), Size(1344, 1))
VARIANTS = ("tiny_moat_0", "moat_0")
MAPS, TWO_MAPS = (1, 2, 3, 4), (1, 4)
WINDOWS = (None, None, 14, 14)
STOCK, COMPILED = "stock channels_last", "torch.compile"
LOW_PRECISION = [f"{name} bfloat16" for name in FROZEN]
EVAL_KINDS = (STOCK, *FUSED[1:], *FROZEN, *LOW_PRECISION)
TRAINING_KINDS = (STOCK, *(f"{name} auto" for name in FUSED[1:]))


def make_backbone(name: str, fused: bool, **options: Any) -> mk.MOAT:
    torch.manual_seed(0)
    maps = {"out_indices": MAPS, **options}
    return mk.create_model(
        *(name,), features_only=True, window_size=WINDOWS, fused=fused, drop_path_rate=0.0, **maps
    )


def images_of(size: Size) -> Tensor:
    return measured_images(size.batch, size.side).to(memory_format=torch.channels_last)


def run(model: nn.Module, x: Tensor, backend: str | None) -> list[Tensor]:
    if backend is None:
        return model(x)
    with mk.use_backend(backend):
        return model(x)


def make_eval_contender(name: str, label: str) -> Contender:
    kind, size = _kind_and_size(label)
    x = images_of(size)
    if kind in (STOCK, COMPILED):
        model = make_backbone(name, fused=False).eval()
        call = partial(run, compiled(model) if kind == COMPILED else model, x, None)
    else:
        model, backend = make_backbone(name, fused=True).eval(), kind.split()[0]
        if "frozen" in kind:
            model = mk.freeze(model, torch.bfloat16 if kind.endswith("bfloat16") else None)
        call = partial(run, model, x, backend)
    return Contender(torch.no_grad()(call), pixels=size.pixels)


def make_training_contender(name: str, label: str) -> Contender:
    """Forward and backward of the maps' mean squares."""
    kind, size = _kind_and_size(label)
    x = images_of(size)
    model = make_backbone(name, fused=kind not in (STOCK, COMPILED)).train()
    function = compiled(model) if kind == COMPILED else model
    backend = kind.split()[0] if function is model and kind != STOCK else None

    def loss() -> Tensor:
        return torch.stack([m.square().mean() for m in run(function, x, backend)]).sum()

    return Contender(
        lambda: loss().backward(),
        lambda: model.zero_grad(set_to_none=True),
        loss,
        (*model.parameters(), *model.buffers()),
        pixels=size.pixels,
    )


def make_two_maps(name: str, names: Sequence[str]) -> Group:
    """One frozen backbone asked for its last map, one for two, one for all ten endpoints."""
    x = images_of(SIZES[1])
    out_indices = {"last map": (4,), "two maps": TWO_MAPS, "ten endpoints": None}

    def make(label: str) -> Contender:
        model = make_backbone(name, fused=True, out_indices=out_indices[label]).eval()
        return Contender(torch.no_grad()(partial(mk.freeze(model), x)), pixels=SIZES[1].pixels)

    return Group(names, make)


def _kind_and_size(label: str) -> tuple[str, Size]:
    kind, _, size = label.partition(", ")
    return kind, next(item for item in SIZES if str(item) == size)


def _labels(kinds: Sequence[str]) -> tuple[str, ...]:
    return tuple(f"{kind}, {size}" for size in SIZES for kind in kinds)


def _comparison(mode: str, name: str, kinds: Sequence[str], make: Any) -> Comparison:
    return Comparison(
        f"sizes {mode} {name}",
        lambda labels: Group(labels, partial(make, name)),
        contenders=_labels(kinds),
        slow=_labels((COMPILED,)),
        full=name != VARIANTS[0],
    )


EVAL = [_comparison("eval", name, EVAL_KINDS, make_eval_contender) for name in VARIANTS]
TRAINING = [
    _comparison("training", name, TRAINING_KINDS, make_training_contender) for name in VARIANTS
]
MAPS_OF_FROZEN = [
    Comparison(
        f"maps of a frozen backbone {name} {SIZES[1]}",
        partial(make_two_maps, name),
        contenders=("last map", "two maps", "ten endpoints"),
    )
    for name in (VARIANTS if FROZEN else ())
]


@pytest.mark.parametrize(
    ("comparison", "contender"), contenders_of([*EVAL, *TRAINING, *MAPS_OF_FROZEN])
)
def test_sizes(measure: Any, comparison: Comparison, contender: str) -> None:
    measure(comparison, contender)
