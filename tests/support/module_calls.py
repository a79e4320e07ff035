"""Public modules and functions with valid arguments, for `support.wrong_arguments`.

The tensors of a module are arguments like its input.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import moat_kernels as mk
from moat_kernels import reference
from moat_kernels.functional import (
    MBConvDescription,
    MBConvParameters,
    NormParameters,
    SqueezeExcite,
    WindowAttentionDescription,
    mbconv,
    window_attention,
)
from moat_kernels.modules import FusedAttention
from moat_kernels.stem import FusedStem, Stem
from support.peers import import_peer
from support.wrong_arguments import Call, exact


def module_call(
    name: str, plain: nn.Module, fused: nn.Module, x: Tensor, trains: bool, part: str = ""
) -> Call:
    """fused(x) against plain(x) with the same tensors; trains: with the backward pass.

    part: only its tensors are arguments.
    """
    names, values = [], []
    for key, tensor in fused.state_dict().items():
        if tensor.is_floating_point() and key.startswith(part):
            names.append(key)
            values.append(exact(torch.rand(tensor.shape) + (0.5 if "var" in key else -0.5)))
    plain = copy.deepcopy(plain).train(trains)
    fused = copy.deepcopy(fused).train(trains)

    def run(module: nn.Module, x: Tensor, *tensors: Tensor) -> Tensor:
        state = dict(zip(names, tensors, strict=True))
        with torch.set_grad_enabled(trains):
            if trains:
                leaves = [t for t in (x, *tensors) if t is not None and t.is_floating_point()]
                for leaf in leaves:
                    leaf.requires_grad_()
                # Buffers are updated in place.
                state = {
                    key: value.detach() if "running" in key and value is not None else value
                    for key, value in state.items()
                }
            output = torch.func.functional_call(module, state, (x,))
            if trains:
                output.sum().backward()
        return output.detach()

    return Call(
        name + (", training" if trains else ""),
        lambda *arguments: run(fused, *arguments),
        [x, *values],
        lambda *arguments: run(plain.double(), *arguments),
        optional=False,
    )


def randn(*sizes: int) -> Tensor:
    return exact(torch.randn(sizes))


class InReference(nn.Module):
    """A fused block computed in plain PyTorch, with the op's own checks."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self._modules.update(block._modules)
        self.block = [block]  # not a module of this one: the names of tensors stay

    def forward(self, x: Tensor) -> Tensor:
        with mk.use_backend("reference"):
            return self.block[0](x)


def own_calls() -> list[Call]:
    attention = {"head_dim": 16, "position_size": 4}
    fused = FusedAttention(32, **attention)
    plain = reference.Attention(32, **attention)
    mbconv_block = mk.FusedMBConv(16, 24, stride=2)
    moat_block = mk.FusedMOATBlock(32, 32, **attention)
    return [
        module_call(name, *modules, x, trains)
        for name, *modules, x in (
            ("FusedAttention", plain, fused, randn(2, 4, 5, 32)),
            ("FusedMBConv", InReference(mbconv_block), mbconv_block, randn(2, 16, 6, 8)),
            ("FusedMOATBlock", InReference(moat_block), moat_block, randn(2, 32, 5, 4)),
            ("FusedStem", Stem(16), FusedStem(16), randn(2, 3, 9, 8)),
        )
        for trains in (False, True)
    ]


def frozen_call() -> Call:
    block = mk.FusedMOATBlock(32, 32, head_dim=16, position_size=4).eval()
    plain = copy.deepcopy(block).double()
    arguments = [randn(2, 32, 5, 4)]
    return Call("freeze", torch.no_grad()(mk.freeze(block)), arguments, torch.no_grad()(plain))


def peer_calls() -> list[Call]:
    """timm's and torchvision's attention, where they are installed."""
    modules: list[tuple[str, nn.Module, Tensor, str]] = []
    try:
        maxxvit = import_peer("timm.models.maxxvit")
        config = dataclasses.replace(
            maxxvit.MaxxVitTransformerCfg(), window_size=(4, 4), grid_size=(4, 4), dim_head=16
        )
        partition = maxxvit.PartitionAttentionCl(32, "window", config)
        modules.append(("timm PartitionAttentionCl", partition, randn(1, 4, 8, 32), "attn."))
        modules.append(("timm AttentionCl", partition.attn, randn(2, 4, 4, 32), ""))
    except pytest.skip.Exception:
        pass
    try:
        maxvit = import_peer("torchvision.models.maxvit")
        layer = maxvit.RelativePositionalMultiHeadAttention(32, 16, 16)
        modules.append(("torchvision attention", layer, randn(1, 3, 16, 32), ""))
    except pytest.skip.Exception:
        pass
    calls = []
    for name, plain, x, part in modules:
        fused = copy.deepcopy(plain)
        if not mk.fuse(fused).fused:
            raise RuntimeError(f"{name} was not fused")
        calls.append(module_call(name, plain, fused, x, False, part))
    return calls


def in_reference(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def run(*arguments: Any) -> Tensor:
        with mk.use_backend("reference"):
            return function(*arguments)

    return run


def functional_calls() -> list[Call]:
    channels, wide, out = 16, 40, 24
    sizes = [
        *((wide, channels), (wide, 1, 3, 3), (out, wide), (wide,), (wide,), (out,)),
        *((8, wide), (8,), (wide, 8), (wide,), (out, channels), (out,)),
    ]
    weights = [randn(*size) for size in sizes]
    norms = [randn(width) for width in (channels, wide, wide) for _ in range(4)]
    for variance in norms[3::4]:
        variance.abs_().add_(0.5)

    def block(x: Tensor, *tensors: Tensor, training: bool = False) -> Tensor:
        weights, norms = tensors[:12], tensors[12:]
        parameters = MBConvParameters(
            *weights[:6],
            *(NormParameters(*norms[first : first + 4]) for first in range(0, 12, 4)),
            NormParameters(),
            *weights[6:],
        )
        description = MBConvDescription(squeeze_excite=SqueezeExcite())
        return mbconv(x, parameters, description, training=training)

    def attend(qkv: Tensor, table: Tensor) -> Tensor:
        return window_attention(qkv, table, WindowAttentionDescription(2, 8, (3, 4)))

    arguments = [randn(2, channels, 5, 6), *weights, *norms]
    return [
        Call("mbconv", block, arguments, in_reference(block)),
        Call(
            "window_attention",
            attend,
            [randn(2, 5, 6, 48), randn(2, 5, 7)],
            in_reference(attend),
        ),
    ]


def calls() -> list[Call]:
    return [*own_calls(), frozen_call(), *peer_calls(), *functional_calls()]
