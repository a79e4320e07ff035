"""A linear layer by native CPU kernels (csrc/cpu/host/linear.cpp), its parameters in float32.

Under autocast to bfloat16, where the CPU multiplies that, x and the output are in bfloat16, and the
weight is rounded where it is packed.

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
from moat_kernels.ops.common.symbols import is_certain

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
_BFLOAT16 = _VECTORS and torch.ops.moat_kernels.cpu_multiplies(torch.bfloat16)


def unsupported(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> str:
    """Why this backend does not cover a call; empty: it does.

    What does not fit together is not covered: stock raises the error.
    """
    if weight is None:
        return "a layer without weight"
    if any(t is not None and t.device.type != "cpu" for t in (x, weight, bias)):
        return "tensors that are not all on the CPU"
    dtype = autocast_dtype(x)
    if dtype is not None and not (dtype == torch.bfloat16 and _BFLOAT16):
        return f"autocast to {dtype}"
    if weight.dim() != 2 or x.dim() < 1 or x.shape[-1] != weight.shape[1]:
        return f"x of {tuple(x.shape)} with a weight of {tuple(weight.shape)}"
    if bias is not None and bias.shape != weight.shape[:1]:
        return f"a bias of {tuple(bias.shape)}"
    if any(t is not None and t.dtype != torch.float32 for t in (weight, bias)):
        return "parameters in another dtype than float32"
    if x.dtype != torch.float32 and x.dtype != dtype:
        return f"x in {x.dtype}"
    if is_certain(x.numel() < FEWEST_ROWS * weight.shape[1]):
        return f"fewer than {FEWEST_ROWS} rows"
    if not weight.numel() or weight.shape[0] % MULTIPLE or weight.shape[1] % MULTIPLE:
        return f"a weight of {tuple(weight.shape)}"
    if not _VECTORS:
        return "CPUs without AVX2, where stock is faster"
    return ""


def forward(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x weight^T + bias in x's dtype, for x [.., K] and weight [N, K]."""
    return torch.ops.moat_kernels.cpu_linear_forward(
        x.contiguous(), weight.contiguous(), None if bias is None else bias.contiguous()
    )


def backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    input_dtype: torch.dtype,
    needs_input: bool,
    needs_parameters: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, in `input_dtype`, weight and bias; empty where they are not needed.

    grad, x: in the dtype that is multiplied.
    """
    tensors = (grad.contiguous(), x.contiguous(), weight.contiguous())
    return torch.ops.moat_kernels.cpu_linear_backward(
        *tensors, input_dtype, needs_input, needs_parameters
    )


def _fake_forward(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty(*x.shape[:-1], weight.shape[0])


def _fake_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    input_dtype: torch.dtype,
    needs_input: bool,
    needs_parameters: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    return (
        torch.empty_like(x, dtype=input_dtype) if needs_input else weight.new_empty(0),
        torch.empty_like(weight) if needs_parameters else weight.new_empty(0),
        weight.new_empty(weight.shape[0] if needs_parameters else 0),
    )


def _forward_flops(x: Shape, weight: Shape, *_: object, **__: object) -> int:
    return linear_flops(x, weight)


def _backward_flops(
    grad: Shape,
    x: Shape,
    weight: Shape,
    input_dtype: object,
    needs_input: bool,
    needs_parameters: bool,
    **_: object,
) -> int:
    return linear_flops(x, weight) * (needs_input + needs_parameters)


if load_extension().usable:
    register_fake("cpu_linear_forward", _fake_forward)
    register_fake("cpu_linear_backward", _fake_backward)
    register_flops("cpu_linear_forward", _forward_flops)
    register_flops("cpu_linear_backward", _backward_flops)
