"""DeepLabv3+ on small MOATs: shapes, the same numbers of both kinds of blocks, parameter groups."""

from __future__ import annotations

import deeplab
import pytest
import torch
from support.example_program import small_model

import moat_kernels


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    monkeypatch.setattr(moat_kernels, "create_model", small_model)


def test_maps_are_at_the_strides_of_the_paper() -> None:
    model = deeplab.deeplab("tiny_moat_0", 3)
    assert model.backbone.strides() == [4, 16]
    low, high = model.backbone(torch.randn(1, 3, 65, 97))
    assert low.shape[2:] == (17, 25) and high.shape[2:] == (5, 7)


@pytest.mark.parametrize("size", [(64, 64), (45, 83)])  # (45, 83): no stride divides it
def test_every_pixel_has_logits(size: tuple[int, int]) -> None:
    model = deeplab.deeplab("tiny_moat_0", 3, window=2).eval()
    with torch.inference_mode():
        assert model(torch.randn(1, 3, *size)).shape == (1, 3, *size)


def test_what_is_found_does_not_move_with_the_size_of_the_image() -> None:
    """More black to the right of black changes nothing but the mean of the whole map."""
    model = deeplab.deeplab("tiny_moat_0", 3, window=2).eval()
    model.pyramid.whole.register_forward_hook(lambda module, arguments, y: torch.zeros_like(y))
    x = torch.zeros(1, 3, 64, 128)
    black = model(x)[..., :48, :48]
    x[..., 20:40, 20:40] = 1
    with torch.inference_mode():
        square = model(x)[..., :48, :48]
        for width in (83, 96, 97, 112):
            difference = model(x[..., :width])[..., :48, :48] - square
            assert difference.norm() < 0.01 * (square - black).norm(), width


def test_both_kinds_of_blocks_give_the_same_numbers() -> None:
    stock = deeplab.deeplab("tiny_moat_0", 3, window=2, fused=False)
    fused = deeplab.deeplab("tiny_moat_0", 3, window=2, fused=True)
    fused.load_state_dict(stock.state_dict())
    x = torch.randn(2, 3, 64, 48).contiguous(memory_format=torch.channels_last)
    logits = [model(x) for model in (stock, fused)]
    torch.testing.assert_close(logits[1], logits[0], rtol=1e-3, atol=1e-4)
    for one in logits:
        one.square().mean().backward()
    for name, parameter in stock.named_parameters():
        gradient = fused.get_parameter(name).grad
        # Rounding moves some values across ReLU's corner, so single elements may differ.
        difference = (gradient - parameter.grad).norm()
        assert difference <= 0.01 * parameter.grad.norm() + 1e-5, name


def test_the_pyramid_sees_the_whole_map() -> None:
    """A change in one corner reaches the opposite one through the pooled branch alone."""
    pyramid = deeplab.Pyramid(4).eval()
    x = torch.zeros(1, 4, 45, 45)
    changed = x.clone()
    changed[0, 0, 0, 0] = 100
    with torch.no_grad():
        branches = [branch(changed) - branch(x) for branch in pyramid.branches]
        assert all(difference[0, :, -1, -1].abs().max() == 0 for difference in branches)
        assert (pyramid(changed) - pyramid(x))[0, :, -1, -1].abs().max() > 0


def test_every_parameter_is_in_one_group() -> None:
    model = deeplab.deeplab("tiny_moat_0", 3)
    groups = model.parameter_groups(lr=1e-3, weight_decay=0.05)
    grouped = [id(parameter) for group in groups for parameter in group["params"]]
    assert sorted(grouped) == sorted(map(id, model.parameters()))
    decayed = {id(one) for group in groups if group["weight_decay"] for one in group["params"]}
    assert id(model.classifier.weight) in decayed and id(model.classifier.bias) not in decayed
    assert id(model.low[1].weight) not in decayed
