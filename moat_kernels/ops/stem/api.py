"""The stem: which of its forms kernels compute, the calls, and the autograd function of training.

In training, between the passes, only the first convolution's output, the batch's statistics and, as
the second convolution's input, GELU's output are kept; with `recompute` not even that one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from moat_kernels.ops.common.autocast import autocast_dtype
from moat_kernels.ops.common.backends import (
    choose_backend,
    is_eager,
    is_exporting,
    needs_standard_operators,
)
from moat_kernels.ops.common.batch_norm import Norm, NormParameters, update_norm
from moat_kernels.ops.stem import cpu


def covers(
    x: Tensor,
    first: Sequence[Tensor | None],
    norm: NormParameters,
    second: Sequence[Tensor | None],
) -> bool:
    """Whether `stem` computes this call: inference in float32, 3x3 kernels that fit x.

    Eager or exported; compilers do as well with stock operators.
    """
    if is_exporting():
        return not needs_standard_operators() and _is_native(x, first, norm, second, False)
    tensors = (x, *first, *norm[:4], *second)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors):
        return False
    return _is_plain_call(x) and _is_native(x, first, norm, second, False)


def covers_training(
    x: Tensor,
    first: Sequence[Tensor | None],
    norm: Norm,
    parameters: NormParameters,
    second: Sequence[Tensor | None],
) -> bool:
    """Whether `norm_gelu_conv` computes the stem of x [B, C_in, H, W] after its first convolution.

    Arguments as in `stem`. Synchronised norms and empty batches are not covered.
    """
    return (
        norm.process_group is None
        and _is_plain_call(x)
        and x.numel() > 0
        and _is_native(x, first, parameters, second, True)
    )


def covers_compiled_training(
    x: Tensor, first: Sequence[Tensor | None], second: Sequence[Tensor | None]
) -> bool:
    """Whether a compiled step's convolutions are to be operators of their own: see convolution.py.

    Arguments as in `stem`.
    """
    given = [tensor for tensor in (*first, *second) if tensor is not None]
    return (
        torch.compiler.is_dynamo_compiling()
        and not is_exporting()
        and torch.is_grad_enabled()
        and first[0] is not None
        and second[0] is not None
        and (autocast_dtype(x) is not None or all(t.dtype == x.dtype for t in given))
    )


def _is_plain_call(x: Tensor) -> bool:
    """Whether nobody traces or transforms the call."""
    return is_eager() and type(x) is Tensor


def _is_native(
    x: Tensor,
    first: Sequence[Tensor | None],
    norm: NormParameters,
    second: Sequence[Tensor | None],
    training: bool,
) -> bool:
    backend = choose_backend(
        "stem",
        x.device,
        {"cpu": cpu},
        lambda candidate: candidate.unsupported(x, first, norm, second, training),
        optional=True,
    )
    return backend != "reference"


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
    return cpu.evaluate(x, first, norm, eps, second)


def norm_gelu_conv(
    z: Tensor,
    norm: Norm,
    parameters: NormParameters,
    second: Sequence[Tensor | None],
    recompute: bool,
) -> Tensor:
    """conv3x3(gelu(norm(z))): [B, C, H, W] -> [B, C, H, W]; updates the running statistics.

    z: what the first convolution gave, under autocast in its dtype. second: (weight [C, C, 3, 3],
    bias [C]). recompute: whether backward computes GELU's output again instead of keeping it.
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
        activated, statistics = cpu.norm_gelu(rows, weight, bias, given, eps)
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
            activated, _ = cpu.norm_gelu(rows, weight, bias, statistics, ctx.eps)
        needs = ctx.needs_input_grad[:5]
        grad_activated, *gradients = torch.ops.aten.convolution_backward(
            grad,
            activated.permute(0, 3, 1, 2),
            conv_weight.to(activated.dtype),
            bias_sizes=[conv_weight.shape[0]] if ctx.has_bias else None,
            stride=[1, 1],
            padding=[1, 1],
            dilation=[1, 1],
            transposed=False,
            output_padding=[0, 0],
            groups=1,
            output_mask=[any(needs[:3]), *needs[3:]],
        )
        conv_gradients = [g if g is None else g.to(conv_weight.dtype) for g in gradients]
        if not any(needs[:3]):
            return *[None] * 3, *conv_gradients, *[None] * 3
        grad_rows = grad_activated.permute(0, 2, 3, 1).contiguous()
        # Nobody else has grad_rows: the op overwrites it.
        grad_weight, grad_bias = cpu.norm_gelu_backward(
            grad_rows, rows, weight, bias, statistics, ctx.eps, ctx.frozen
        )
        return (
            grad_rows.permute(0, 3, 1, 2) if needs[0] else None,
            grad_weight if needs[1] else None,
            grad_bias if needs[2] else None,
            *conv_gradients,
            *[None] * 3,
        )
