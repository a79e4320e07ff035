"""Images to measure and to calibrate with: random, but with the spectrum of photographs.

Photographs are large even areas and edges: the power of a frequency falls with its square, and the
three colours mostly go together. Convolutions average white noise out, so that scales which int8
found on it would be too small for photographs; these have their ranges, need no download, and are
the same everywhere.
"""

from __future__ import annotations

import torch
from torch import Tensor

# int8 finds its scales on images that are not measured, one at a time as NNCF asks of transformers.
# Of 16 OpenVINO's were too small for one image in eight.
CALIBRATION_IMAGES = 64
_MEASURED, _CALIBRATION = 1, 2  # seeds


def measured_images(batch: int, resolution: int) -> Tensor:
    return _photographs(batch, resolution, _MEASURED)


def calibration_batches(resolution: int) -> list[Tensor]:
    """What every int8 contender gets."""
    return list(_photographs(CALIBRATION_IMAGES, resolution, _CALIBRATION).split(1))


def _photographs(count: int, resolution: int, seed: int) -> Tensor:
    """[count, 3, resolution, resolution], each image of mean 0 and deviation 1."""
    torch.manual_seed(seed)
    shape = (resolution, resolution)
    grey, colour = (torch.randn(count, n, *shape, dtype=torch.float32) for n in (1, 3))
    down = torch.fft.fftfreq(resolution, dtype=torch.float32)[:, None]
    across = torch.fft.rfftfreq(resolution, dtype=torch.float32)
    frequency = torch.hypot(down, across).clamp(min=1 / resolution)
    images = torch.fft.irfft2(torch.fft.rfft2(2 * grey + colour) / frequency, s=shape)
    deviation, mean = torch.std_mean(images, dim=(1, 2, 3), keepdim=True)
    return ((images - mean) / deviation).to(torch.get_default_dtype())
