"""The native kernels as compiled for 64-bit Arm (NEON), against the reference in float64.

The same source as everywhere, at the width of NEON, run under QEMU by a program without PyTorch.
"""

from __future__ import annotations

import re

import pytest
import torch
from support import aarch64
from support.tolerances import (
    BACKEND_GRADIENT,
    BACKEND_OUTPUT,
    STORED_ROUNDING,
    assert_close,
)
from torch import Tensor

import moat_kernels as mk
from moat_kernels.functional import WindowAttentionDescription, window_attention

pytestmark = pytest.mark.skipif(
    bool(aarch64.reason_unavailable()), reason=aarch64.reason_unavailable()
)
OUTPUT, GRADIENT = BACKEND_OUTPUT[torch.float32], BACKEND_GRADIENT[torch.float32]


def perturbed_block(in_channels: int, out_channels: int, **options: object) -> torch.nn.Module:
    """A stock block in eval whose norms do something."""
    torch.manual_seed(0)
    block = mk.reference.MBConvBlock(in_channels, out_channels, **options).eval()
    for name, tensor in [*block.named_parameters(), *block.named_buffers()]:
        if tensor.is_floating_point() and tensor.dim() == 1:
            offset = 1.0 if name.endswith(("norm.weight", "running_var")) else 0.0
            tensor.data.copy_(offset + 0.2 * torch.randn(tensor.shape).clamp(-2, 2))
    return block


@pytest.mark.parametrize("dtype", aarch64.ELEMENT_TYPES, ids=str)
@pytest.mark.parametrize(
    ("shape", "channels", "stride", "gated"),
    [
        ((2, 9, 7), (24, 24), 1, False),
        ((1, 6, 13), (8, 20), 2, False),
        ((2, 5, 8), (12, 12), 1, True),
    ],
    ids=["stride 1", "stride 2", "squeeze-excite"],
)
def test_mbconv(
    shape: tuple[int, int, int],
    channels: tuple[int, int],
    stride: int,
    gated: bool,
    dtype: torch.dtype,
) -> None:
    batch, height, width = shape
    block = perturbed_block(*channels, stride=stride, se_ratio=0.25 if gated else None)
    x = torch.randn(*shape, channels[0]).to(dtype)
    norms = (block.pre_norm, block.expand_norm, block.depthwise_norm)
    tensors = [x]
    for norm in norms:
        tensors += [norm.weight, norm.bias, norm.running_mean, norm.running_var]
    tensors += [block.expand_conv.weight, block.depthwise_conv.weight]
    convolutions = [block.shrink_conv]
    convolutions += [block.se.reduce, block.se.expand] if gated else []
    convolutions += [block.shortcut_conv] if block.shortcut_conv is not None else []
    for convolution in convolutions:
        tensors += [convolution.weight, convolution.bias]
    wide = block.expand_conv.out_channels
    reduced = block.se.reduce.out_channels if gated else 0
    element = aarch64.ELEMENT_TYPES.index(dtype)
    numbers = (batch, height, width, *channels, wide, stride, reduced, element, norms[0].eps)
    out_size = (-(-height // stride), -(-width // stride))
    (output,) = aarch64.run("mbconv", numbers, tensors, [((batch, *out_size, channels[1]), dtype)])
    expected = block.double()(x.double().permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
    assert_close(output, expected, OUTPUT + STORED_ROUNDING[dtype])


@pytest.mark.parametrize("dtype", aarch64.ELEMENT_TYPES, ids=str)
@pytest.mark.parametrize(
    ("shape", "window", "head_dim"),
    [((2, 7, 7), (7, 7), 32), ((1, 5, 9), (3, 4), 16), ((1, 8, 8), (8, 8), 64)],
)
def test_window_attention(
    shape: tuple[int, int, int], window: tuple[int, int], head_dim: int, dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    heads = 2
    description = WindowAttentionDescription(heads, head_dim, window)
    qkv = torch.randn(*shape, 3 * heads * head_dim).to(dtype)
    table = torch.randn(heads, 2 * window[0] - 1, 2 * window[1] - 1)
    gradient = torch.randn(*shape, heads * head_dim).to(dtype)
    element = aarch64.ELEMENT_TYPES.index(dtype)
    output, qkv_gradient, table_gradient = aarch64.run(
        "window_attention",
        (*shape, heads, head_dim, *window, element, head_dim**-0.5),
        (qkv, table, gradient),
        [(gradient.shape, dtype), (qkv.shape, dtype), (table.shape, torch.float32)],
    )

    def differentiable(tensor: Tensor) -> Tensor:
        return tensor.double().requires_grad_()

    exact_qkv, exact_table = differentiable(qkv), differentiable(table)
    with mk.use_backend("reference"):
        expected = window_attention(exact_qkv, exact_table, description)
    expected.backward(gradient.double())
    assert_close(output, expected, OUTPUT + STORED_ROUNDING[dtype])
    assert_close(qkv_gradient, exact_qkv.grad, GRADIENT + STORED_ROUNDING[dtype])
    assert_close(table_gradient, exact_table.grad, GRADIENT + STORED_ROUNDING[dtype])


@pytest.mark.parametrize(
    "kernel", [path.stem for path in aarch64.KERNELS if "isa" not in path.stem]
)
def test_the_arithmetic_is_in_vectors(kernel: str) -> None:
    """Products of four floats, fused or not, and fewer of single ones."""
    instructions = aarch64.disassemble(kernel)
    vector = re.findall(r"\t(?:fmla|fmul)\tv\d", instructions)
    scalar = re.findall(r"\t(?:fmadd|fmul)\ts\d", instructions)
    assert len(vector) > len(scalar)
