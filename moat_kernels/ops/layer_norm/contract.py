"""What a backend of `branch_layer_norm` must provide: the functions of its module backend.py.

As of ops/mbconv/contract.py. Where no backend covers a call, stock PyTorch computes it.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch
from torch import Tensor


class Forward(NamedTuple):
    """The normalised rows [..., C], and of each row mean and 1 / standard deviation, float32."""

    output: Tensor
    saved: list[Tensor]


class Backend(Protocol):
    """One way to normalise rows x [..., C] by weight and bias [C], into `dtype`."""

    def unsupported(self, x: Tensor, weight: Tensor | None, bias: Tensor | None) -> str:
        """Why this backend does not cover a call; empty if it does."""
        ...

    def evaluate(
        self, x: Tensor, weight: Tensor, bias: Tensor, eps: float, dtype: torch.dtype
    ) -> Tensor:
        """The output, where no backward pass will follow."""
        ...

    def forward(
        self, x: Tensor, weight: Tensor, bias: Tensor, eps: float, dtype: torch.dtype
    ) -> Forward:
        """The output and what the backward pass needs."""
        ...

    def backward(
        self,
        grad: Tensor,
        grad_residual: Tensor | None,
        x: Tensor,
        weight: Tensor,
        saved: list[Tensor],
        needs_parameters: bool,
    ) -> list[Tensor]:
        """[gradient of x plus grad_residual, and if needed float32 ones of weight and bias]."""
        ...
