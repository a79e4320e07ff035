"""torchvision's Mask R-CNN and pyramids around a MOAT: stock, fused and frozen."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Callable

import pytest
import torch
from support.fusing import check_same, run
from support.native import needs_extension
from support.peers import import_with_operators
from support.small_model import make_model
from support.tolerances import BACKEND_MODEL_OUTPUT, FUSED_MODEL, assert_close
from torch import Tensor, nn

import moat_kernels as mk
from moat_kernels.chains import FrozenChain
from moat_kernels.frozen_modules import FrozenBlock

detection = import_with_operators("torchvision.models.detection")
backbone_utils = import_with_operators("torchvision.models.detection.backbone_utils")
faster_rcnn = import_with_operators("torchvision.models.detection.faster_rcnn")
mask_rcnn = import_with_operators("torchvision.models.detection.mask_rcnn")
rpn = import_with_operators("torchvision.models.detection.rpn")
pyramids = import_with_operators("torchvision.ops.feature_pyramid_network")

SIDE, CLASSES, WIDTH, DETECTIONS = 64, 3, 8, 5
LOSSES = {
    *("loss_objectness", "loss_rpn_box_reg"),
    *("loss_classifier", "loss_box_reg", "loss_mask"),
}
Targets = list[dict[str, Tensor]]


class Pyramid(nn.Module):
    """As in docs/dense_prediction.md."""

    out_channels = WIDTH

    def __init__(self, body: mk.MOAT) -> None:
        super().__init__()
        self.body = body
        last = pyramids.LastLevelMaxPool()
        self.fpn = pyramids.FeaturePyramidNetwork(body.channels(), WIDTH, last)

    def forward(self, images: Tensor) -> OrderedDict[str, Tensor]:
        return self.fpn(OrderedDict((str(i), y) for i, y in enumerate(self.body(images))))


def make_detector(fused: bool, dtype: torch.dtype = torch.float32) -> nn.Module:
    """Mask R-CNN with all of its parts, small; the same weights at every call."""
    levels = {"features_only": True, "out_indices": (1, 2, 3, 4), "window_size": (None, None, 2, 2)}
    body = make_model(dtype, fused=fused, **levels)
    sizes = tuple((size,) for size in (8, 16, 32, 48, 64))
    detector = detection.MaskRCNN(
        Pyramid(body),
        min_size=SIDE,
        max_size=SIDE,
        rpn_anchor_generator=rpn.AnchorGenerator(sizes, ((1.0,),) * len(sizes)),
        rpn_pre_nms_top_n_train=20,
        rpn_pre_nms_top_n_test=20,
        rpn_post_nms_top_n_train=20,
        rpn_post_nms_top_n_test=20,
        rpn_batch_size_per_image=32,
        box_head=faster_rcnn.TwoMLPHead(WIDTH * 7 * 7, 16),
        box_predictor=faster_rcnn.FastRCNNPredictor(16, CLASSES),
        box_batch_size_per_image=16,
        box_detections_per_img=DETECTIONS,
        mask_head=mask_rcnn.MaskRCNNHeads(WIDTH, (8,), 1),
        mask_predictor=mask_rcnn.MaskRCNNPredictor(8, 8, CLASSES),
    )
    return detector.to(dtype)


def make_scenes(dtype: torch.dtype = torch.float32) -> tuple[list[Tensor], Targets]:
    """Noise with a bright square and a dark one in each image."""
    images, targets = [], []
    for x in (4, 20):
        image, masks = 0.1 * torch.randn(3, SIDE, SIDE) + 0.5, torch.zeros(2, SIDE, SIDE)
        boxes = torch.tensor([[x, 8, x + 20, 28], [x + 12, 34, x + 36, 58]])
        for mask, (left, top, right, bottom), level in zip(masks, boxes, (1.0, 0.0), strict=True):
            mask[top:bottom, left:right] = 1
            image[:, top:bottom, left:right] = level
        images.append(image.to(dtype))
        labels = torch.tensor([1, 2])
        targets.append({"boxes": boxes.to(dtype), "labels": labels, "masks": masks.to(torch.uint8)})
    return images, targets


def losses_of(detector: nn.Module, images: list[Tensor], targets: Targets) -> dict[str, Tensor]:
    torch.manual_seed(3)  # which proposals are trained on is drawn
    return detector.train()(images, copy.deepcopy(targets))


def test_fused_blocks_have_the_losses_and_gradients_of_stock_ones() -> None:
    scenes = make_scenes(torch.float64)
    stock, fused = (make_detector(blocks, torch.float64) for blocks in (False, True))
    fused.load_state_dict(stock.state_dict())
    expected, found = losses_of(stock, *scenes), losses_of(fused, *scenes)
    assert expected.keys() == LOSSES
    for name, loss in expected.items():
        assert_close(found[name], loss, FUSED_MODEL, name)
    for losses in (expected, found):
        torch.stack(list(losses.values())).sum().backward()
    for name, parameter in fused.backbone.body.named_parameters():
        # Biases before a norm may have none.
        assert parameter.grad.abs().sum() > 0 or name.endswith(".bias"), name
    for name, parameter in stock.named_parameters():
        assert_close(fused.get_parameter(name).grad, parameter.grad, FUSED_MODEL, name, floor=1e-3)


def test_detectors_learn_alike_and_detect() -> None:
    images, targets = make_scenes()
    histories = []
    for fused in (False, True):
        detector = make_detector(fused)
        optimizer = torch.optim.SGD(detector.parameters(), lr=0.02, momentum=0.9)
        histories.append([])
        for _ in range(6):
            loss = torch.stack(list(losses_of(detector, images, targets).values())).sum()
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(detector.parameters(), 1.0)
            optimizer.step()
            histories[-1].append(loss.item())
        assert torch.tensor(histories[-1]).isfinite().all()
        assert histories[-1][-1] < 0.8 * histories[-1][0]
        with torch.no_grad():
            found = detector.eval()([images[0], torch.rand(3, 50, 40)])
        for result, size in zip(found, ((SIDE, SIDE), (50, 40)), strict=True):
            assert result["boxes"].shape == (DETECTIONS, 4)
            assert result["masks"].shape == (DETECTIONS, 1, *size)
            assert all(tensor.isfinite().all() for tensor in result.values())
    assert histories[1][0] == pytest.approx(histories[0][0], rel=1e-4)


def freeze_body(detector: nn.Module) -> nn.Module:
    frozen = copy.deepcopy(detector)
    frozen.backbone.body = mk.freeze(frozen.backbone.body)
    return frozen


@needs_extension
@pytest.mark.parametrize("freeze", [freeze_body, mk.freeze])
@torch.no_grad()
def test_a_frozen_backbone_detects_the_same(freeze: Callable[[nn.Module], nn.Module]) -> None:
    stock, fused, scenes = make_detector(False), make_detector(True), make_scenes()
    for _ in range(3):  # statistics of batches
        losses_of(stock, *scenes)
    fused.load_state_dict(stock.state_dict())
    frozen = freeze(fused.eval())
    assert isinstance(frozen.backbone.body, mk.FrozenMOAT)
    images = [*scenes[0], torch.rand(3, 50, 40)]
    for expected, found in zip(stock.eval()(images), frozen(images), strict=True):
        assert len(expected["scores"]) == DETECTIONS
        assert torch.equal(found.pop("labels"), expected["labels"])
        for name, tensor in found.items():
            assert_close(tensor, expected[name], BACKEND_MODEL_OUTPUT, name)


def levels_in_turn(model: mk.MOAT) -> nn.Sequential:
    """As in docs/dense_prediction.md."""
    stages = {f"stage{number}": nn.Sequential(*stage) for number, stage in enumerate(model.stages)}
    return nn.Sequential(OrderedDict(stem=model.stem, **stages))


def make_pyramid(model: mk.MOAT) -> nn.Module:
    """Of the levels 2 and 4."""
    torch.manual_seed(1)
    levels = {"stage1": "0", "stage3": "1"}
    return backbone_utils.BackboneWithFPN(levels_in_turn(model), levels, [16, 64], WIDTH)


class Maps(nn.Module):
    """A pyramid's maps in a list."""

    def __init__(self, pyramid: nn.Module) -> None:
        super().__init__()
        self.pyramid = pyramid

    def forward(self, images: Tensor) -> list[Tensor]:
        return list(self.pyramid(images).values())


def test_a_pyramid_of_levels_in_turn() -> None:
    """Its maps are the raw outputs of the levels; fused blocks give what stock ones give."""
    x = torch.randn(2, 3, 70, 52, dtype=torch.float64)
    results = []
    for fused in (False, True):
        model = make_model(fused=fused, features_only=True, depths=(1, 2, 1, 1))
        pyramid = make_pyramid(model).double()
        results.append(run(Maps(pyramid), x, training=True))
        stages = model.eval().forward_stages(x)
        found = pyramid.eval().body(x)
        assert list(found) == ["0", "1"]
        for name, level in (("0", 2), ("1", 4)):
            assert_close(found[name], stages[level], FUSED_MODEL)
    check_same(results[1], results[0])


@needs_extension
@torch.no_grad()
def test_a_frozen_pyramid() -> None:
    model = make_model(torch.float32, features_only=True, depths=(1, 2, 1, 1)).eval()
    pyramid = make_pyramid(model).eval()
    frozen = mk.freeze(pyramid)
    kinds = [type(module) for module in frozen.body.values()]
    assert FrozenBlock in kinds and any(issubclass(kind, FrozenChain) for kind in kinds)
    x = torch.randn(2, 3, 70, 52)
    for found, expected in zip(frozen(x).values(), pyramid(x).values(), strict=True):
        assert_close(found, expected, BACKEND_MODEL_OUTPUT)
