"""The inverted bottleneck's stencil passes in stock operations, and maps that are hard to tile."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from moat_kernels.ops.common.activations import activate
from moat_kernels.ops.common.spatial import output_size, pad_map, resolve_padding


@dataclass(frozen=True)
class Map:
    """A map before and after the depthwise convolution; see ops/mbconv/algebra/geometry.py."""

    batch: int
    height: int
    width: int
    stride: int
    padding: tuple[int, int, int, int]

    @property
    def top(self) -> int:
        return self.padding[0]

    @property
    def left(self) -> int:
        return self.padding[2]

    @property
    def out_height(self) -> int:
        return output_size(self.height, *self.padding[:2], 3, self.stride)

    @property
    def out_width(self) -> int:
        return output_size(self.width, *self.padding[2:], 3, self.stride)


def make_map(batch: int, height: int, width: int, stride: int, padding="tf_same") -> Map:
    return Map(
        batch, height, width, stride, resolve_padding(padding, height, width, (3, 3), stride)
    )


MAPS = {
    "one pixel": make_map(1, 1, 1, 1),
    "narrow": make_map(3, 7, 7, 1),
    "two tiles wide": make_map(2, 9, 17, 1),
    "many tiles": make_map(1, 19, 35, 1, (2, 0, 1, 3)),
    "stride 2": make_map(2, 14, 13, 2),
    "stride 2, many tiles": make_map(1, 21, 37, 2, (1, 1, 1, 1)),
    "stride 2, padded far": make_map(1, 5, 6, 2, (3, 2, 4, 1)),
}


@dataclass(frozen=True)
class Tensors:
    """Arguments of the passes, as cuda_kernels takes them; wide ones in the dtype under test."""

    z1: Tensor
    grad: Tensor
    z2: Tensor
    affine: Tensor
    taps: Tensor
    bias: Tensor
    factors: Tensor

    def to(self, dtype: torch.dtype) -> Tensors:
        return Tensors(**{name: tensor.to(dtype) for name, tensor in vars(self).items()})


def make_tensors(stencil: Map, channels: int, dtype: torch.dtype, device: str = "cpu") -> Tensors:
    rows_in = stencil.batch * stencil.height * stencil.width
    rows_out = stencil.batch * stencil.out_height * stencil.out_width
    # A mean well above the deviation, which careless statistics would lose.
    offset = 3 * torch.randn(channels)
    tensors = {
        "z1": (torch.randn(rows_in, channels) + offset).to(dtype),
        "grad": torch.randn(rows_out, channels).to(dtype),
        "z2": torch.randn(rows_out, channels).to(dtype),
        "affine": torch.stack((1 + 0.3 * torch.randn(channels), 0.5 * torch.randn(channels))),
        "taps": torch.randn(9, channels) / 3,
        "bias": torch.randn(channels),
        "factors": torch.randn(3, channels),
    }
    return Tensors(**{name: tensor.to(device) for name, tensor in tensors.items()})


def reference_forward(
    z1: Tensor,
    affine: Tensor | None,
    activation: str,
    taps: Tensor,
    bias: Tensor | None,
    output_activation: str,
    stencil: Map,
) -> Tensor:
    """What cuda_kernels.depthwise computes, in the dtype of the arguments."""
    y1 = z1 if affine is None else z1 * affine[0] + affine[1]
    maps = activate(activation, y1).view(stencil.batch, stencil.height, stencil.width, -1)
    maps = pad_map(maps.permute(0, 3, 1, 2), stencil.padding)
    channels = taps.shape[1]
    weight = taps.t().reshape(channels, 1, 3, 3)
    z2 = F.conv2d(maps, weight, bias, stencil.stride, groups=channels)
    return activate(output_activation, z2.permute(0, 2, 3, 1).reshape(-1, channels))


def reference_backward(
    tensors: Tensors, activation: str, with_norms: bool, stencil: Map
) -> tuple[Tensor, Tensor]:
    """What cuda_kernels.depthwise_backward computes, in the dtype of the arguments."""
    grad, y1 = tensors.grad, tensors.z1
    if with_norms:
        factors = tensors.factors
        grad = grad * factors[0] + tensors.z2 * factors[1] + factors[2]
        y1 = y1 * tensors.affine[0] + tensors.affine[1]
    y1, taps = y1.detach().requires_grad_(), tensors.taps.detach().requires_grad_()
    z2 = reference_forward(y1, None, activation, taps, None, "identity", stencil)
    z2.backward(grad)
    assert y1.grad is not None and taps.grad is not None
    sums = torch.stack((y1.grad.sum(0), (y1.grad * tensors.z1).sum(0)))
    return y1.grad, torch.cat((taps.grad, sums))
