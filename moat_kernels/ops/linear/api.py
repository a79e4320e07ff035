"""Whether a linear layer is computed natively, and its autograd function."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from moat_kernels.ops.common.autocast import autocast_dtype
from moat_kernels.ops.common.backends import choose_backend, is_exporting
from moat_kernels.ops.common.checks import check_devices
from moat_kernels.ops.linear import cpu


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x weight^T + bias; native where cpu.py covers it."""
    backend = "reference" if is_exporting() else _choose(x, weight, bias)
    if backend == "reference":
        check_devices("linear", x, {"weight": weight, "bias": bias})
        return F.linear(x, weight, bias)
    dtype = autocast_dtype(x) or x.dtype
    if torch.is_grad_enabled() and any(
        t is not None and t.requires_grad for t in (x, weight, bias)
    ):
        return _Linear.apply(x, weight, bias, dtype)
    return cpu.forward(x.to(dtype), weight, bias)


def _choose(x: Tensor, weight: Tensor, bias: Tensor | None) -> str:
    return choose_backend(
        "linear",
        x.device,
        {"cpu": cpu},
        lambda candidate: candidate.unsupported(x, weight, bias),
        optional=True,
    )


class _Linear(torch.autograd.Function):
    """Saves x, in the dtype that is multiplied, and the weight, as stock does."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype
    ) -> Tensor:
        ctx.input_dtype = x.dtype
        x = x.to(dtype)
        ctx.save_for_backward(x, weight)
        return cpu.forward(x, weight, bias)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        needs = ctx.needs_input_grad[:3]
        gradients = cpu.backward(grad, x, weight, ctx.input_dtype, needs[0], any(needs[1:]))
        return *(g if needed else None for g, needed in zip(gradients, needs, strict=True)), None
