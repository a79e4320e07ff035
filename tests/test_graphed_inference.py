"""Inference by `graphed_inference`: on a CPU as it is, and captured by a stand-in without a GPU.

tests/gpu/test_graphed_inference_gpu.py has the real graphs.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.small_model import CLASSES, RESOLUTION, make_model
from torch import Tensor, nn

from moat_kernels import graphed_inference


def make_images(size: int) -> Tensor:
    return torch.randn(size, 3, RESOLUTION, RESOLUTION)


@pytest.mark.usefixtures("either_way")
@pytest.mark.parametrize("autocast_dtype", [None, torch.bfloat16])
def test_results_are_the_models(autocast_dtype: torch.dtype | None) -> None:
    model = make_model(torch.float32).eval()
    run = graphed_inference(model, make_images(2), autocast_dtype=autocast_dtype)
    for size in (2, 3, 2):
        images = make_images(size)
        enabled = autocast_dtype is not None
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            expected = model(images)
        result = run(images)
        assert result.shape == (size, CLASSES) and not result.requires_grad
        assert torch.equal(result, expected)


@pytest.mark.usefixtures("either_way")
def test_an_outer_autocast_is_left_out() -> None:
    model = make_model(torch.float32).eval()
    run = graphed_inference(model, make_images(2))
    with torch.autocast("cpu", torch.bfloat16):
        assert run(make_images(2)).dtype == torch.float32


@pytest.mark.usefixtures("either_way")
def test_maps_of_a_backbone_and_earlier_results_stay() -> None:
    model = make_model(torch.float32, features_only=True).eval()
    run = graphed_inference(model, make_images(1))
    images = make_images(1)
    first = run(images)
    run(make_images(1))
    with torch.no_grad():
        expected = model(images)
    assert first.keys() == expected.keys() and len(first) > 1
    for name, maps in expected.items():
        assert torch.equal(first[name], maps), name


@pytest.mark.usefixtures("captured")
def test_each_kind_of_images_is_captured_once() -> None:
    model = make_model(torch.float32).eval()
    run = graphed_inference(model, make_images(2))
    kinds = [make_images(2), make_images(3), make_images(2).bfloat16().float(), make_images(3)]
    for images in (*kinds, make_images(2).to(memory_format=torch.channels_last)):
        run(images)
    assert run.recorder.captures == 3


@pytest.mark.usefixtures("either_way")
def test_weights_loaded_later_are_used() -> None:
    model, other = (make_model(torch.float32).eval() for _ in range(2))
    run = graphed_inference(model, make_images(2))
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.5)
    model.load_state_dict(other.state_dict())
    images = make_images(2)
    with torch.no_grad():
        assert torch.equal(run(images), other(images))


@pytest.mark.usefixtures("either_way")
def test_training_mode_is_refused() -> None:
    model = make_model(torch.float32)
    with pytest.raises(ValueError, match=r"must be in eval mode \(model.eval\(\)\), and is in tr"):
        graphed_inference(model, make_images(2))
    model.eval().stem.train()
    with pytest.raises(ValueError, match="is in training mode: its stem"):
        graphed_inference(model, make_images(2))
    run = graphed_inference(model.eval(), make_images(2))
    model.train()
    with pytest.raises(RuntimeError, match="set to training mode"):
        run(make_images(2))


@pytest.mark.usefixtures("captured")
def test_parameters_that_moved_are_refused() -> None:
    model = make_model(torch.float32).eval()
    run = graphed_inference(model, make_images(2))
    model.double().float()
    with pytest.raises(RuntimeError, match="moved to other memory"):
        run(make_images(2))


class Odd(nn.Linear):
    def forward(self, x: Tensor) -> Any:
        return {"maps": [x], "kind": torch.Size}


@pytest.mark.usefixtures("captured")
def test_what_cannot_be_captured_is_named() -> None:
    with pytest.raises(ValueError, match="on one device, got none"):
        graphed_inference(nn.Identity().eval(), torch.zeros(1))
    with pytest.raises(ValueError, match=r"must return tensors, .* and returns a type"):
        graphed_inference(Odd(2, 2).eval(), torch.zeros(1, 2))
