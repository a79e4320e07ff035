"""Shapes of the native CPU ops' results, for torch.compile; csrc/cpu/host has the ops.

`geometry`: batch, height, width, out height, out width, stride, top, left, C_in, E, C_out.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from moat_kernels.extension import load_extension
from moat_kernels.ops.common.registration import register_fake
from moat_kernels.ops.common.spatial import output_size
from moat_kernels.ops.mbconv.algebra.coverage import KERNEL_SIZE
from moat_kernels.ops.mbconv.cpu.training import WIDE_CHANNELS, padded_wide


def _fake_eval(
    x: Tensor,
    convolutions: Any,
    norms: Any,
    scale: Any,
    eps: Any,
    stride: Any,
    padding: Any,
    acts: Any,
    residual: Any,
    kind: Any,
    pool: Any,
    dtype: Any,
) -> Tensor:
    top, bottom, left, right = padding
    return torch.empty(
        x.shape[0],
        convolutions[2].shape[0],
        output_size(x.shape[2], top, bottom, KERNEL_SIZE[0], stride),
        output_size(x.shape[3], left, right, KERNEL_SIZE[1], stride),
        dtype=dtype,
        device=x.device,
        memory_format=torch.channels_last,
    )


def _wide(like: Tensor, geometry: list[int], pixels: int, dtype: torch.dtype) -> Tensor:
    blocks = padded_wide(geometry[9]) // WIDE_CHANNELS
    return like.new_empty(geometry[0], blocks, pixels, WIDE_CHANNELS, dtype=dtype)


def _statistics_size(geometry: list[int]) -> int:
    return 2 * geometry[8] + 4 * geometry[9]


def _fake_front(
    x: Tensor,
    statistics: Tensor | None,
    keep_z1: bool,
    dtype: torch.dtype,
    weights: Any,
    norms: Any,
    eps: Any,
    modes: Any,
    geometry: list[int],
    activations: Any,
) -> tuple[Tensor, ...]:
    z1 = _wide(x, geometry, geometry[1] * geometry[2], dtype) if keep_z1 else x.new_empty(0)
    size = _statistics_size(geometry) if statistics is None else 0
    return (
        z1,
        _wide(x, geometry, geometry[3] * geometry[4], dtype),
        x.new_empty(size, dtype=torch.float64),
        x.new_empty(size),
    )


def _fake_pool(z2: Tensor, statistics: Tensor, *settings: Any) -> Tensor:
    geometry = settings[4]
    return statistics.new_empty(geometry[0], padded_wide(geometry[9]), dtype=torch.float32)


def _fake_project(
    z2: Tensor, statistics: Tensor, gate: Any, scale: Any, addend: Any, *settings: Any
) -> Tensor:
    geometry = settings[4]
    sizes = (geometry[0], geometry[3], geometry[4], geometry[10])
    return statistics.new_empty(sizes, dtype=torch.float32)


def _fake_backward_gated(
    grad: Tensor, z2: Tensor, statistics: Tensor, gate: Tensor, scale: Any, *settings: Any
) -> tuple[Tensor, ...]:
    geometry = settings[4]
    wide, out_channels = geometry[9], geometry[10]
    return (
        torch.empty_like(z2, dtype=torch.float32),
        grad.new_empty(out_channels, wide),
        grad.new_empty(out_channels),
        torch.empty_like(gate),
    )


def _fake_backward(
    grad: Tensor,
    x: Tensor,
    z1: Any,
    z2: Any,
    gated_gradient: Tensor | None,
    gate: Any,
    grad_mean: Any,
    statistics: Any,
    scale: Any,
    addend: Any,
    needs_input: bool,
    *settings: Any,
) -> list[Tensor]:
    channels, wide, out_channels = settings[4][8:11]
    gated = gated_gradient is not None
    return [
        torch.empty_like(x) if needs_input else x.new_empty(0),
        *(x.new_empty(wide, channels), x.new_empty(wide)),
        *(x.new_empty(wide, 9), x.new_empty(wide)),
        x.new_empty(0) if gated else x.new_empty(out_channels, wide),
        x.new_empty(0) if gated else x.new_empty(out_channels),
        *(x.new_empty(size) for size in (channels, channels, wide, wide, wide, wide)),
    ]


def register_fakes() -> None:
    """Once a process, if the native ops exist."""
    if not load_extension().usable:
        return
    fakes: dict[str, Callable[..., Any]] = {
        "eval": _fake_eval,
        "train_front": _fake_front,
        "train_pool": _fake_pool,
        "train_project": _fake_project,
        "train_backward_gated": _fake_backward_gated,
        "train_backward": _fake_backward,
    }
    for name, fake in fakes.items():
        register_fake(f"cpu_mbconv_{name}", fake)
