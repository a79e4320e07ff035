"""The golden of Keras' layout by the Triton kernels, one image of it."""

from __future__ import annotations

import warnings

import torch
from support.keras import golden, load
from support.tolerances import GOLDEN_OUTPUT, assert_close

from moat_kernels import FallbackWarning, use_backend


def test_outputs(device: str) -> None:
    images, expected = golden()
    model = load().to(device)
    with torch.no_grad(), use_backend("triton"), warnings.catch_warnings():
        warnings.simplefilter("error", FallbackWarning)
        actual = model(images[:1].to(device)).sigmoid()
    assert_close(actual.cpu(), expected[:1], GOLDEN_OUTPUT)
