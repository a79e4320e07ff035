"""What a backend of `mbconv` must provide.

Each of torch/, cpu/ and triton/ has a module backend.py that is one: `Backend` describes a module's
functions. dispatch.py checks a call and chooses who computes it, api.py calls these. What two
backends need is in algebra/; no backend imports another.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from moat_kernels.ops.common.batch_norm import RunningUpdate
from moat_kernels.ops.mbconv.description import MBConvDescription, MBConvParameters

# By the name of each norm that measured its batch: mean and biased variance [C], and of a
# synchronised norm the number of values per channel over all ranks, [].
Moments = Mapping[str, tuple[Tensor, ...]]


class Forward(NamedTuple):
    """A forward pass in training.

    output: [B, C_out, H_out, W_out], in any memory format.
    saved: what `Backend.backward` takes beside x and the parameters. How many tensors there are
        follows from shapes, the description and `recompute`.
    """

    output: Tensor
    moments: Moments
    saved: list[Tensor]


class Backend(Protocol):
    """One way to compute the inverted bottleneck.

    All take checked arguments, outside autocast: x [B, C_in, H, W] in any memory format, and a
    description in which exactly the norms that use running statistics are `frozen`. None records
    anything for autograd. drop_path_scale: [B] or None, multiplies each sample's residual. dtype:
    what autocast wants the convolutions in; None: the dtype of their weights.
    """

    def unsupported(
        self, x: Tensor, parameters: MBConvParameters, description: MBConvDescription
    ) -> str:
        """Why this backend does not cover a call; empty if it does."""
        ...

    def evaluate(
        self,
        x: Tensor,
        parameters: MBConvParameters,
        description: MBConvDescription,
        drop_path_scale: Tensor | None,
        dtype: torch.dtype | None,
    ) -> Tensor:
        """The output, where every norm is frozen and no backward pass will follow."""
        ...

    def forward(
        self,
        x: Tensor,
        parameters: MBConvParameters,
        description: MBConvDescription,
        recompute: str,
        drop_path_scale: Tensor | None,
        dtype: torch.dtype | None,
        updates: Mapping[str, RunningUpdate],
    ) -> Forward:
        """The output and what follows it; recompute is "none", "expand" or "block".

        updates: of norms by name. A backend may make them itself; it then leaves the moments of
        that norm out.
        """
        ...

    def backward(
        self,
        grad: Tensor,
        x: Tensor,
        parameters: MBConvParameters,
        description: MBConvDescription,
        recompute: str,
        drop_path_scale: Tensor | None,
        dtype: torch.dtype | None,
        saved: list[Tensor],
        needed: frozenset[str],
    ) -> dict[str, Tensor]:
        """Gradients by name, of "x" and of the parameters in `needed` at least.

        grad: of the output. saved: of `forward`, called with the same arguments. A norm's tensors
        are called expand_norm_weight and so on, the others as in MBConvParameters.
        """
        ...
