"""Shapes of the native CPU ops' results, for torch.compile; csrc/cpu/host has the ops.

Also the FLOPs of the one that exported programs call. A fake gets an op's arguments by the names
that its schema gives them.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from moat_kernels.extension import load_extension
from moat_kernels.ops.common.flops import register_flops
from moat_kernels.ops.common.registration import register_fake
from moat_kernels.ops.common.spatial import output_size
from moat_kernels.ops.mbconv.algebra.coverage import KERNEL_SIZE
from moat_kernels.ops.mbconv.cpu.training import WIDE_CHANNELS, padded_wide, product_dtype
from moat_kernels.ops.mbconv.description import PARAMETER_NAMES, MBConvDescription
from moat_kernels.ops.mbconv.flops import forward_flops


def _fake_eval(given: SimpleNamespace) -> Tensor:
    batch, _, height, width = given.x.shape
    vertical, horizontal = (
        (given.padding_top, given.padding_bottom),
        (given.padding_left, given.padding_right),
    )
    return torch.empty(
        batch,
        given.project_weight.shape[0],
        output_size(height, *vertical, KERNEL_SIZE[0], given.stride),
        output_size(width, *horizontal, KERNEL_SIZE[1], given.stride),
        dtype=given.dtype,
        device=given.x.device,
        memory_format=torch.channels_last,
    )


def _wide(like: Tensor, given: SimpleNamespace, pixels: int, dtype: torch.dtype) -> Tensor:
    blocks = padded_wide(given.wide_channels) // WIDE_CHANNELS
    return like.new_empty(given.batch, blocks, pixels, WIDE_CHANNELS, dtype=dtype)


def _fake_front(given: SimpleNamespace) -> tuple[Tensor, ...]:
    x, in_pixels = given.x, given.height * given.width
    size = 0
    if given.statistics is None:
        size = 2 * given.in_channels + 4 * given.wide_channels
    return (
        _wide(x, given, in_pixels, given.wide_dtype) if given.keep_z1 else x.new_empty(0),
        _wide(x, given, given.out_height * given.out_width, given.wide_dtype),
        x.new_empty(size, dtype=torch.float64),
        x.new_empty(size, dtype=torch.float32),
    )


def _fake_pool(given: SimpleNamespace) -> Tensor:
    sizes = (given.batch, padded_wide(given.wide_channels))
    return given.statistics.new_empty(sizes, dtype=torch.float32)


def _fake_project(given: SimpleNamespace) -> Tensor:
    sizes = (given.batch, given.out_height, given.out_width, given.out_channels)
    return given.statistics.new_empty(sizes, dtype=given.dtype)


def _fake_backward_gated(given: SimpleNamespace) -> tuple[Tensor, ...]:
    floats = given.gate.new_empty
    return (
        torch.empty_like(given.z2, dtype=product_dtype(given.wide_dtype)),
        floats(given.out_channels, given.wide_channels),
        floats(given.out_channels),
        torch.empty_like(given.gate),
    )


def _fake_backward(given: SimpleNamespace) -> list[Tensor]:
    x, gated = given.x, given.gated_gradient is not None
    floats = functools.partial(x.new_empty, dtype=torch.float32)
    channels, wide, out_channels = given.in_channels, given.wide_channels, given.out_channels
    return [
        torch.empty_like(x) if given.needs_input else floats(0),
        *(floats(wide, channels), floats(wide)),
        *(floats(wide, 9), floats(wide)),
        floats(0) if gated else floats(out_channels, wide),
        floats(0) if gated else floats(out_channels),
        *(floats(size) for size in (channels, channels, wide, wide, wide, wide)),
    ]


def _eval_flops(given: SimpleNamespace) -> int:
    padding = (given.padding_top, given.padding_bottom, given.padding_left, given.padding_right)
    description = MBConvDescription(stride=given.stride, padding=padding)
    return forward_flops(given.x, [getattr(given, name) for name in PARAMETER_NAMES], description)


def _by_name(op: str, fake: Callable[[SimpleNamespace], Any]) -> Callable[..., Any]:
    schema = getattr(torch.ops.moat_kernels, op).default._schema
    names = [argument.name for argument in schema.arguments]

    def call(*arguments: Any, **_: Any) -> Any:
        return fake(SimpleNamespace(**dict(zip(names, arguments, strict=True))))

    return call


def register_fakes() -> None:
    """Once a process, if the native ops exist."""
    if not load_extension().usable:
        return
    fakes: dict[str, Callable[[SimpleNamespace], Any]] = {
        "eval": _fake_eval,
        "train_front": _fake_front,
        "train_pool": _fake_pool,
        "train_project": _fake_project,
        "train_backward_gated": _fake_backward_gated,
        "train_backward": _fake_backward,
    }
    for name, fake in fakes.items():
        op = f"cpu_mbconv_{name}"
        register_fake(op, _by_name(op, fake))
    register_flops("cpu_mbconv_eval", _by_name("cpu_mbconv_eval", _eval_flops))
