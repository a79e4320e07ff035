"""What a backend of `window_attention` must provide: the functions of its module backend.py.

As of ops/mbconv/contract.py: no backend imports another, what two of them need is in algebra/.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

from torch import Tensor

from moat_kernels.ops.window_attention.description import WindowAttentionDescription


class Forward(NamedTuple):
    """The output [B, H, W, heads * head_dim], and what `Backend.backward` takes beside it."""

    output: Tensor
    saved: list[Tensor]


class Backend(Protocol):
    """One way to compute attention in windows.

    All take checked arguments, outside autocast: qkv [B, H, W, 3 * heads * head_dim] with any
    strides, bias_table [heads, 2*wh-1, 2*ww-1] or None, and a window that is not larger than the
    map. None records anything for autograd.
    """

    def unsupported(
        self, qkv: Tensor, bias_table: Tensor | None, description: WindowAttentionDescription
    ) -> str:
        """Why this backend does not cover a call; empty if it does."""
        ...

    def evaluate(
        self, qkv: Tensor, bias_table: Tensor | None, description: WindowAttentionDescription
    ) -> Tensor:
        """The output, where no backward pass will follow."""
        ...

    def forward(
        self, qkv: Tensor, bias_table: Tensor | None, description: WindowAttentionDescription
    ) -> Forward:
        """The output and what the backward pass needs."""
        ...

    def backward(
        self,
        grad: Tensor,
        qkv: Tensor,
        bias_table: Tensor | None,
        description: WindowAttentionDescription,
        output: Tensor,
        saved: list[Tensor],
        needs_table: bool,
    ) -> tuple[Tensor, Tensor | None]:
        """Gradients of qkv and, if needs_table, of bias_table, summed in a fixed order."""
        ...
