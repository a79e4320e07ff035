"""The block's tensors and settings as the native ops take them.

The schemas of the ops, which csrc/cpu/host/mbconv_arguments.h and mbconv_train.h generate, have the
same names in the same order; tests/ops/test_schemas.py compares them.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
from torch import Tensor

from moat_kernels.ops.common.spatial import resolve_padding
from moat_kernels.ops.mbconv.algebra.coverage import KERNEL_SIZE
from moat_kernels.ops.mbconv.description import (
    NORMS,
    MBConvDescription,
    MBConvParameters,
    Norm,
    NormParameters,
)

# The tensors of a block, and how many of them, from the first on, the passes of training take.
BLOCK_TENSORS = tuple(
    name
    for field in MBConvParameters._fields
    for name in (
        [f"{field}_{part}" for part in NormParameters._fields[:4]] if field in NORMS else [field]
    )
)
_BOTTLENECK_TENSORS = BLOCK_TENSORS.index("project_norm_weight")


class BlockSettings(NamedTuple):
    """What evaluation is told of a block beside its tensors, whatever the size of the map."""

    stride: int
    expand_activation: str
    depthwise_activation: str
    se_activation: str
    pre_norm_eps: float
    expand_norm_eps: float
    depthwise_norm_eps: float
    project_norm_eps: float
    residual: bool
    pool_kind: str  # empty: no pool
    pool_kernel_size: int
    pool_stride: int
    pool_count_include_pad: bool


class BlockPadding(NamedTuple):
    """Of the depthwise convolution and of the shortcut's pool, for maps of one size."""

    padding_top: int = 0
    padding_bottom: int = 0
    padding_left: int = 0
    padding_right: int = 0
    pool_padding_top: int = 0
    pool_padding_bottom: int = 0
    pool_padding_left: int = 0
    pool_padding_right: int = 0


class TrainSettings(NamedTuple):
    """What the passes of training are told beside the tensors."""

    batch: int
    height: int
    width: int
    out_height: int
    out_width: int
    stride: int
    padding_top: int
    padding_left: int
    in_channels: int
    wide_channels: int
    out_channels: int
    expand_activation: str
    depthwise_activation: str
    pre_norm_eps: float
    expand_norm_eps: float
    depthwise_norm_eps: float
    pre_norm_mode: str  # "absent", "frozen" or "measured"
    expand_norm_mode: str
    depthwise_norm_mode: str
    wide_dtype: torch.dtype  # of the wide tensors that are kept


def block_tensors(parameters: MBConvParameters) -> list[Tensor | None]:
    """In the order of BLOCK_TENSORS."""
    tensors: list[Tensor | None] = []
    for field in parameters:
        if isinstance(field, NormParameters):
            tensors += field[:4]
        else:
            tensors.append(field)
    return tensors


def bottleneck_tensors(parameters: MBConvParameters) -> list[Tensor | None]:
    """Without project_norm and what follows it."""
    return block_tensors(parameters)[:_BOTTLENECK_TENSORS]


def eps_of(norm: Norm | None) -> float:
    return 0.0 if norm is None else norm.eps


def block_settings(description: MBConvDescription) -> BlockSettings:
    gate, pool = description.squeeze_excite, description.pool
    return BlockSettings(
        stride=description.stride,
        expand_activation=description.expand_activation,
        depthwise_activation=description.depthwise_activation,
        se_activation=gate.activation if gate else "identity",
        pre_norm_eps=eps_of(description.pre_norm),
        expand_norm_eps=eps_of(description.expand_norm),
        depthwise_norm_eps=eps_of(description.depthwise_norm),
        project_norm_eps=eps_of(description.project_norm),
        residual=description.residual,
        pool_kind=pool.kind if pool else "",
        pool_kernel_size=pool.kernel_size if pool else 1,
        pool_stride=pool.stride if pool else 1,
        pool_count_include_pad=pool.count_include_pad if pool else False,
    )


def block_padding(description: MBConvDescription, height: int, width: int) -> BlockPadding:
    """For a map of `height` x `width`."""
    padding = resolve_padding(description.padding, height, width, KERNEL_SIZE, description.stride)
    pool = description.pool
    if pool is None:
        return BlockPadding(*padding)
    size = (pool.kernel_size, pool.kernel_size)
    return BlockPadding(*padding, *resolve_padding(pool.padding, height, width, size, pool.stride))


@functools.lru_cache(maxsize=1024)
def eval_settings(description: MBConvDescription, height: int, width: int) -> tuple[Any, ...]:
    """The fields of both for a map of `height` x `width`."""
    return (*block_settings(description), *block_padding(description, height, width))
