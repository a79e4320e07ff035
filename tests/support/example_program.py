"""What the example program trains in the tests: models and runs that take seconds."""

from __future__ import annotations

import moat_kernels

STEPS = 4
# Of the detector's parts.
SMALL_SIZES = {
    "channels": 8,
    "mask_channels": 8,
    "hidden": 16,
    "anchor": 16,
    "proposals": 20,
    "samples": 16,
    "objects": 0.5,
    "detections": 10,
}
create_model = moat_kernels.create_model


def small_model(name: str, **options) -> moat_kernels.MOAT:
    sizes = {"stem_width": 8, "widths": (8, 16, 32, 64), "depths": (1, 2, 2, 1)}
    return create_model(name, **sizes, **options)
