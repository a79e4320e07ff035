"""Settings of modules: what is read at each call, and what is not."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from random import Random
from typing import Any

import torch
from torch import nn

from moat_kernels import reference
from moat_kernels.ops.mbconv.description import Pool
from support.edits.making import (
    BatchNorm,
    Edit,
    at,
    find,
    random_tensor,
    setting,
)


def _kernel(size: tuple[int, int]) -> Callable[[nn.Conv2d], None]:
    def change(conv: nn.Conv2d) -> None:
        std = (conv.weight[0, :, 0, 0].numel() * size[0] * size[1]) ** -0.5
        weight = random_tensor((*conv.weight.shape[:2], *size), conv.weight, std)
        conv.weight = nn.Parameter(weight)
        conv.kernel_size = size
        conv.padding = (size[0] // 2, size[1] // 2)
        conv._reversed_padding_repeated_twice = [conv.padding[1]] * 2 + [conv.padding[0]] * 2

    return change


def _groups(groups: int) -> Callable[[nn.Conv2d], None]:
    def change(conv: nn.Conv2d) -> None:
        shape = (conv.out_channels, conv.in_channels // groups, *conv.kernel_size)
        std = (shape[1] * shape[2] * shape[3]) ** -0.5
        conv.groups, conv.weight = groups, nn.Parameter(random_tensor(shape, conv.weight, std))

    return change


def _bias(conv: nn.Conv2d | nn.Linear) -> None:
    conv.bias = nn.Parameter(random_tensor((conv.weight.shape[0],), conv.weight))


def setting_of_a_convolution(rng: Random, root: nn.Module) -> Edit | None:
    path, conv = find(rng, root, nn.Conv2d)
    if conv is None:
        return None
    stride = rng.choice([(1, 1), (2, 2), (2, 1)])
    kernel = rng.choice([(3, 3), (5, 5), (1, 3), (1, 1)])
    padding = rng.choice([(1, 1), (0, 1), "same"])
    dilation = rng.choice([(2, 2), (1, 2)])
    groups = rng.choice([1, 2, 4])
    mode = rng.choice(["reflect", "circular", "replicate"])
    changes: dict[str, Callable[[Any], None]] = {
        f"stride = {stride}": setting(stride=stride),
        f"padding = {padding!r}": setting(padding=padding),
        f"dilation = {dilation}": setting(dilation=dilation),
        f"dilation = {dilation}, padding = the same": setting(dilation=dilation, padding=dilation),
        f"groups = {groups}": _groups(groups),
        f"kernel {kernel}": _kernel(kernel),
        "bias added": _bias,
        "bias = None": setting(bias=None),
        f"padding_mode = {mode!r}": setting(padding_mode=mode),
        "in_channels, out_channels = 1, 1": setting(in_channels=1, out_channels=1),
        "weights in channels_last": lambda m: m.to(memory_format=torch.channels_last),
    }
    text = rng.choice(list(changes))
    return at(path, text, changes[text])


def moved_stride(rng: Random, root: nn.Module) -> Edit | None:
    path, block = find(rng, root, reference.MBConvBlock)
    if block is None:
        return None
    goal = rng.choice(["expand_conv", "shrink_conv"])

    def change(block: Any) -> None:
        conv = getattr(block, goal)
        conv.stride, block.depthwise_conv.stride = block.depthwise_conv.stride, (1, 1)

    return at(path, f"the stride moved to {goal}", change)


def setting_of_a_norm(rng: Random, root: nn.Module) -> Edit | None:
    path, norm = find(rng, root, BatchNorm)
    if norm is None:
        return None
    momentum = rng.choice([0.5, None, 1.0, 0.0])
    without = {"running_mean": None, "running_var": None}
    changes: dict[str, Callable[[Any], None]] = {
        "eps = 0.3": setting(eps=0.3),
        f"momentum = {momentum}": setting(momentum=momentum),
        "weight = None": setting(weight=None),
        "bias = None": setting(bias=None),
        "affine = False": setting(affine=False),
        "weight = bias = None": setting(weight=None, bias=None, affine=False),
        "track_running_stats = False": setting(track_running_stats=False),
        "no running statistics": setting(track_running_stats=False, **without),
        "running statistics = None": setting(**without),
        "unbiased_running_var flipped": lambda norm: setattr(
            norm, "unbiased_running_var", not getattr(norm, "unbiased_running_var", True)
        ),
        "num_features = 1": setting(num_features=1),
        "num_batches_tracked = None": setting(num_batches_tracked=None),
        "reset_running_stats()": lambda norm: norm.reset_running_stats(),
    }
    text = rng.choice(list(changes))
    return at(path, text, changes[text])


def setting_of_a_layer_norm(rng: Random, root: nn.Module) -> Edit | None:
    path, norm = find(rng, root, nn.LayerNorm)
    if norm is None:
        return None
    changes = {
        "eps = 0.3": setting(eps=0.3),
        "weight = None": setting(weight=None),
        "bias = None": setting(bias=None),
        "weight = bias = None": setting(weight=None, bias=None, elementwise_affine=False),
        "normalized_shape = (1,)": setting(normalized_shape=(1,)),
    }
    text = rng.choice(list(changes))
    return at(path, text, changes[text])


def setting_of_an_attention(rng: Random, root: nn.Module) -> Edit | None:
    path, attention = find(rng, root, reference.Attention)
    if attention is None:
        return None
    window = rng.choice([None, (2, 2), (3, 1)])
    heads, head_dim = attention.description.heads, attention.description.head_dim

    def describe(**values: Any) -> Callable[[Any], None]:
        return lambda m: setattr(m, "description", dataclasses.replace(m.description, **values))

    def table(size: int) -> Callable[[Any], None]:
        def change(attention: Any) -> None:
            shape = (attention.description.heads, size, size)
            attention.relative_position_embedding = nn.Parameter(
                random_tensor(shape, attention.qkv.weight)
            )

        return change

    changes: dict[str, Callable[[Any], None]] = {
        f"window_size = {window}": describe(window_size=window),
        "heads and head_dim exchanged": describe(heads=head_dim, head_dim=heads),
        "scale = 0.1": describe(scale=0.1),
        "another table": table(5),
        "table = None": setting(relative_position_embedding=None),
        "qkv.bias = None": lambda m: setattr(m.qkv, "bias", None),
        "proj.bias = None": lambda m: setattr(m.proj, "bias", None),
        "qkv.in_features = 1": lambda m: setattr(m.qkv, "in_features", 1),
    }
    text = rng.choice(list(changes))
    return at(path, text, changes[text])


def setting_of_a_block(rng: Random, root: nn.Module) -> Edit | None:
    path, block = find(rng, root, reference.MBConvBlock)
    if block is None:
        return None
    stride = block.stride
    pools = [
        None,
        Pool(kernel_size=3, stride=stride),
        Pool("max", 2, stride),
        Pool(stride=stride, kernel_size=3, padding=(1, 1, 1, 1), count_include_pad=True),
    ]
    pool = rng.choice(pools)
    level = rng.choice(["none", "expand", "block"])
    changes: dict[str, Callable[[Any], None]] = {
        f"pool = {pool}": setting(pool=pool),
        "stride = 1": setting(stride=1),
        "stride = 2": setting(stride=2),
        "stride = 1, pool = None": setting(stride=1, pool=None),
        "stride = 1 everywhere": lambda m: (
            setting(stride=1, pool=None)(m),
            setting(stride=(1, 1))(m.depthwise_conv),
        ),
        "se = None": setting(se=None),
        "shortcut_conv = None": setting(shortcut_conv=None),
        "shortcut_conv added": lambda m: _add_shortcut(m),
        "in_channels, out_channels = 1, 1": setting(in_channels=1, out_channels=1),
        f"recompute = {level!r}": setting(recompute=level),
        "drop_path.probability = 0.5": lambda m: setattr(m.drop_path, "probability", 0.5),
    }
    text = rng.choice(list(changes))
    return at(path, text, changes[text])


def _add_shortcut(block: Any) -> None:
    weight = block.shrink_conv.weight
    conv = nn.Conv2d(block.in_channels, block.out_channels, 1).to(weight.dtype)
    conv.weight = nn.Parameter(random_tensor(conv.weight.shape, weight))
    conv.bias = nn.Parameter(random_tensor(conv.bias.shape, weight))
    block.shortcut_conv = conv
