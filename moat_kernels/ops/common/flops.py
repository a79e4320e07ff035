"""FLOPs of this package's operators for `torch.utils.flop_counter.FlopCounterMode`.

An operator counts what it computes in plain PyTorch, by PyTorch's own rules: 2 for each multiply
and add of products and convolutions, nothing for all else.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch.utils.flop_counter import register_flop_formula

Shape = Sequence[int]


def register_flops(name: str, formula: Callable[..., int]) -> None:
    """`formula` gets the operator's arguments, with shapes for tensors, and `out_shape`."""
    register_flop_formula(getattr(torch.ops.moat_kernels, name))(formula)


def linear_flops(x: Shape, weight: Shape) -> int:
    """x [.., K] times a weight [N, K]; each of the two gradients costs the same."""
    return 2 * math.prod(x) * weight[0]


def convolution_flops(weight: Shape, out: Shape) -> int:
    """A weight [C_out, C_in / groups, ..] gives [B, C_out, ..]; so does the input's gradient."""
    return 2 * math.prod(out) * math.prod(weight[1:])


def weight_gradient_flops(in_channels: int, weight: Shape, out: Shape) -> int:
    """PyTorch counts it as of a convolution without groups, however many there are."""
    return 2 * math.prod(out) * in_channels * math.prod(weight[2:])
