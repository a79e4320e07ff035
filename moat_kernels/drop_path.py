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

    def scale(self, x: Tensor) -> Tensor | None:
        """A new draw, [B] in x's dtype: 0 or 1/p for each sample; None where nothing drops."""
        if not self.training or self.probability == 0.0:
            return None
        survival = 1.0 - self.probability
        # On CUDA devices a draw in float64 is another one than in float32 and 16 bits.
        drawn = torch.float32 if x.dtype == torch.float64 else x.dtype
        kept = torch.empty(x.shape[0], dtype=drawn, device=x.device).bernoulli_(survival)
        return kept.div_(survival).to(x.dtype)

    def forward(self, x: Tensor) -> Tensor:
        scale = self.scale(x)
        return x if scale is None else x * scale[:, None, None, None]

    def extra_repr(self) -> str:
        return f"probability={self.probability}"
