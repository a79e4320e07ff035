"""This package's blocks as `functional.mbconv` takes them, read from their modules at every call.

They are read by what reads other people's blocks (adapters/reading.py), which looks at all settings
and takes tens of microseconds. So descriptions are kept by what they are made of; tensors, hooks
and replaced modules are looked at in every call.
"""

from __future__ import annotations

from operator import attrgetter
from typing import Any

import torch
from torch import nn

from moat_kernels.adapters.reading import (
    Bottleneck,
    BottleneckModules,
    Gate,
    NotCovered,
    check_pointwise,
    class_name,
    is_norm,
    read_bottleneck,
    read_drop_path,
    read_tensors,
)
from moat_kernels.inspection import (
    are_touched,
    hooks_for_all_modules,
    interceptions,
    overridden,
)
from moat_kernels.normalization import BatchNorm2d, SyncBatchNorm, describe_norm
from moat_kernels.ops.mbconv.description import MBConvDescription
from moat_kernels.reference import MBConvBlock, SameConv2d, SqueezeExcitation
from moat_kernels.tensor_access import child, plain_class

_CONVOLUTIONS = (nn.Conv2d, SameConv2d)
_NORMS = (nn.BatchNorm2d, nn.SyncBatchNorm, BatchNorm2d, SyncBatchNorm)
# What a description depends on, by the class of the module.
_SETTINGS: dict[type[nn.Module], Any] = {
    **dict.fromkeys(
        _CONVOLUTIONS,
        attrgetter(
            *("kernel_size", "stride", "padding", "dilation", "groups", "padding_mode"),
            *("in_channels", "out_channels"),
        ),
    ),
    **dict.fromkeys(_NORMS, describe_norm),
}
# What a block computes between its modules.
_GELU = nn.GELU()
_SHORTCUT = MBConvBlock.shortcut

# Of a block, that are read, beside its drop path.
_CONVOLUTION_NAMES = ("expand_conv", "depthwise_conv", "shrink_conv", "shortcut_conv")
_NORM_NAMES = ("pre_norm", "expand_norm", "depthwise_norm")
READ_CHILDREN = (*_CONVOLUTION_NAMES, *_NORM_NAMES, "se")

# By `_signature`. Threads may race to add the same description, which is harmless.
_descriptions: dict[tuple[Any, ...], MBConvDescription] = {}
_MOST_DESCRIPTIONS = 1024


def read_block(block: MBConvBlock) -> Bottleneck:
    """The inverted bottleneck of a block as it is now.

    A module in the place of another one is read too, if its class is known. Raises NotCovered.
    """
    if name := overridden(block, (_SHORTCUT,)):
        raise NotCovered(f"its {name} was replaced")
    if hooks_for_all_modules():
        raise NotCovered("hooks for all modules are registered")
    drop_path = read_drop_path(child(block, "drop_path"))
    key = None if torch.compiler.is_compiling() else _signature(block)
    description = None if key is None else _descriptions.get(key)
    if description is not None:
        modules = _modules_of(block)
        return Bottleneck(description, modules, read_tensors(modules), drop_path)
    bottleneck = _read(block, drop_path)
    if key is not None:
        if len(_descriptions) >= _MOST_DESCRIPTIONS:
            _descriptions.clear()
        _descriptions[key] = bottleneck.description
    return bottleneck


def _signature(block: MBConvBlock) -> tuple[Any, ...] | None:
    """What the description depends on; None if modules must be looked at one by one."""
    se = child(block, "se")
    modules = [child(block, name) for name in (*_CONVOLUTION_NAMES, *_NORM_NAMES)]
    key: list[Any] = [block.pool]
    if se is not None:
        if type(se) is not SqueezeExcitation:
            return None
        modules += [child(se, "reduce"), child(se, "expand")]
        key.append(se.activation)
    if are_touched((se, *modules)):
        return None
    for module in modules:
        if module is None:
            key.append(None)
            continue
        kind = type(module)
        read_settings = _SETTINGS.get(kind)
        if read_settings is None:
            kind = plain_class(module)
            read_settings = _SETTINGS.get(kind)
            if read_settings is None:
                return None
        key += (kind, read_settings(module))
    try:
        hash(signature := tuple(key))
    except TypeError:  # a list among the settings
        return None
    return signature


def _modules_of(block: MBConvBlock) -> BottleneckModules:
    se = child(block, "se")
    return BottleneckModules(
        expand=child(block, "expand_conv"),
        depthwise=child(block, "depthwise_conv"),
        project=child(block, "shrink_conv"),
        pre_norm=child(block, "pre_norm"),
        expand_norm=child(block, "expand_norm"),
        depthwise_norm=child(block, "depthwise_norm"),
        project_norm=None,
        se_reduce=child(se, "reduce"),
        se_expand=child(se, "expand"),
        shortcut=child(block, "shortcut_conv"),
    )


def _read(block: MBConvBlock, drop_path: Any) -> Bottleneck:
    """The block with a look at every module."""
    if reason := interceptions(block, READ_CHILDREN):
        raise NotCovered(reason)
    se = child(block, "se")
    _check_classes(block, _CONVOLUTION_NAMES, _CONVOLUTIONS)
    _check_classes(block, _NORM_NAMES, _NORMS)
    _check_classes(block, ("se",), (SqueezeExcitation,))
    _check_classes(se, ("reduce", "expand"), _CONVOLUTIONS)
    modules = _modules_of(block)
    return read_bottleneck(
        pre_norm=modules.pre_norm,
        expand=modules.expand,
        expand_norm=modules.expand_norm,
        expand_activation=_GELU,
        depthwise=modules.depthwise,
        depthwise_norm=modules.depthwise_norm,
        depthwise_activation=_GELU,
        gate=_read_gate(se),
        project=modules.project,
        pool=block.pool,
        shortcut=modules.shortcut,
        drop_path=drop_path,
    )


def _read_gate(se: Any) -> Gate | None:
    """Squeeze-and-excitation, if there is any."""
    if se is None:
        return None
    return Gate(se.activation, *(check_pointwise(child(se, name)) for name in ("reduce", "expand")))


def _check_classes(
    owner: nn.Module | None, names: tuple[str, ...], kinds: tuple[type[nn.Module], ...]
) -> None:
    """Raise NotCovered for a child of another class: a linear layer has such tensors too, say."""
    for name in names:
        module = child(owner, name)
        if module is None or plain_class(module) in kinds:
            continue
        if kinds is not _NORMS or not is_norm(module):
            raise NotCovered(f"{name} was replaced by {class_name(module)}")
