"""A linear layer by native CPU kernels (csrc/cpu/host/linear.cpp), in float32.

Stock PyTorch computes it by MKL, which uses AVX2 at most on AMD's CPUs: on an EPYC with AVX-512 the
kernels take 0.46 times as long, with their AVX2 code 0.87 times (docs/cpu_kernels.md).
"""

from __future__ import annotations

import torch
from torch import Tensor

from moat_kernels.extension import load_extension
from moat_kernels.ops.common.autocast import autocast_dtype
from moat_kernels.ops.common.flops import Shape, linear_flops, register_flops
from moat_kernels.ops.common.registration import register_fake

# The widest vector of the kernels: rows of the operands are read without remainders.
MULTIPLE = 16
# With fewer, packing the weight takes longer than the faster product saves.
FEWEST_ROWS = 32


def _has_vectors() -> bool:
    if not load_extension().usable:
        return False
    try:
        return torch.ops.moat_kernels.cpu_isa() != "baseline"
    except RuntimeError:  # MOAT_KERNELS_CPU_ISA names none: every native op will say so
        return False


# Asked here rather than at the first call, which torch.compile may be tracing.
_VECTORS = _has_vectors()


def unsupported(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> str:
    """Why this backend does not cover a call; empty: it does.

    What does not fit together is not covered: stock raises the error.
    """
    if weight is None:
        return "a layer without weight"
    if any(t is not None and t.device.type != "cpu" for t in (x, weight, bias)):
        return "tensors that are not all on the CPU"
    if autocast_dtype(x) is not None:
        return "autocast"
    if weight.dim() != 2 or x.dim() < 1 or x.shape[-1] != weight.shape[1]:
        return f"x of {tuple(x.shape)} with a weight of {tuple(weight.shape)}"
    if bias is not None and bias.shape != weight.shape[:1]:
        return f"a bias of {tuple(bias.shape)}"
    if any(t is not None and t.dtype != torch.float32 for t in (x, weight, bias)):
        return "another dtype than float32"
    if x.numel() < FEWEST_ROWS * weight.shape[1]:
        return f"fewer than {FEWEST_ROWS} rows"
    if not weight.numel() or weight.shape[0] % MULTIPLE or weight.shape[1] % MULTIPLE:
        return f"a weight of {tuple(weight.shape)}"
    if not _VECTORS:
        return "CPUs without AVX2, where stock is faster"
    return ""


def forward(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x weight^T + bias, for x [.., K] and weight [N, K]."""
    return torch.ops.moat_kernels.cpu_linear_forward(
        x.contiguous(), weight.contiguous(), None if bias is None else bias.contiguous()
    )


def backward(
    grad: Tensor, x: Tensor, weight: Tensor, needs_input: bool, needs_parameters: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, weight and bias; empty where they are not needed."""
    return torch.ops.moat_kernels.cpu_linear_backward(
        grad.contiguous(), x.contiguous(), weight.contiguous(), needs_input, needs_parameters
    )


def _fake_forward(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty(*x.shape[:-1], weight.shape[0])


def _fake_backward(
    grad: Tensor, x: Tensor, weight: Tensor, needs_input: bool, needs_parameters: bool
) -> tuple[Tensor, Tensor, Tensor]:
    return (
        torch.empty_like(x) if needs_input else x.new_empty(0),
        torch.empty_like(weight) if needs_parameters else x.new_empty(0),
        x.new_empty(weight.shape[0] if needs_parameters else 0),
    )


def _forward_flops(x: Shape, weight: Shape, *_: object, **__: object) -> int:
    return linear_flops(x, weight)


def _backward_flops(
    grad: Shape, x: Shape, weight: Shape, needs_input: bool, needs_parameters: bool, **_: object
) -> int:
    return linear_flops(x, weight) * (needs_input + needs_parameters)


if load_extension().usable:
    register_fake("cpu_linear_forward", _fake_forward)
    register_fake("cpu_linear_backward", _fake_backward)
    register_flops("cpu_linear_forward", _forward_flops)
    register_flops("cpu_linear_backward", _backward_flops)
