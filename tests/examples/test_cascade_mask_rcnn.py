"""The parts of the cascade against values computed by hand, and the detector as a whole."""

from __future__ import annotations

import math
import runpy
import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path

import pytest
import torch
from support.example_program import SMALL_SIZES, small_model
from support.native import needs_extension
from support.peers import import_detector
from torch import Tensor
from torch.nn import Module

import moat_kernels

cascade = import_detector("cascade_mask_rcnn")
SIZES = cascade.Sizes(**SMALL_SIZES)
SIZE = (64, 64)


@pytest.fixture
def heads() -> Module:
    torch.manual_seed(0)
    return cascade.CascadeHeads(num_classes=2, sizes=SIZES)


@pytest.fixture
def features() -> dict[str, Tensor]:
    return {str(level): torch.randn(1, 8, 16 >> level, 16 >> level) for level in range(4)}


@pytest.fixture
def detector(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Module]:
    monkeypatch.setattr(moat_kernels, "create_model", small_model)

    def make(**options: object) -> Module:
        torch.manual_seed(0)
        return cascade.make_detector("tiny_moat_0", 1, SIZES, **options)

    return make


def target(*boxes: tuple[int, int, int, int]) -> dict[str, Tensor]:
    masks = torch.zeros(len(boxes), *SIZE, dtype=torch.uint8)
    for mask, (left, top, right, bottom) in zip(masks, boxes, strict=True):
        mask[top:bottom, left:right] = 1
    return {
        "boxes": torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4),
        "labels": torch.ones(len(boxes), dtype=torch.int64),
        "masks": masks,
    }


def test_a_box_moves_by_shares_of_its_size_and_ends_at_the_edge(heads):
    box = torch.tensor([[10.0, 10.0, 30.0, 50.0]])  # of 20 x 40 around (20, 30)
    # By 1/10 of the width, -2/10 of the height; exp(5 ln 2 / 5) of the width, 1 of the height.
    shift = torch.tensor([[1.0, -2.0, 5 * math.log(2), 0.0]])
    coders = [stage.box_coder for stage in heads.stages]
    (moved,) = cascade.refine(coders[0], shift, [box], [(100, 100)])
    torch.testing.assert_close(moved, torch.tensor([[2.0, 2.0, 42.0, 42.0]]))
    (cut,) = cascade.refine(coders[0], shift, [box], [(40, 35)])
    torch.testing.assert_close(cut, torch.tensor([[2.0, 2.0, 35.0, 40.0]]))
    # Later stages mean smaller shifts by the same numbers: here 1/20 and 1/30 of the width.
    for coder, center in zip(coders, (22.0, 21.0, 20 + 2 / 3), strict=True):
        (moved,) = cascade.refine(coder, torch.tensor([[1.0, 0, 0, 0]]), [box], [(100, 100)])
        torch.testing.assert_close(moved[0, [0, 2]].mean(), torch.tensor(center))
    assert cascade.refine(coders[0], torch.zeros(0, 4), [box[:0]], [SIZE])[0].shape == (0, 4)


def test_later_stages_ask_for_more_overlap(heads):
    object_ = target((0, 0, 40, 40))
    candidates = torch.tensor(
        [[0.0, 0, 40, 22], [0, 0, 40, 26], [0, 0, 40, 30]]
    )  # 0.55, 0.65, 0.75
    for stage, found in zip(heads.stages, (3, 2, 1), strict=True):
        (boxes,), _, (labels,), _ = stage.select_training_samples([candidates], [object_])
        assert int(labels.sum()) == found + 1  # the object's own box is added
        assert len(boxes) == 4


def test_losses_of_later_stages_weigh_less(heads, features, monkeypatch):
    monkeypatch.setattr(
        cascade.roi_heads,
        "fastrcnn_loss",
        lambda *arguments: (torch.tensor(8.0), torch.tensor(4.0)),
    )
    losses = heads(features, [torch.tensor([[0.0, 0, 30, 30]])], [SIZE], [target((0, 0, 40, 40))])[
        1
    ]
    expected = {"classes 1": 8, "boxes 1": 4, "classes 2": 4, "boxes 2": 2}
    assert {name: float(loss) for name, loss in losses.items() if name != "masks"} == {
        **expected,
        "classes 3": 2,
        "boxes 3": 1,
    }


def test_scores_are_the_mean_of_the_stages_and_boxes_pass_all_three(heads, features):
    heads.eval()
    # Softmax makes 0.5, 0.75 and 0.9 of these; each stage moves by 1/4 of the width of 20.
    for stage, odds, weight in zip(heads.stages, (1, 3, 9), (10, 20, 30), strict=True):
        prediction = torch.tensor([[0.0, math.log(odds)]]), torch.tensor([[weight / 4, 0, 0, 0]])
        stage.box_predictor = Constant(*prediction)
    (found,), losses = heads(features, [torch.tensor([[10.0, 10, 30, 30]])], [SIZE])
    torch.testing.assert_close(found["scores"], torch.tensor([(0.5 + 0.75 + 0.9) / 3]))
    torch.testing.assert_close(found["boxes"], torch.tensor([[25.0, 10, 45, 30]]))
    assert found["labels"].tolist() == [1] and found["masks"].shape == (1, 1, 28, 28)
    assert losses == {}


class Constant(Module):
    """Says the same of one box whatever it shows."""

    def __init__(self, *prediction: Tensor) -> None:
        super().__init__()
        self.prediction = prediction

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return self.prediction


def test_nothing_found_is_an_answer(heads, features):
    heads.eval()
    for boxes in (torch.zeros(0, 4), torch.tensor([[5.0, 5, 5, 5]])):
        for stage in heads.stages:
            stage.score_thresh = 1.0
        ((found,), _) = heads(features, [boxes], [SIZE])
        assert found["boxes"].shape == (0, 4) and found["masks"].shape == (0, 1, 28, 28)


@pytest.mark.parametrize("boxes", [[], [(8, 8, 30, 40)]], ids=["nothing", "an object"])
def test_losses_are_finite_and_every_parameter_learns(detector, boxes):
    model = detector()
    losses = model([torch.rand(3, *SIZE)], [target(*boxes)])
    assert all(loss.isfinite() for loss in losses.values())
    sum(losses.values()).backward()
    idle = [name for name, each in model.named_parameters() if each.grad is None]
    assert not idle


@needs_extension
def test_a_frozen_backbone_finds_the_same(detector):
    model = detector().eval()
    image = torch.rand(3, *SIZE)
    for stage in model.roi_heads.stages:
        stage.score_thresh = 0.0
    with torch.inference_mode():
        (expected,) = model([image])
        model.backbone.moat = moat_kernels.freeze(model.backbone.moat)
        (found,) = model([image])
    assert len(expected["boxes"]) > 1
    for name, values in expected.items():
        torch.testing.assert_close(found[name], values, rtol=1e-3, atol=1e-3)


def no_operator(*arguments: Tensor) -> None:
    raise RuntimeError("Couldn't load custom C++ ops")


@pytest.mark.parametrize(
    ("owner", "name", "value", "message"),
    [
        (sys.modules, "torchvision.models.detection", None, "not installed: pip install torchvis"),
        (
            vars(import_module("torchvision.ops")),
            "nms",
            no_operator,
            "has no operators for torch .*load custom C",
        ),
        (sys.modules, "pycocotools", None, "pycocotools.* --no-deps -r requirements-examples"),
    ],
    ids=["no torchvision", "no operators", "no evaluator"],
)
def test_the_program_says_what_it_lacks(monkeypatch, owner, name, value, message):
    for module in ("cascade_mask_rcnn", "detector_training", "average_precision"):
        monkeypatch.delitem(sys.modules, module, raising=False)
    monkeypatch.setitem(owner, name, value)
    program = Path(cascade.__file__).with_name("detect.py")
    with pytest.raises(SystemExit, match=message):
        runpy.run_path(str(program))
