"""`fuse` on other people's models: eval, and a training step (forward and backward).

timm, torchvision and vit-pytorch as installed; twins (tests/support/twins) of what no registry
carries. `fused_share` is how much of the stock forward pass the replaced methods take: the rest
(stem, MLPs, norms and projections around attention, head) runs as it did.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import lru_cache, partial
from typing import Any

import pytest
import torch
from device import placed, synchronize
from interleaved import Comparison, Contender, Group, contenders_of
from shapes import ADAPTER_BATCHES
from support.peers import import_peer
from support.twins import apple, changzy00, rookichenn
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import moat_kernels as mk
from moat_kernels.adapters.fused import FusedModule
from moat_kernels.adapters.registry import find_adapter

RESOLUTION = 224
CONTENDERS = {
    "stock": (False, torch.contiguous_format),
    "stock channels_last": (False, torch.channels_last),
    "fused": (True, torch.contiguous_format),
    "fused channels_last": (True, torch.channels_last),
}


def _vit_pytorch() -> nn.Module:
    """MaxViT-T's size; its default dropout, which is not fused in training, left out."""
    max_vit = import_peer("vit_pytorch.max_vit")
    return max_vit.MaxViT(num_classes=1000, dim=64, depth=(2, 2, 5, 2), dropout=0.0)


def _apple() -> nn.Module:
    class Last(apple.MOAT):
        def forward(self, inputs: Tensor) -> Tensor:
            return super().forward(inputs)[-1]

    return Last(pe_type=apple.PEType.SINGLE_HEAD_RPE)


MODELS: dict[str, Callable[[], nn.Module]] = {
    "timm coatnet_0": lambda: import_peer("timm").create_model("coatnet_0_224"),
    "timm maxvit_tiny_tf": lambda: import_peer("timm").create_model("maxvit_tiny_tf_224"),
    "torchvision maxvit_t": lambda: import_peer("torchvision.models.maxvit").maxvit_t(),
    "vit-pytorch MaxViT": _vit_pytorch,
    "RooKichenn moat_0 (twin)": rookichenn.MOAT,
    "Apple tiny_moat_0 (twin)": _apple,
    "changzy00 moat_0 (twin)": changzy00.MOAT,
}
QUICK = ("timm coatnet_0",)


def make_group(name: str, mode: str, names: Sequence[str]) -> Group:
    """The contenders named for one model, with the same weights and images."""
    torch.manual_seed(0)
    stock = MODELS[name]().train(mode == "training")
    x = torch.randn(ADAPTER_BATCHES[mode], 3, RESOLUTION, RESOLUTION)

    def make(contender: str) -> Contender:
        fused, memory_format = CONTENDERS[contender]
        model = copy.deepcopy(stock)
        if fused:
            mk.fuse(model)
        model = model.to(memory_format=memory_format)
        made = _contender(model, x.to(memory_format=memory_format), mode)
        if contender != "stock":
            return made
        return replace(made, facts=lambda: {"fused_share": fused_share(name)})

    with FlopCounterMode(display=False) as counter, torch.no_grad():
        copy.deepcopy(stock).eval()(x[:1])
    flops = counter.get_total_flops() * ADAPTER_BATCHES[mode] * (3 if mode == "training" else 1)
    return Group(names, make, flops)


def _contender(model: nn.Module, x: Tensor, mode: str) -> Contender:
    def forward() -> Tensor:
        return model(x).square().mean()

    if mode == "eval":
        return Contender(torch.no_grad()(forward))
    state = (*model.parameters(), *model.buffers())
    return Contender(
        lambda: forward().backward(), lambda: model.zero_grad(set_to_none=True), forward, state
    )


@lru_cache(maxsize=1)
def fused_share(name: str) -> float:
    """Time in the methods that `fuse` replaces, over the whole stock forward pass (eval)."""
    torch.manual_seed(0)
    with placed():
        model = MODELS[name]().eval()
        x = torch.randn(ADAPTER_BATCHES["eval"], 3, RESOLUTION, RESOLUTION)
    mk.fuse(model)
    replaced = {
        module: find_adapter(module.adapter_key).method
        for module in model.modules()
        if isinstance(module, FusedModule)
    }
    mk.unfuse(model)
    spent = 0.0

    def timed(method: Callable[..., Any]) -> Callable[..., Any]:
        def run(*inputs: Any, **options: Any) -> Any:
            nonlocal spent
            synchronize()
            start = time.perf_counter()
            result = method(*inputs, **options)
            synchronize()
            spent += time.perf_counter() - start
            return result

        return run

    for module, method in replaced.items():
        setattr(module, method, timed(getattr(module, method)))
    with torch.no_grad():
        model(x)
        synchronize()
        spent, start = 0.0, time.perf_counter()
        for _ in range(5):
            model(x)
        synchronize()
    return spent / (time.perf_counter() - start)


COMPARISONS = [
    Comparison(
        f"adapters {mode} {name} {RESOLUTION} batch {batch}",
        partial(make_group, name, mode),
        contenders=tuple(CONTENDERS),
        full=name not in QUICK,
    )
    for name in MODELS
    for mode, batch in ADAPTER_BATCHES.items()
]


@pytest.mark.parametrize(("comparison", "contender"), contenders_of(COMPARISONS))
def test_adapters(measure: Any, comparison: Comparison, contender: str) -> None:
    measure(comparison, contender)
