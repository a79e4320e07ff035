"""The stem's convolutions as operators of their own, for compiled training steps.

Inductor lowers the gradient of a stock convolution for one size of map, even where sizes are
symbols. It does not look into these, so that one graph serves maps of all sizes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from moat_kernels.ops.common.autocast import autocast_dtype, without_autocast
from moat_kernels.ops.common.flops import Shape, convolution_flops, weight_gradient_flops
from moat_kernels.ops.common.registration import define_op
from moat_kernels.ops.common.spatial import (
    ceil_divide,
    crop_map,
    pad_map,
    resolve_padding,
    split_padding,
)


def convolution(x: Tensor, tensors: Sequence[Tensor | None], stride: int) -> Tensor:
    """`SameConv2d` of x [B, C_in, H, W] without groups or dilation, in channels_last.

    tensors: weight [C, C_in, K, K], bias [C]. Under autocast in its dtype, else all are of one.
    """
    weight, bias = tensors
    assert weight is not None
    if (dtype := autocast_dtype(x)) is not None:
        x, weight, bias = x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
    output: Tensor = _Convolution.apply(x, weight, bias, stride)
    return output


class _Convolution(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, stride: int) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.stride = stride
        return torch.ops.moat_kernels.stem_convolution(x, weight, bias, stride)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        needs = ctx.needs_input_grad[:3]
        found = iter(
            torch.ops.moat_kernels.stem_convolution_backward(grad, x, weight, ctx.stride, needs)
        )
        return *[next(found) if needed else None for needed in needs], None


def _padded(x: Tensor, weight: Tensor, stride: int) -> tuple[Tensor, Any, tuple[int, int]]:
    """(x with what a convolution cannot pad by itself, that border, what it pads)."""
    kernel_size = (weight.shape[2], weight.shape[3])
    sides = resolve_padding("tf_same", x.shape[2], x.shape[3], kernel_size, stride)
    border, padding = split_padding(sides)
    return pad_map(x, border), border, padding


@without_autocast
def _forward(x: Tensor, weight: Tensor, bias: Tensor | None, stride: int) -> Tensor:
    padded, _, padding = _padded(x, weight, stride)
    output = F.conv2d(padded, weight, bias, stride, padding)
    return output.contiguous(memory_format=torch.channels_last)


@without_autocast
def _backward(
    grad: Tensor, x: Tensor, weight: Tensor, stride: int, needs: Sequence[bool]
) -> list[Tensor]:
    """The gradients that `needs` (x, weight, bias) asks for."""
    padded, border, padding = _padded(x, weight, stride)
    grad_x, grad_weight, grad_bias = torch.ops.aten.convolution_backward(
        *(grad, padded, weight, [weight.shape[0]], [stride, stride], padding),
        *([1, 1], False, [0, 0], 1, list(needs)),
    )
    found = []
    if needs[0]:
        found.append(_laid_out(crop_map(grad_x, border), x))
    if needs[1]:
        found.append(_laid_out(grad_weight, weight))
    if needs[2]:
        found.append(grad_bias)
    return found


def _laid_out(gradient: Tensor, source: Tensor) -> Tensor:
    """The gradient with the strides of torch.empty_like(source), as `_fake_backward` has it."""
    if gradient.stride() == torch.empty_like(source, device="meta").stride():
        return gradient
    return torch.empty_like(source).copy_(gradient)


def _fake_forward(x: Tensor, weight: Tensor, bias: Tensor | None, stride: int) -> Tensor:
    height, width = (ceil_divide(size, stride) for size in x.shape[2:])
    output = x.new_empty(x.shape[0], weight.shape[0], height, width)
    return output.contiguous(memory_format=torch.channels_last)


def _fake_backward(
    grad: Tensor, x: Tensor, weight: Tensor, stride: int, needs: Sequence[bool]
) -> list[Tensor]:
    found = [
        torch.empty_like(t) for t, needed in zip((x, weight), needs[:2], strict=True) if needed
    ]
    return [*found, weight.new_empty(weight.shape[0])] if needs[2] else found


def _forward_flops(x: Shape, weight: Shape, *_: Any, out_shape: Shape, **__: Any) -> int:
    return convolution_flops(weight, out_shape)


def _backward_flops(
    grad: Shape, x: Shape, weight: Shape, stride: int, needs: Sequence[bool], **_: Any
) -> int:
    of_x = convolution_flops(weight, grad) if needs[0] else 0
    return of_x + (weight_gradient_flops(x[1], weight, grad) if needs[1] else 0)


define_op(
    "stem_convolution(Tensor x, Tensor weight, Tensor? bias, int stride) -> Tensor",
    _forward,
    _fake_forward,
    _forward_flops,
)
# -> the gradients that `needs` asks for
define_op(
    "stem_convolution_backward(Tensor grad, Tensor x, Tensor weight, int stride, bool[] needs) "
    "-> Tensor[]",
    _backward,
    _fake_backward,
    _backward_flops,
)
