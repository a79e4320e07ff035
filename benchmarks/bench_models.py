"""Whole models: eval, and a training step (forward and backward), at the batches of shapes.py.

Runtimes (runtimes.py) take part in eval where they are installed. They prepare weights once, as
does our frozen model (`freeze`). Beside its time stands what each computes: the largest error of
its logits over the largest logit, against the stock model in float64.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace
from functools import cache, partial
from typing import Any

import pytest
import torch
from bench_mbconv import FROZEN, FUSED, LEVELS, STOCK
from images import calibration_batches, measured_images
from interleaved import Comparison, Contender, Group, contenders_of
from peers import checkpoint_blocks, compiled
from runtimes import RUNTIMES, Served, make_runtime
from shapes import MODELS, Model
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import moat_kernels as mk

QUICK_EVAL, QUICK_TRAINING = ("tiny_moat_0", "moat_0"), ("tiny_moat_0",)
LOW_PRECISIONS = {f"{name} {dtype}": dtype for name in FROZEN for dtype in ("bfloat16", "int8")}
# Under autocast; on a GPU --dtype is for all rows.
AUTOCAST = ("stock channels_last", *(f"{name} auto" for name in FUSED[1:])) if FROZEN else ()
SLOW_AUTOCAST = ("torch.compile bfloat16",) if FROZEN else ()


def make_stock(model: Model) -> mk.MOAT:
    torch.manual_seed(0)
    return mk.create_model(model.name, fused=False, drop_path_rate=0.0)


def make_fused(model: Model, stock: mk.MOAT, **options: Any) -> mk.MOAT:
    """With the parameters of `stock`, shared: moat_4 fits once."""
    fused = mk.create_model(model.name, drop_path_rate=0.0, **options)
    fused.load_state_dict(stock.state_dict(), assign=True)
    return fused.train(stock.training)


def forward(model: nn.Module, x: Tensor, backend: str | None) -> Tensor:
    if backend is None:
        return model(x)
    with mk.use_backend(backend):
        return model(x)


def make_eval_group(model: Model, batch: int, names: Sequence[str]) -> Group:
    """The contenders named, with the same weights and images."""
    x = measured_images(batch, model.resolution)
    channels_last = x.to(memory_format=torch.channels_last)
    calibration = calibration_batches(model.resolution)
    stock = make_stock(model).eval()
    served = Served(stock, x, calibration)
    exact = cache(partial(exact_logits, stock, x))

    def run(model: nn.Module, x: Tensor, backend: str | None = None) -> Contender:
        return Contender(torch.no_grad()(partial(forward, model, x, backend)))

    def make(name: str) -> Contender:
        if name in RUNTIMES:
            return make_runtime(name, served)
        if name in STOCK:
            return run(stock, x.contiguous(memory_format=STOCK[name]))
        backend = name.split()[0]
        fused = make_fused(model, stock)
        if name == backend:
            return run(fused, channels_last, backend)
        return run(freeze(fused, LOW_PRECISIONS.get(name), calibration), channels_last, backend)

    def make_with_error(name: str) -> Contender:
        contender = make(name)
        return replace(
            contender, facts=lambda: {"logit_error": largest_error(contender.call(), exact())}
        )

    return Group(names, make_with_error, batch * _flops(model))


def freeze(model: mk.MOAT, precision: str | None, calibration: Sequence[Tensor]) -> nn.Module:
    """precision: None is the model's own."""
    if precision is None:
        return mk.freeze(model)
    if precision == "int8":
        return mk.freeze(model, dtype=torch.int8, calibration=calibration)
    return mk.freeze(model, dtype=getattr(torch, precision))


@torch.no_grad()
def exact_logits(stock: nn.Module, x: Tensor) -> Tensor:
    """By the model in float64, image by image: a batch of them needs much memory."""
    exact = copy.deepcopy(stock).double()
    return torch.cat([exact(image) for image in x.double().split(1)])


def largest_error(logits: Tensor, exact: Tensor) -> float:
    """Over the largest logit."""
    return ((logits - exact).abs().max() / exact.abs().max()).item()


def make_training_group(model: Model, batch: int, names: Sequence[str]) -> Group:
    """The contenders named, with the same weights and images: forward and backward of a scalar.

    Names that end in "bfloat16" are those before it under autocast.
    """
    x = measured_images(batch, model.resolution)
    channels_last = x.to(memory_format=torch.channels_last)
    stock = make_stock(model).train()

    def run(autocast: bool, model: nn.Module, x: Tensor, backend: str | None = None) -> Contender:
        def loss() -> Tensor:
            with torch.autocast(x.device.type, torch.bfloat16, enabled=autocast):
                return forward(model, x, backend).float().square().mean()

        state = (*model.parameters(), *model.buffers())
        return Contender(
            lambda: loss().backward(), lambda: model.zero_grad(set_to_none=True), loss, state
        )

    def make(name: str) -> Contender:
        kind = name.removesuffix(" bfloat16")
        train = partial(run, kind != name)
        if kind in STOCK:
            return train(stock, x.contiguous(memory_format=STOCK[kind]))
        if kind == "stock checkpoint":
            return train(checkpoint_blocks(copy.deepcopy(stock)), channels_last)
        if kind == "torch.compile":
            return train(compiled(stock), channels_last)
        backend, level = kind.split()
        return train(make_fused(model, stock, recompute=level), channels_last, backend)

    return Group(names, make, 3 * batch * _flops(model))


def _flops(model: Model) -> float:
    """Of one image's forward pass, by PyTorch's own counter on tensors without data."""
    with torch.device("meta"), FlopCounterMode(display=False) as counter, torch.no_grad():
        stock = mk.create_model(model.name, fused=False).eval()
        stock(torch.empty(1, 3, model.resolution, model.resolution))
    return counter.get_total_flops()


EVAL = [
    Comparison(
        f"model eval {model} batch {batch}",
        partial(make_eval_group, model, batch),
        contenders=(*STOCK, *RUNTIMES, *FUSED, *FROZEN, *LOW_PRECISIONS),
        full=model.name not in QUICK_EVAL or batch != model.eval_batches[0],
    )
    for model in MODELS
    for batch in model.eval_batches
]
TRAINING = [
    Comparison(
        f"model training {model} batch {model.training_batch}",
        partial(make_training_group, model, model.training_batch),
        contenders=(
            *(*STOCK, "stock checkpoint", "torch auto"),
            *(f"{name} {level}" for level in LEVELS for name in FUSED[1:]),
            *(f"{name} bfloat16" for name in AUTOCAST),
        ),
        slow=("torch.compile", "torch expand", "torch block", *SLOW_AUTOCAST),
        full=model.name not in QUICK_TRAINING,
    )
    for model in MODELS
]


@pytest.mark.parametrize(("comparison", "contender"), contenders_of([*EVAL, *TRAINING]))
def test_models(measure: Any, comparison: Comparison, contender: str) -> None:
    measure(comparison, contender)
