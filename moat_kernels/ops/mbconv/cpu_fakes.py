"""Shapes of the native CPU ops' results, for torch.compile; csrc/cpu/mbconv_*.cpp has the ops.

`geometry`: batch, height, width, out height, out width, stride, top, left, C_in, E, C_out.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from moat_kernels.extension import load_extension
from moat_kernels.ops.mbconv.cpu_training import KERNEL_SIZE, WIDE_CHANNELS, padded_wide
from moat_kernels.ops.spatial import output_size


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


def _panelled(channels: int) -> int:
    """Channels rounded up to the kernels' panels, whose width depends on the instruction set."""
    panel = {"baseline": 8, "avx2": 16, "avx512": 32}[torch.ops.moat_kernels.cpu_isa()]
    return -(-channels // panel) * panel


def _wide(like: Tensor, geometry: list[int], pixels: int) -> Tensor:
    blocks = padded_wide(geometry[9]) // WIDE_CHANNELS
    return like.new_empty(geometry[0], blocks, pixels, WIDE_CHANNELS)


def _doubles(like: Tensor, *sizes: int) -> Tensor:
    return like.new_empty(*sizes, dtype=torch.float64)


def _groups(geometry: list[int]) -> int:
    blocks = padded_wide(geometry[9]) // WIDE_CHANNELS
    return max(min(-(-16 // blocks), geometry[0]), 1)


def _fake_moments(x: Tensor) -> Tensor:
    return _doubles(x, x.shape[0], 2, x.shape[3])


def _fake_rows(x: Tensor, shift: Any, scale: Any) -> Tensor:
    return x.new_empty(x.shape[0] * x.shape[1] * x.shape[2], _panelled(x.shape[3]))


def _fake_expand(
    rows: Tensor, weight: Tensor, measures: bool, geometry: list[int], activations: list[str]
) -> tuple[Tensor, ...]:
    pixels = geometry[1] * geometry[2]
    groups = min(geometry[0] * -(-pixels // 256), 16) if measures else 0
    sums = _doubles(rows, groups, 2, padded_wide(geometry[9]))
    return _wide(rows, geometry, pixels), sums


def _fake_depthwise(
    z1: Tensor,
    coefficients: Tensor,
    weights: Tensor,
    measures: bool,
    geometry: list[int],
    activations: list[str],
) -> tuple[Tensor, ...]:
    moments = _doubles(z1, geometry[0] if measures else 0, 2, padded_wide(geometry[9]))
    return _wide(z1, geometry, geometry[3] * geometry[4]), moments


def _fake_pool(
    z2: Tensor, coefficients: Tensor, geometry: list[int], activations: list[str]
) -> Tensor:
    return z2.new_empty(geometry[0], padded_wide(geometry[9]))


def _fake_project(
    z2: Tensor,
    coefficients: Tensor,
    gate: Tensor | None,
    weight: Tensor,
    bias: Any,
    scale: Any,
    addend: Any,
    geometry: list[int],
    activations: list[str],
) -> Tensor:
    return z2.new_empty(geometry[0], geometry[3], geometry[4], geometry[10])


def _fake_backward_project(
    grad_rows: Tensor,
    z2: Tensor,
    coefficients: Tensor,
    gate: Tensor | None,
    weight: Tensor,
    geometry: list[int],
    activations: list[str],
) -> tuple[Tensor, ...]:
    wide, groups = padded_wide(geometry[9]), _groups(geometry)
    return (
        torch.empty_like(z2),
        z2.new_empty(groups, wide, _panelled(geometry[10])),
        _doubles(z2, groups, 2, wide),
        z2.new_empty(0 if gate is None else geometry[0], wide),
    )


def _fake_backward_gate(
    dy2: Tensor,
    z2: Tensor,
    coefficients: Tensor,
    gate: Tensor | None,
    grad_mean: Tensor,
    geometry: list[int],
    activations: list[str],
) -> Tensor:
    return _doubles(z2, geometry[0], 2, padded_wide(geometry[9]))


def _fake_backward_depthwise(
    dy2: Tensor,
    z2: Tensor,
    z1: Tensor,
    coefficients: Tensor,
    weights: Tensor,
    geometry: list[int],
    activations: list[str],
) -> tuple[Tensor, ...]:
    wide = padded_wide(geometry[9])
    return (
        torch.empty_like(z1),
        _doubles(z1, geometry[0], 2, wide),
        _doubles(z1, geometry[0], 9, wide),
    )


def _fake_backward_expand_weight(
    dpre: Tensor,
    z1: Tensor,
    coefficients: Tensor,
    rows: Tensor,
    geometry: list[int],
    activations: list[str],
) -> Tensor:
    return z1.new_empty(_groups(geometry), padded_wide(geometry[9]), _panelled(geometry[8]))


def _fake_backward_expand_input(
    dpre: Tensor,
    z1: Tensor,
    coefficients: Tensor,
    weight: Tensor,
    rows: Tensor,
    factor: Tensor,
    offset: Tensor,
    addend: Any,
    geometry: list[int],
    activations: list[str],
) -> Tensor:
    return z1.new_empty(geometry[0], geometry[1], geometry[2], geometry[8])


def register_fakes() -> None:
    """Once a process, if the native ops exist."""
    if not load_extension().usable:
        return
    fakes: dict[str, Callable[..., Any]] = {
        "eval": _fake_eval,
        "moments": _fake_moments,
        "rows": _fake_rows,
        "expand": _fake_expand,
        "depthwise": _fake_depthwise,
        "pool": _fake_pool,
        "project": _fake_project,
        "backward_project": _fake_backward_project,
        "backward_gate": _fake_backward_gate,
        "backward_depthwise": _fake_backward_depthwise,
        "backward_expand_weight": _fake_backward_expand_weight,
        "backward_expand_input": _fake_backward_expand_input,
    }
    for name, fake in fakes.items():
        torch.library.register_fake(f"moat_kernels::cpu_mbconv_{name}", fake)
