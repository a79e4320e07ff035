"""A whole MOAT of two MBConv and two MOAT blocks, small enough for tests to train."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

import moat_kernels as mk

CLASSES = 5
RESOLUTION = 32


def make_model(dtype: torch.dtype = torch.float64, **options: Any) -> mk.MOAT:
    """The same weights at every call, large enough for every part to matter."""
    torch.manual_seed(0)
    defaults: dict[str, Any] = {
        "stem_width": 8,
        "widths": (8, 16, 32, 64),
        "depths": (1, 1, 1, 1),
        "num_classes": CLASSES,
        "drop_path_rate": 0.0,
    }
    model = mk.create_model("tiny_moat_0", **{**defaults, **options})
    for parameter in model.parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=0.2)
    return model.to(dtype)
