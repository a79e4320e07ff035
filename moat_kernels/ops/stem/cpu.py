"""The stem with fixed statistics by a native CPU kernel: one pass from the image to its output.

Two 3x3 convolutions with TF SAME padding, the first of stride 2, with batch norm and GELU between.
Only inference in float32 is covered; everything else is stock PyTorch.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from moat_kernels.extension import load_extension
from moat_kernels.ops.common.autocast import autocast_dtype
from moat_kernels.ops.common.backends import backend_status, is_eager, requested_backend
from moat_kernels.ops.common.registration import register_fake
from moat_kernels.ops.mbconv.description import NormParameters


def covers(
    x: Tensor,
    first: Sequence[Tensor | None],
    norm: NormParameters,
    second: Sequence[Tensor | None],
) -> bool:
    """Whether `stem` computes this call: eager inference in float32, 3x3 kernels that fit x."""
    tensors = (x, *first, *norm[:4], *second)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors):
        return False
    return is_native(x, first, norm, second)


def is_native(
    x: Tensor,
    first: Sequence[Tensor | None],
    norm: NormParameters,
    second: Sequence[Tensor | None],
) -> bool:
    """Whether native kernels can run and take the tensors: float32, 3x3 kernels that fit x."""
    tensors = [x, *(tensor for tensor in (*first, *norm[:4], *second) if tensor is not None)]
    return (
        is_eager()
        and type(x) is Tensor
        and x.device.type == "cpu"
        and requested_backend() in (None, "cpu")
        and backend_status()["cpu"].usable
        and autocast_dtype(x) is None
        and all(t.dtype == torch.float32 and t.device == x.device for t in tensors)
        and x.dim() == 4
        and min(x.shape[2:]) >= 1
        and fits(x.shape[1], first, norm, second)
    )


def fits(
    in_channels: int,
    first: Sequence[Tensor | None],
    norm: NormParameters,
    second: Sequence[Tensor | None],
) -> bool:
    """Whether the native kernel has convolutions and a norm of such tensors."""
    if first[0] is None or second[0] is None or not first[0].numel():
        return False
    channels = first[0].shape[0]
    vectors = (first[1], *norm[:4], second[1])
    return (
        first[0].shape == (channels, in_channels, 3, 3)
        and second[0].shape == (channels, channels, 3, 3)
        and all(tensor is None or tensor.shape == (channels,) for tensor in vectors)
    )


def stem(
    x: Tensor,
    first: Sequence[Tensor | None],
    norm: NormParameters,
    eps: float,
    second: Sequence[Tensor | None],
) -> Tensor:
    """conv3x3(gelu(norm(conv3x3 of stride 2(x)))): [B, C_in, H, W] -> [B, C, H', W'].

    first, second: (weight [C, C_in or C, 3, 3], bias [C]). H' = ceil(H / 2). x in any memory
    format, the result in channels_last.
    """
    return torch.ops.moat_kernels.cpu_stem_eval.default(x, *first, *norm[:4], *second, eps)


def _fake(x: Tensor, conv_0_weight: Tensor, *_: object) -> Tensor:
    return torch.empty(
        x.shape[0],
        conv_0_weight.shape[0],
        (x.shape[2] + 1) // 2,
        (x.shape[3] + 1) // 2,
        dtype=x.dtype,
        device=x.device,
        memory_format=torch.channels_last,
    )


if load_extension().usable:
    register_fake("cpu_stem_eval", _fake)
