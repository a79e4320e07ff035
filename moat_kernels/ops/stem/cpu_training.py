"""The stem's training on a CPU: its norm and GELU by native kernels between stock convolutions.

Batch norm and GELU are one op (csrc/cpu/host/stem_train.cpp). Between the passes only the first
convolution's output, the batch's statistics and, as the second convolution's input, GELU's output
are kept; with `recompute` not even that one. Only float32 is covered.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from moat_kernels.extension import load_extension
from moat_kernels.ops.common.registration import register_fake
from moat_kernels.ops.mbconv.algebra.running_statistics import update_norm
from moat_kernels.ops.mbconv.description import Norm, NormParameters
from moat_kernels.ops.stem.cpu import is_native


def covers(
    x: Tensor,
    first: Sequence[Tensor | None],
    norm: Norm,
    parameters: NormParameters,
    second: Sequence[Tensor | None],
) -> bool:
    """Whether `norm_gelu_conv` computes the stem of x [B, C_in, H, W] after its first convolution.

    Arguments as in `stem.stem`. Synchronised norms and empty batches are not covered.
    """
    return norm.process_group is None and is_native(x, first, parameters, second) and x.numel() > 0


def norm_gelu_conv(
    z: Tensor,
    norm: Norm,
    parameters: NormParameters,
    second: Sequence[Tensor | None],
    recompute: bool,
) -> Tensor:
    """conv3x3(gelu(norm(z))): [B, C, H, W] -> [B, C, H, W]; updates the running statistics.

    second: (weight [C, C, 3, 3], bias [C]). recompute: whether backward computes GELU's output
    again instead of keeping it.
    """
    running_mean, running_var = parameters.running_mean, parameters.running_var
    given = None
    if norm.frozen:
        assert running_mean is not None and running_var is not None
        given = torch.stack((running_mean, running_var)).double()
    output, statistics = _NormGeluConv.apply(
        z, parameters.weight, parameters.bias, *second, given, norm.eps, recompute
    )
    if not norm.frozen:
        mean, variance = statistics.float().unbind()
        update_norm(norm, parameters, mean, variance, z.numel() // z.shape[1])
    return output


class _NormGeluConv(torch.autograd.Function):
    """Saves z, the statistics, the parameters and, unless it recomputes that, GELU's output."""

    @staticmethod
    def forward(
        ctx: Any,
        z: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        conv_weight: Tensor,
        conv_bias: Tensor | None,
        given: Tensor | None,
        eps: float,
        recompute: bool,
    ) -> tuple[Tensor, Tensor]:
        rows = z.permute(0, 2, 3, 1).contiguous()
        weight, bias = (None if t is None else t.contiguous() for t in (weight, bias))
        activated, statistics = _norm_gelu(rows, weight, bias, given, eps)
        output = F.conv2d(activated.permute(0, 3, 1, 2), conv_weight, conv_bias, padding=1)
        kept = None if recompute else activated
        ctx.save_for_backward(rows, weight, bias, conv_weight, statistics, kept)
        ctx.eps, ctx.frozen, ctx.has_bias = eps, given is not None, conv_bias is not None
        ctx.mark_non_differentiable(statistics)
        return output, statistics

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor, _: Any) -> tuple[Tensor | None, ...]:
        rows, weight, bias, conv_weight, statistics, activated = ctx.saved_tensors
        if activated is None:
            activated, _ = _norm_gelu(rows, weight, bias, statistics, ctx.eps)
        needs = ctx.needs_input_grad[:5]
        grad_activated, *conv_gradients = torch.ops.aten.convolution_backward(
            grad,
            activated.permute(0, 3, 1, 2),
            conv_weight,
            bias_sizes=[conv_weight.shape[0]] if ctx.has_bias else None,
            stride=[1, 1],
            padding=[1, 1],
            dilation=[1, 1],
            transposed=False,
            output_padding=[0, 0],
            groups=1,
            output_mask=[any(needs[:3]), *needs[3:]],
        )
        if not any(needs[:3]):
            return *[None] * 3, *conv_gradients, *[None] * 3
        grad_rows = grad_activated.permute(0, 2, 3, 1).contiguous()
        # Nobody else has grad_rows: the op overwrites it.
        grad_weight, grad_bias = torch.ops.moat_kernels.cpu_stem_train_backward.default(
            grad_rows, rows, weight, bias, statistics, ctx.eps, ctx.frozen
        )
        return (
            grad_rows.permute(0, 3, 1, 2) if needs[0] else None,
            grad_weight if needs[1] else None,
            grad_bias if needs[2] else None,
            *conv_gradients,
            *[None] * 3,
        )


def _norm_gelu(
    rows: Tensor, weight: Tensor | None, bias: Tensor | None, given: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    """gelu(norm(rows)) [B, H, W, C], and the statistics: those given, or measured.

    Statistics are mean and biased variance [2, C] in float64.
    """
    return torch.ops.moat_kernels.cpu_stem_train_forward.default(rows, weight, bias, given, eps)


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


if load_extension().usable:
    register_fake("cpu_stem_train_forward", _fake_forward)
    register_fake("cpu_stem_train_backward", _fake_backward)
