"""What Keras' MOATs are, beside official ones, as options of the models."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

KERAS: dict[str, Any] = {
    "pool_size": 3,
    "position_embedding": False,
    "se_activation": "gelu",
    "layer_norm_eps": 1e-3,
    "pixel_scaling": True,
    "channel_order": "bgr",
}


def make_pixels(*shape: int) -> Tensor:
    """Images of 0..255 in uint8, the same at every call."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
