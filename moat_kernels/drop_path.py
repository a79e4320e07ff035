"""Stochastic depth: a sample of the batch loses its residual."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class DropPath(nn.Module):
    """In training multiplies each sample by 0 with probability `probability`, else by 1/p.

    p = 1 - probability is the official survival probability. Identity in eval.
    """

    def __init__(self, probability: float = 0.0) -> None:
        super().__init__()
        if not 0.0 <= probability < 1.0:
            raise ValueError(f"drop_path must be within [0, 1), got {probability!r}")
        self.probability = probability

    def draw(self, x: Tensor) -> Tensor | None:
        """Which samples keep their residual this time, [B]: 1 or 0; None where nothing drops.

        In x's dtype, or float32 for float64, whose draws on CUDA devices are others.
        """
        if not self.training or self.probability == 0.0:
            return None
        dtype = torch.float32 if x.dtype == torch.float64 else x.dtype
        kept = torch.empty(x.shape[0], dtype=dtype, device=x.device)
        return kept.bernoulli_(1.0 - self.probability)

    def scale(self, x: Tensor) -> Tensor | None:
        """A new draw, [B] in x's dtype: 0 or 1/p for each sample; None where nothing drops."""
        kept = self.draw(x)
        return None if kept is None else kept.to(x.dtype).div_(1.0 - self.probability)

    def forward(self, x: Tensor) -> Tensor:
        scale = self.scale(x)
        return x if scale is None else x * scale[:, None, None, None]

    def extra_repr(self) -> str:
        return f"probability={self.probability}"
