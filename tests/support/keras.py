"""Images of pixels, and the golden of a Keras MOAT.

tests/golden/keras_small has the variables of a SavedModel with random weights: stem 32; blocks 1,
2, 2, 1 of 32, 64, 96 and 128 channels; stage 3 in windows of 4x4; 11 outputs. output.npz has what
TensorFlow 2.15 computed of two images of 128 pixels, after a sigmoid.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

import moat_kernels as mk
from moat_kernels.checkpoints import load_tensorflow
from support.golden import GOLDEN

FOLDER = GOLDEN / "keras_small"
RESOLUTION = 128


def golden() -> tuple[Tensor, Tensor]:
    """The images [2, 3, 128, 128] and the outputs [2, 11]."""
    shape = (2, RESOLUTION, RESOLUTION, 3)
    images = np.random.default_rng(3).integers(0, 256, shape).astype("float32")
    outputs = np.load(FOLDER / "output.npz")["output"]
    return torch.from_numpy(images).permute(0, 3, 1, 2), torch.from_numpy(outputs)


def load(**options: Any) -> mk.MOAT:
    """The model of the golden, in eval mode. options: that are not to be as the file says."""
    source = load_tensorflow(FOLDER, resolution=RESOLUTION)
    assert source.configuration is not None
    told = {**source.configuration, "num_classes": 11, **options}
    assert told.pop("preprocessing")["resolution"] == RESOLUTION
    model = mk.create_model("tiny_moat_0", **told).eval()
    model.load_state_dict(source.state_dict)
    return model


def make_pixels(*shape: int) -> Tensor:
    """Images of 0..255 in uint8, the same at every call."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
