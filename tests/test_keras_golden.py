"""A MOAT of Keras' layout computes what TensorFlow 2.15 did, from the SavedModel's variables."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from support import tolerances
from support.keras import FOLDER, golden, load
from support.tolerances import assert_close

import moat_kernels as mk
from moat_kernels.checkpoints import load_tensorflow, save_safetensors
from moat_kernels.checkpoints.__main__ import main
from moat_kernels.ops.common.backends import backend_status

NATIVE = ("cpu", "frozen") if backend_status()["cpu"].usable else ()


@pytest.mark.parametrize("implementation", ["reference", "torch", *NATIVE])
def test_outputs(implementation: str) -> None:
    images, expected = golden()
    model = load(fused=implementation != "reference")
    if implementation == "frozen":
        model, implementation = mk.freeze(model), "cpu"
    with torch.no_grad(), mk.use_backend(implementation):
        for pixels in (images, images.to(torch.uint8)):
            actual = model(pixels).sigmoid()
            assert_close(actual, expected, tolerances.GOLDEN_OUTPUT)


@pytest.mark.parametrize(
    "official",
    [
        {"se_activation": "silu"},
        {"layer_norm_eps": 1e-5},
        {"pool_size": 2},
        {"window_size": None},
        {"pixel_scaling": False},
    ],
    ids=str,
)
def test_every_option_counts(official: dict) -> None:
    images, expected = golden()
    with torch.no_grad():
        actual = load(fused=False, **official)(images).sigmoid()
    assert tolerances.relative_error(actual, expected) > 2 * tolerances.GOLDEN_OUTPUT


def test_in_float64_what_is_left_is_tensorflows_own_rounding() -> None:
    images, expected = golden()
    with torch.no_grad():
        actual = load(fused=False).double()(images.double()).sigmoid()
    assert tolerances.relative_error(actual, expected.double()) < 1e-6


def test_converted_and_made_by_the_file_alone(tmp_path: Path) -> None:
    images, expected = golden()
    source = load_tensorflow(FOLDER, resolution=128)
    assert any("channel_order 'bgr'" in line for line in source.report.assumed)
    with pytest.warns(UserWarning, match="keras_small.* assumed: .*resolution 448"):
        assert mk.get_preprocessing(mk.create_model(checkpoint=FOLDER)).resolution == 448
    path = tmp_path / "model.safetensors"
    assert main(["convert", str(FOLDER), str(path), "--resolution", "128"]) == 0
    model = mk.create_model(checkpoint=path).eval()
    with torch.no_grad():
        assert_close(model(images).sigmoid(), expected, tolerances.GOLDEN_OUTPUT)
    preprocessing = mk.get_preprocessing(model)
    assert preprocessing.resolution == 128
    assert (preprocessing.crop_mode, preprocessing.channel_order) == ("border", "bgr")
    again = tmp_path / "again.safetensors"
    save_safetensors(model.state_dict(), again)
    assert mk.get_preprocessing(mk.create_model(checkpoint=again)) == preprocessing
