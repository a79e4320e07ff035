"""The CUDA ops, run on the host, with valid arguments, for `support.wrong_arguments`."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from moat_kernels.ops.mbconv.triton import cuda_kernels  # noqa: F401  defines the ops
from support import cuda_on_cpu
from support.wrong_arguments import Call, exact, with_fields


def randn(*sizes: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return exact(torch.randn(sizes)).to(dtype)


def activate(x: Tensor, name: str) -> Tensor:
    return F.gelu(x) if name == "gelu" else x


def convolve(y: Tensor, taps: Tensor, geometry: list[int]) -> Tensor:
    """Depthwise, of a map [B, H, W, E] by taps [9, E]; the result has geometry's size."""
    out_height, out_width, stride, top, left = geometry
    bottom = (out_height - 1) * stride + 3 - top - y.shape[1]
    right = (out_width - 1) * stride + 3 - left - y.shape[2]
    padded = F.pad(y.permute(0, 3, 1, 2), (left, right, top, bottom))
    kernel = taps.t().reshape(-1, 1, 3, 3)
    return F.conv2d(padded, kernel, stride=stride, groups=kernel.shape[0]).permute(0, 2, 3, 1)


def scaled(z: Tensor, affine: Tensor | None) -> Tensor:
    if affine is not None and affine.shape != (2, z.shape[-1]):
        raise ValueError("affine is of other channels")
    return z if affine is None else z * affine[0] + affine[1]


def depthwise(
    z: Tensor, affine: Any, activation: str, taps: Tensor, bias: Any, output: str, *settings: Any
) -> list[Tensor | None]:
    y = activate(scaled(z, affine), activation)
    result = convolve(y, taps, settings[0])
    if bias is not None and bias.shape != result.shape[3:]:
        raise ValueError("bias is of other channels")
    return [activate(result if bias is None else result + bias, output), None]


def depthwise_backward(
    dy2: Tensor, z2: Any, factors: Any, z1: Tensor, affine: Any, activation: str, *rest: Any
) -> list[Tensor | None]:
    taps, geometry, *_ = rest
    y1 = scaled(z1, affine).detach().requires_grad_()
    gradient = dy2 if z2 is None else factors[0] * dy2 + factors[1] * z2 + factors[2]
    output = convolve(activate(y1, activation), taps, geometry)
    return [torch.autograd.grad(output, y1, gradient)[0], None]


def expand(x: Tensor, weight: Tensor, bias: Any, activation: str, *rest: Any) -> list[Any]:
    return depthwise(F.linear(x, weight, bias), None, activation, *rest)[:1]


def calls() -> list[Call]:
    cuda_on_cpu.load()
    ops = torch.ops.moat_kernels
    channels, wide, geometry = 16, 24, [3, 4, 2, 0, 1]
    z1, z2, dy2 = randn(2, 6, 7, wide), randn(2, 3, 4, wide), randn(2, 3, 4, wide)
    affine, factors, taps, bias = randn(2, wide), randn(3, wide), randn(9, wide), randn(wide)
    x, weight = (
        randn(*sizes, dtype=torch.bfloat16) for sizes in ((2, 6, 7, channels), (wide, channels))
    )
    return [
        Call(
            "cuda_depthwise_forward",
            with_fields(ops.cuda_depthwise_forward),
            [z1, affine, "gelu", taps, bias, "gelu", geometry, True, 4, 3],
            depthwise,
        ),
        Call(
            "cuda_depthwise_backward",
            with_fields(ops.cuda_depthwise_backward),
            [dy2, z2, factors, z1, affine, "gelu", taps, geometry, 4, 3],
            depthwise_backward,
        ),
        Call(
            "cuda_expand_depthwise",
            with_fields(ops.cuda_expand_depthwise),
            [x, weight, bias, "gelu", taps, bias, "identity", geometry],
            expand,
        ),
    ]
