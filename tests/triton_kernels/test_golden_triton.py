"""The goldens of both layouts by the Triton kernels."""

from __future__ import annotations

import warnings

import pytest
import test_golden
import torch
from support import tolerances
from support.keras import golden, load
from triton_kernels.conftest import INTERPRETED

from moat_kernels import FallbackWarning, use_backend


@pytest.mark.skipif(not INTERPRETED, reason="the tensors of these tests are on the CPU")
@pytest.mark.parametrize("training", [False, True], ids=["eval", "training"])
@pytest.mark.parametrize("name", ["a_mbconv_s2_15x20_pool2", "b_moat_s1_nope_win4x4_8x8"])
def test_official(name: str, training: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tolerances, "GOLDEN_BLOCK_GRADIENT", tolerances.GOLDEN_TRITON_GRADIENT)
    with warnings.catch_warnings():
        warnings.simplefilter("error", FallbackWarning)
        if training:
            test_golden.test_training_outputs_gradients_and_moving_statistics(name, "triton auto")
        else:
            test_golden.test_eval_outputs(name, "triton auto")


def test_keras(device: str) -> None:
    """One image of it."""
    images, expected = golden()
    model = load().to(device)
    with torch.no_grad(), use_backend("triton"), warnings.catch_warnings():
        warnings.simplefilter("error", FallbackWarning)
        actual = model(images[:1].to(device)).sigmoid()
    tolerances.assert_close(actual.cpu(), expected[:1], tolerances.GOLDEN_OUTPUT)
