"""Inference captured by `graphed_inference`, against the same models launched kernel by kernel."""

from __future__ import annotations

import pytest
import torch
from support.small_model import make_model
from support.tolerances import assert_close
from torch import Tensor, nn

import moat_kernels as mk

RESOLUTION = 64
# bfloat16 through the whole model; the kernels are the same, and so mostly are the bits.
TOLERANCE = 1e-3


def make(device: str, **options: object) -> mk.MOAT:
    model = make_model(torch.float32, **options).eval().to(device)
    return model.to(memory_format=torch.channels_last)


def make_images(size: int, device: str) -> Tensor:
    images = torch.randn(size, 3, RESOLUTION, RESOLUTION, device=device)
    return images.to(memory_format=torch.channels_last)


def as_it_is(model: nn.Module, images: Tensor) -> Tensor:
    with torch.no_grad(), torch.autocast("cuda", torch.bfloat16):
        return model(images)


def test_results_of_two_shapes_are_those_without_a_graph(cuda: str, kernels: None) -> None:
    model = make(cuda)
    batches = [make_images(size, cuda) for size in (8, 3, 8, 3)]
    run = mk.graphed_inference(model, batches[0], autocast_dtype=torch.bfloat16)
    results = [run(images) for images in batches]
    for images, result in zip(batches, results, strict=True):
        assert_close(result, as_it_is(model, images), TOLERANCE)


def test_weights_loaded_later_and_images_of_the_host_are_used(cuda: str, kernels: None) -> None:
    model = make(cuda)
    run = mk.graphed_inference(model, make_images(2, cuda), autocast_dtype=torch.bfloat16)
    state = {name: tensor * 1.25 for name, tensor in model.state_dict().items()}
    model.load_state_dict(state)
    images = make_images(2, "cpu").pin_memory()
    assert_close(run(images), as_it_is(model, images.to(cuda)), TOLERANCE)


class Waiting(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return x * x.sum().item()


def test_a_model_that_waits_is_refused_and_the_next_one_works(cuda: str, kernels: None) -> None:
    with pytest.raises(RuntimeError, match=r"may wait for the GPU \(.item\(\)"):
        mk.graphed_inference(Waiting(2, 2).to(cuda).eval(), torch.ones(1, 2, device=cuda))
    model, images = make(cuda), make_images(2, cuda)
    run = mk.graphed_inference(model, images, autocast_dtype=torch.bfloat16)
    assert_close(run(images), as_it_is(model, images), TOLERANCE)
