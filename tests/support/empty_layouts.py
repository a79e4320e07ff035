"""Tensors without elements in every layout that views give: strides say nothing about them."""

from __future__ import annotations

import torch
from torch import Tensor


def empty_layouts(shape: tuple[int, ...], device: str = "cpu") -> dict[str, Tensor]:
    """By the layout's name, float32 tensors of `shape`, whose first axis is 0."""
    full = torch.randn(3, *shape[1:], device=device)
    return {
        "contiguous": full.new_empty(shape),
        "last axis first": full.new_empty(shape[-1], *shape[:-1]).movedim(0, -1),
        "first axis last": full.new_empty(*shape[1:], 0).movedim(-1, 0),
        "second axis last": full.new_empty(0, *shape[2:], shape[1]).movedim(-1, 1),
        "sliced": full[:0],
        "every second": full.repeat_interleave(2, -1)[:0, ..., ::2],
        "expanded": full.new_empty(*shape[:-1], 1).expand(shape),
        "one element": full.new_empty(1).expand(2, *shape[1:])[:0],
    }
