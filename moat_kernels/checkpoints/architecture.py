"""What the tensors of a whole MOAT tell about its configuration."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import groupby
from typing import Any

import torch

_FIRST_CONVOLUTION = "stem.conv_0.weight"
_LAST_OF_BLOCK = ".shrink_conv.weight"


def official_configuration(state_dict: Mapping[str, torch.Tensor]) -> dict[str, Any] | None:
    """What is certain of the model of an official checkpoint; None for a single block."""
    if _FIRST_CONVOLUTION not in state_dict:
        return None
    return {
        **sizes_of(state_dict),
        "position_embedding": any("relative_position_embedding" in name for name in state_dict),
        "se_activation": "silu",
        "layer_norm_eps": 1e-5,
    }


def sizes_of(state_dict: Mapping[str, torch.Tensor]) -> dict[str, Any]:
    """Stem width, widths and depths of the stages, and channels of the images, of a whole model."""
    stem = state_dict[_FIRST_CONVOLUTION]
    blocks = [name for name in state_dict if name.endswith(_LAST_OF_BLOCK)]
    stages = [list(names) for _, names in groupby(blocks, key=lambda name: name.split(".")[1])]
    return {
        "stem_width": stem.shape[0],
        "widths": tuple(state_dict[names[0]].shape[0] for names in stages),
        "depths": tuple(map(len, stages)),
        "in_chans": stem.shape[1],
    }
