"""The stem by native CPU kernels: one pass without gradients, norm and GELU in training.

Two 3x3 convolutions with TF SAME padding, the first of stride 2, with batch norm and GELU between.
Without gradients and with fixed statistics that is one op, from the image to the output. In
training batch norm and GELU are one op (csrc) between stock convolutions. Parameters and images are
in float32; in training autocast may ask for maps in another dtype.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from moat_kernels.extension import load_extension
from moat_kernels.ops.common.autocast import autocast_dtype
from moat_kernels.ops.common.batch_norm import NormParameters
from moat_kernels.ops.common.flops import Shape, convolution_flops, register_flops
from moat_kernels.ops.common.registration import register_fake


def unsupported(
    x: Tensor,
    first: Sequence[Tensor | None],
    norm: NormParameters,
    second: Sequence[Tensor | None],
    training: bool,
) -> str:
    """Why this backend does not cover a call; empty: it does. Arguments as of `stem`."""
    if x.device.type != "cpu":
        return f"tensors on {x.device}"
    tensors = [x, *(tensor for tensor in (*first, *norm[:4], *second) if tensor is not None)]
    if any(t.dtype != torch.float32 or t.device != x.device for t in tensors):
        return "another dtype than float32, or several devices"
    if not training and autocast_dtype(x) is not None:
        return "autocast"
    if x.dim() != 4 or min(x.shape[2:]) < 1:
        return f"x of {tuple(x.shape)}"
    if not fits(x.shape[1], first, norm, second):
        return "convolutions that are not 3x3 or do not fit x"
    return ""


def fits(
    in_channels: int,
    first: Sequence[Tensor | None],
    norm: NormParameters,
    second: Sequence[Tensor | None],
) -> bool:
    """Whether the native kernel has convolutions and a norm of such tensors."""
    if first[0] is None or second[0] is None or not first[0].numel():
        return False
    channels, outputs = first[0].shape[0], second[0].shape[0]
    vectors = (first[1], *norm[:4])
    return (
        outputs > 0
        and first[0].shape == (channels, in_channels, 3, 3)
        and second[0].shape == (outputs, channels, 3, 3)
        and all(tensor is None or tensor.shape == (channels,) for tensor in vectors)
        and (second[1] is None or second[1].shape == (outputs,))
    )


def evaluate(
    x: Tensor,
    first: Sequence[Tensor | None],
    norm: NormParameters,
    eps: float,
    second: Sequence[Tensor | None],
) -> Tensor:
    """See api.stem."""
    return torch.ops.moat_kernels.cpu_stem_eval.default(x, *first, *norm[:4], *second, eps)


def norm_gelu(
    rows: Tensor, weight: Tensor | None, bias: Tensor | None, given: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    """gelu(norm(rows)) [B, H, W, C], and the statistics: those given, or measured.

    Statistics are mean and biased variance [2, C] in float64.
    """
    return torch.ops.moat_kernels.cpu_stem_train_forward.default(rows, weight, bias, given, eps)


def norm_gelu_backward(
    grad: Tensor,
    rows: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    statistics: Tensor,
    eps: float,
    frozen: bool,
) -> tuple[Tensor, Tensor]:
    """Gradients of weight and bias; that of rows takes the place of `grad`, gelu's."""
    return torch.ops.moat_kernels.cpu_stem_train_backward.default(
        grad, rows, weight, bias, statistics, eps, frozen
    )


def _fake_evaluate(x: Tensor, *tensors: Any) -> Tensor:
    conv_1_weight = tensors[6]
    return torch.empty(
        x.shape[0],
        conv_1_weight.shape[0],
        (x.shape[2] + 1) // 2,
        (x.shape[3] + 1) // 2,
        dtype=x.dtype,
        device=x.device,
        memory_format=torch.channels_last,
    )


def _fake_forward(
    z: Tensor, weight: Tensor | None, bias: Tensor | None, statistics: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(z), z.new_empty(2, z.shape[3], dtype=torch.float64)


def _fake_backward(
    grad: Tensor,
    z: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    statistics: Tensor,
    eps: float,
    frozen: bool,
) -> tuple[Tensor, Tensor]:
    return z.new_empty(z.shape[3]), z.new_empty(z.shape[3])


def _evaluate_flops(
    x: Shape, first: Shape, first_bias: object, *norm_and_second: Any, out_shape: Shape, **_: object
) -> int:
    second = norm_and_second[4]
    return convolution_flops(first, out_shape) + convolution_flops(second, out_shape)


if load_extension().usable:
    register_fake("cpu_stem_eval", _fake_evaluate)
    register_fake("cpu_stem_train_forward", _fake_forward)
    register_fake("cpu_stem_train_backward", _fake_backward)
    register_flops("cpu_stem_eval", _evaluate_flops)
