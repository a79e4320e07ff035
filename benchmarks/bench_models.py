"""Whole models: eval at batch 1 and 8, and a training step (forward, backward) at batch 8.

OpenVINO and ONNX Runtime (peers.py) take part in eval where they are installed.
"""

from __future__ import annotations

from functools import lru_cache

import pytest
import shapes
import torch
from interleaved import Contender, Group
from peers import available_peers, make_peer
from shapes import TRAINING_BATCH, models
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import moat_kernels as mk
from moat_kernels.ops.backends import backend_status

FUSED = [name for name in ("torch", "cpu") if backend_status()[name].usable]
# name -> (memory format, backend or None for stock blocks, recompute)
EVAL = {
    "stock": (torch.contiguous_format, None, "auto"),
    "stock channels_last": (torch.channels_last, None, "auto"),
    **{name: (torch.channels_last, name, "auto") for name in FUSED},
}
# Compiling takes minutes.
PEERS = [name for name in available_peers() if name != "torch.compile" or shapes.FULL]
TRAINING = {
    **{name: EVAL[name] for name in ("stock", "stock channels_last")},
    **{
        f"{name} {level}": (torch.channels_last, name, level)
        for name in FUSED
        for level in ("none", "expand", "block")
    },
}


def make_contender(
    model: torch.nn.Module, x: Tensor, backend: str | None, training: bool
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


@lru_cache(maxsize=1)  # contenders of a group run one after the other
def make_group(name: str, resolution: int, batch: int, training: bool) -> Group:
    """All contenders for one variant, with the same weights and images."""
    torch.manual_seed(0)
    x = torch.randn(batch, 3, resolution, resolution)
    stock = mk.create_model(name, fused=False, drop_path_rate=0.0).train(training)
    contenders = {}
    for contender, (memory_format, backend, recompute) in (TRAINING if training else EVAL).items():
        model = stock
        if backend is not None:
            model = mk.create_model(name, recompute=recompute, drop_path_rate=0.0)
            model.load_state_dict(stock.state_dict())
        contenders[contender] = make_contender(
            model.train(training), x.contiguous(memory_format=memory_format), backend, training
        )
    if not training:
        for peer in PEERS:
            contenders[peer] = Contender(make_peer(peer, stock, x))
    mode = "training" if training else "eval"
    return Group(
        f"model {mode} {name} {resolution} batch {batch}",
        contenders,
        flops=_flops(name, resolution) * batch * (3 if training else 1),
    )


def _flops(name: str, resolution: int) -> float:
    """Of one image's forward pass, by PyTorch's own counter on tensors without data."""
    with torch.device("meta"), FlopCounterMode(display=False) as counter, torch.no_grad():
        mk.create_model(name, fused=False).eval()(torch.empty(1, 3, resolution, resolution))
    return counter.get_total_flops()


@pytest.mark.parametrize("contender", [*EVAL, *PEERS])
@pytest.mark.parametrize("batch", [1, pytest.param(8, marks=pytest.mark.full)])
@pytest.mark.parametrize(("name", "resolution"), models(quick=("tiny_moat_0", "moat_0")))
def test_eval(measure, name: str, resolution: int, batch: int, contender: str) -> None:
    measure(make_group(name, resolution, batch, training=False), contender)


@pytest.mark.parametrize("contender", TRAINING)
@pytest.mark.parametrize(("name", "resolution"), models(quick=("tiny_moat_0",)))
def test_training(measure, name: str, resolution: int, contender: str) -> None:
    measure(make_group(name, resolution, TRAINING_BATCH, training=True), contender)
