"""Modules in the place of others."""

from __future__ import annotations

import functools
from collections.abc import Callable
from random import Random
from typing import Any

import torch
from torch import nn

import moat_kernels as mk
from moat_kernels import reference
from moat_kernels.drop_path import DropPath
from moat_kernels.normalization import BatchNorm2d
from support.edited_modules import (
    Bent,
    Checkpointed,
    FrozenBatchNorm2d,
    LoRA,
    MapLayerNorm,
    OtherDropPath,
    WithOtherWeights,
    Wrapped,
)
from support.edits.making import (
    BatchNorm,
    Edit,
    at,
    find,
    replacing,
    setting,
)


def _conv_like(old: nn.Conv2d, **options: Any) -> nn.Conv2d:
    settings = {"kernel_size": old.kernel_size, "stride": old.stride, "groups": old.groups}
    return nn.Conv2d(old.in_channels, old.out_channels, **{**settings, **options})


def replaced_convolution(rng: Random, root: nn.Module) -> Edit | None:
    path, conv = find(rng, root, nn.Conv2d)
    if conv is None:
        return None
    half = (conv.kernel_size[0] // 2, conv.kernel_size[1] // 2)
    mode = rng.choice(["reflect", "circular"])
    same = functools.partial(reference.SameConv2d, conv.in_channels, conv.out_channels)
    makes: dict[str, Callable[[Any], nn.Module]] = {
        "Conv2d with bias": lambda m: _conv_like(m, padding=half),
        "Conv2d without bias": lambda m: _conv_like(m, padding=half, bias=False),
        "Conv2d 3x3": lambda m: _conv_like(m, kernel_size=3, padding=1),
        "Conv2d 3x3 dilated": lambda m: _conv_like(m, kernel_size=3, padding=2, dilation=2),
        "Conv2d, one group": lambda m: _conv_like(m, padding=half, groups=1),
        f"Conv2d 3x3 {mode}": lambda m: _conv_like(m, kernel_size=3, padding=1, padding_mode=mode),
        "SameConv2d 5x5": lambda m: same(5, m.stride[0], groups=m.groups),
        "SameConv2d 3x1": lambda m: same((3, 1), m.stride[0], groups=m.groups),
        "LoRA": LoRA,
        "Identity": lambda m: nn.Identity(),
        **wraps(rng),
    }
    text = rng.choice(list(makes))
    return replacing(path, text, makes[text]) if path else None


def wraps(rng: Random) -> dict[str, Callable[[Any], nn.Module]]:
    return {
        "Sequential of it": nn.Sequential,
        "Sequential of it and Dropout(0)": lambda m: nn.Sequential(m, nn.Dropout(0.0)),
        "Sequential of it and sine": lambda m: nn.Sequential(m, Bent()),
        "a wrapper with its weight": Wrapped,
        "checkpointed": lambda m: Checkpointed(m, use_reentrant=False),
        "checkpointed, reentrant": lambda m: Checkpointed(m, use_reentrant=True),
        "functional_call of it": WithOtherWeights,
    }


def replaced_norm(rng: Random, root: nn.Module) -> Edit | None:
    path, norm = find(rng, root, BatchNorm)
    if not path:
        return None
    width = norm.num_features
    makes: dict[str, Callable[[Any], nn.Module]] = {
        "BatchNorm2d of torch": lambda m: nn.BatchNorm2d(width),
        "BatchNorm2d of torch, plain": lambda m: nn.BatchNorm2d(
            width, affine=False, track_running_stats=False
        ),
        "BatchNorm2d of this package": lambda m: BatchNorm2d(width, momentum=0.3),
        "synchronised": mk.convert_sync_batchnorm,
        "FrozenBatchNorm2d": lambda m: FrozenBatchNorm2d(width),
        "GroupNorm": lambda m: nn.GroupNorm(2, width),
        "InstanceNorm2d": lambda m: nn.InstanceNorm2d(width, affine=True),
        "LayerNorm of maps": lambda m: MapLayerNorm(width),
        "Identity": lambda m: nn.Identity(),
        "Dropout2d": lambda m: nn.Dropout2d(0.3),
        **wraps(rng),
    }
    text = rng.choice(list(makes))
    return replacing(path, text, makes[text])


def replaced_part_of_attention(rng: Random, root: nn.Module) -> Edit | None:
    path, module = find(rng, root, nn.LayerNorm, nn.Linear, reference.Attention, inner=True)
    if module is None:
        return None
    makes: dict[str, Callable[[Any], nn.Module]] = {
        "Identity": lambda m: nn.Identity(),
        **wraps(rng),
    }
    if isinstance(module, nn.LayerNorm):
        shape = module.normalized_shape
        makes |= {
            "RMSNorm": lambda m: nn.RMSNorm(shape),
            "LayerNorm, plain": lambda m: nn.LayerNorm(shape, elementwise_affine=False),
            "LayerNorm of another eps": lambda m: nn.LayerNorm(shape, eps=0.1),
        }
    elif isinstance(module, nn.Linear):
        sizes = module.in_features, module.out_features
        makes |= {
            "Linear without bias": lambda m: nn.Linear(*sizes, bias=False),
            "LoRA": LoRA,
        }
    elif isinstance(module.qkv, nn.Linear):
        width = module.qkv.in_features
        makes |= {
            "Attention of other heads": lambda m: reference.Attention(
                width, head_dim=8, window_size=2, position_size=3
            ),
            "plain Attention": lambda m: reference.Attention(width, head_dim=16),
        }
    text = rng.choice(list(makes))
    return replacing(path, text, makes[text])


def replaced_other_part(rng: Random, root: nn.Module) -> Edit | None:
    kinds = (DropPath, reference.SqueezeExcitation)
    path, module = find(rng, root, *kinds, inner=True)
    if module is None:
        return None
    makes: dict[str, Callable[[Any], nn.Module]] = {
        "Identity": lambda m: nn.Identity(),
        "Dropout2d": lambda m: nn.Dropout2d(0.3),
        "another DropPath": lambda m: OtherDropPath(0.5),
        "DropPath(0.5)": lambda m: DropPath(0.5),
        "sine": lambda m: Bent(),
        **wraps(rng),
    }
    text = rng.choice(list(makes))
    return replacing(path, text, makes[text])


def replaced_block(rng: Random, root: nn.Module) -> Edit | None:
    """In a whole model: blocks, stages, the stem, the head."""
    stages = root._modules.get("stages")
    if stages is None:
        return None
    stage = rng.randrange(len(stages))
    block = rng.randrange(len(stages[stage]))
    place = f"stages.{stage}.{block}"
    targets: dict[str, tuple[str, Callable[[Any], nn.Module]]] = {
        **{text: (place, make) for text, make in wraps(rng).items()},
        "Sequential of the blocks": (f"stages.{stage}", lambda m: nn.Sequential(*m)),
        "Sequential of the stem": ("stem", nn.Sequential),
        "Identity": ("final_layer_norm", lambda m: nn.Identity()),
        "Sequential of the head": ("logits_head", lambda m: nn.Sequential(nn.Dropout(0.0), m)),
        "the block, twice": (f"stages.{stage}", _doubled),
        "a plain block at its end": (f"stages.{stage}", _lengthened),
        "without its last block": (f"stages.{stage}", lambda m: nn.ModuleList(list(m)[:-1])),
    }
    text = rng.choice(list(targets))
    path, make = targets[text]
    return replacing(path, text, make) if root._modules.get(path.split(".")[0]) else None


def _doubled(stage: nn.ModuleList) -> nn.Module:
    """The last block at the end once more; it has stride 1 where it is not the first."""
    last = stage[len(stage) - 1]
    if last.stride != 1:
        last.stride, last.pool, last.depthwise_conv.stride = 1, None, (1, 1)
    return nn.ModuleList([*stage, last] if last.in_channels == last.out_channels else stage)


def _lengthened(stage: nn.ModuleList) -> nn.Module:
    width = stage[len(stage) - 1].out_channels
    return nn.ModuleList([*stage, reference.MBConvBlock(width, width)])


def setting_of_a_model(rng: Random, root: nn.Module) -> Edit | None:
    if not isinstance(root, mk.MOAT):
        return None

    def reset(model: Any) -> None:
        torch.default_generator.manual_seed(13)
        model.reset_classifier(3)

    changes: dict[str, Callable[[Any], None]] = {
        "features_only flipped": lambda m: setattr(m, "features_only", not m.features_only),
        "logits_head = None": setting(logits_head=None),
        "final_layer_norm = None": setting(final_layer_norm=None),
        "reset_classifier(3)": reset,
    }
    text = rng.choice(list(changes))
    return at("", text, changes[text])
