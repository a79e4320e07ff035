"""Whole models: eval, and a training step (forward and backward), at the batches of shapes.py.

OpenVINO and ONNX Runtime (peers.py) take part in eval where they are installed. They prepare
weights once, as do torch.compile with its weights frozen and our frozen model (`freeze`).
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from functools import partial
from typing import Any

import pytest
import torch
from bench_mbconv import FROZEN, FUSED, LEVELS, STOCK
from interleaved import Comparison, Contender, Group, contenders_of
from peers import RUNTIMES, checkpoint_blocks, compiled, make_peers
from shapes import MODELS, Model
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import moat_kernels as mk

QUICK_EVAL, QUICK_TRAINING = ("tiny_moat_0", "moat_0"), ("tiny_moat_0",)


def make_contender(
    model: torch.nn.Module, x: Tensor, training: bool, backend: str | None = None
) -> Contender:
    """A forward pass without gradients, or forward and backward of a scalar loss."""

    def forward() -> Tensor:
        if backend is None:
            return model(x).square().mean()
        with mk.use_backend(backend):
            return model(x).square().mean()

    if not training:
        return Contender(torch.no_grad()(forward))
    state = (*model.parameters(), *model.buffers())
    return Contender(
        lambda: forward().backward(), lambda: model.zero_grad(set_to_none=True), forward, state
    )


def make_group(model: Model, batch: int, training: bool, names: Sequence[str]) -> Group:
    """The contenders named, with the same weights and images."""
    torch.manual_seed(0)
    x = torch.randn(batch, 3, model.resolution, model.resolution)
    channels_last = x.to(memory_format=torch.channels_last)
    stock = mk.create_model(model.name, fused=False, drop_path_rate=0.0).train(training)
    peers = {} if training else make_peers(names, stock, x)

    def make(name: str) -> Contender:
        if name in peers:
            return peers[name]
        if name in STOCK:
            return make_contender(stock, x.contiguous(memory_format=STOCK[name]), training)
        if name == "stock checkpoint":
            checkpointed = checkpoint_blocks(copy.deepcopy(stock))
            return make_contender(checkpointed, channels_last, training)
        if name == "torch.compile":
            return make_contender(compiled(stock), channels_last, training)
        backend, _, level = name.partition(" ")
        recompute = level if training else "auto"
        fused = mk.create_model(model.name, recompute=recompute, drop_path_rate=0.0)
        fused.load_state_dict(stock.state_dict(), assign=True)  # moat_4 fits once
        fused.train(training)
        ours = mk.freeze(fused) if name in FROZEN else fused
        return make_contender(ours, channels_last, training, backend)

    flops = (3 if training else 1) * batch * _flops(model)
    return Group(names, make, flops)


def _flops(model: Model) -> float:
    """Of one image's forward pass, by PyTorch's own counter on tensors without data."""
    with torch.device("meta"), FlopCounterMode(display=False) as counter, torch.no_grad():
        stock = mk.create_model(model.name, fused=False).eval()
        stock(torch.empty(1, 3, model.resolution, model.resolution))
    return counter.get_total_flops()


EVAL = [
    Comparison(
        f"model eval {model} batch {batch}",
        partial(make_group, model, batch, False),
        contenders=(*STOCK, "torch.compile", *RUNTIMES, *FUSED, *FROZEN),
        full=model.name not in QUICK_EVAL or batch != model.eval_batches[0],
    )
    for model in MODELS
    for batch in model.eval_batches
]
TRAINING = [
    Comparison(
        f"model training {model} batch {model.training_batch}",
        partial(make_group, model, model.training_batch, True),
        contenders=(
            *(*STOCK, "stock checkpoint", "torch auto"),
            *(f"{name} {level}" for level in LEVELS for name in FUSED[1:]),
        ),
        slow=("torch.compile", "torch expand", "torch block"),
        full=model.name not in QUICK_TRAINING,
    )
    for model in MODELS
]


@pytest.mark.parametrize(("comparison", "contender"), contenders_of([*EVAL, *TRAINING]))
def test_models(measure: Any, comparison: Comparison, contender: str) -> None:
    measure(comparison, contender)
