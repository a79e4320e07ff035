"""Cascade Mask R-CNN on a MOAT backbone, built of torchvision's parts.

The detector of the MOAT paper's section 3.2 (Cai and Vasconcelos, arXiv 1906.09756): a feature
pyramid, proposals, three box heads one after the other, each trained at a higher IoU on the boxes
that the one before has refined, and a mask head on the boxes of the last.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import moat_kernels
from moat_kernels.variants import Preprocessing

try:
    from torchvision.models.detection import roi_heads
    from torchvision.models.detection._utils import BoxCoder
    from torchvision.models.detection.faster_rcnn import TwoMLPHead
    from torchvision.models.detection.generalized_rcnn import GeneralizedRCNN
    from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
    from torchvision.models.detection.rpn import AnchorGenerator, RegionProposalNetwork, RPNHead
    from torchvision.models.detection.transform import GeneralizedRCNNTransform
    from torchvision.ops import FeaturePyramidNetwork, MultiScaleRoIAlign, clip_boxes_to_image, nms
    from torchvision.ops.feature_pyramid_network import LastLevelMaxPool

    nms(torch.zeros(1, 4), torch.zeros(1), 0.5)
except ModuleNotFoundError as error:
    raise ImportError(
        "Cascade Mask R-CNN is made of parts of torchvision, which is not installed: "
        "pip install torchvision, from where torch was installed"
    ) from error
except RuntimeError as error:  # at the latest that of nms, without its operator
    raise ImportError(
        f"this torchvision has no operators for torch {torch.__version__}, install both from one "
        f"index, see https://pytorch.org/get-started: {error}"
    ) from error

# Of the three stages.
IOU_THRESHOLDS = (0.5, 0.6, 0.7)  # a proposal of at least that overlap with an object shows it
BOX_WEIGHTS = ((10.0, 10.0, 5.0, 5.0), (20.0, 20.0, 10.0, 10.0), (30.0, 30.0, 15.0, 15.0))
LOSS_WEIGHTS = (1.0, 0.5, 0.25)

WINDOW_SIZE = (None, None, 14, 7)  # in tokens, as many as a classifier's whole map at 224 px
STRIDES = (4, 8, 16, 32)
LEVELS = ["0", "1", "2", "3"]  # of the pyramid that boxes are pooled from; proposals use one more
ASPECT_RATIOS = (0.5, 1.0, 2.0)

BoxesByImage = list[Tensor]
Target = dict[str, Tensor]


@dataclass(frozen=True)
class Sizes:
    """How wide the detector is, and how many boxes it looks at; as usual for COCO.

    channels: of the pyramid.
    mask_channels: of the mask head.
    hidden: features of a box in the box heads.
    anchor: side in pixels of the smallest anchors; each level of the pyramid doubles it.
    proposals: that the first box head gets of each image.
    samples: of those, how many are trained on, in each stage.
    objects: the share of samples that show objects, at most.
    detections: of each image at most.
    """

    channels: int = 256
    mask_channels: int = 256
    hidden: int = 1024
    anchor: int = 32
    proposals: int = 1000
    samples: int = 512
    objects: float = 0.25
    detections: int = 100


def make_detector(model: str, num_classes: int, sizes: Sizes, **options: Any) -> GeneralizedRCNN:
    """Cascade Mask R-CNN on a MOAT by name.

    num_classes: of objects; the background is one more, and is label 0.
    options: of `moat_kernels.create_model`, such as fused.

    In training it takes images (list of [3, H, W] float32, 0..1) and targets (list of dicts: boxes
    [N, 4] float32, left, top, right, bottom; labels [N] int64; masks [N, H, W]) and returns a dict
    of losses whose sum is to be minimised. In eval it takes images and returns dicts of boxes,
    labels, scores and masks ([N, 1, H, W], 0..1).
    """
    moat = moat_kernels.create_model(
        model,
        features_only=True,
        out_indices=(1, 2, 3, 4),
        window_size=WINDOW_SIZE,
        pool_size=3,
        **options,
    )
    return GeneralizedRCNN(
        FeaturePyramid(moat, sizes.channels),
        proposal_network(sizes),
        CascadeHeads(num_classes + 1, sizes),
        Normalization(moat_kernels.get_preprocessing(model)),
    )


class Normalization(GeneralizedRCNNTransform):
    """Mean and deviation of the model's images; the images keep the size that they come in."""

    def __init__(self, preprocessing: Preprocessing) -> None:
        mean, std = list(preprocessing.mean), list(preprocessing.std)
        super().__init__(1, 1, mean, std, size_divisible=STRIDES[-1])

    def resize(self, image: Tensor, target: Target | None = None) -> tuple[Tensor, Target | None]:
        return image, target


class FeaturePyramid(nn.Module):
    """MOAT's maps at strides 4 to 32 as a pyramid of so many channels, and one level above."""

    def __init__(self, moat: nn.Module, channels: int) -> None:
        super().__init__()
        self.moat = moat
        self.pyramid = FeaturePyramidNetwork(moat.channels(), channels, LastLevelMaxPool())
        self.out_channels = channels

    def forward(self, images: Tensor) -> OrderedDict[str, Tensor]:
        return self.pyramid(OrderedDict(zip(LEVELS, self.moat(images), strict=True)))


def proposal_network(sizes: Sizes) -> RegionProposalNetwork:
    """Where objects of any class may be: anchors of one size on each level, each refined once."""
    levels = len(LEVELS) + 1
    anchors = AnchorGenerator(
        tuple((sizes.anchor * 2**level,) for level in range(levels)), (ASPECT_RATIOS,) * levels
    )
    before_nms = 2 * sizes.proposals
    return RegionProposalNetwork(
        anchors,
        RPNHead(sizes.channels, len(ASPECT_RATIOS)),
        fg_iou_thresh=0.7,
        bg_iou_thresh=0.3,
        batch_size_per_image=256,
        positive_fraction=0.5,
        pre_nms_top_n={"training": before_nms, "testing": before_nms},
        post_nms_top_n={"training": sizes.proposals, "testing": sizes.proposals},
        nms_thresh=0.7,
    )


class BoxPredictor(nn.Module):
    """Logits of the classes, and one shift of the box whatever its class.

    [N, hidden] -> [N, num_classes], [N, 4].
    """

    def __init__(self, hidden: int, num_classes: int) -> None:
        super().__init__()
        self.scores = nn.Linear(hidden, num_classes)
        self.shift = nn.Linear(hidden, 4)
        # As small as the targets are: boxes stay where they are until it is known better.
        nn.init.normal_(self.shift.weight, std=0.001)
        nn.init.zeros_(self.shift.bias)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.scores(x), self.shift(x)


class CascadeHeads(nn.Module):
    """Three box heads and a mask head: what GeneralizedRCNN calls `roi_heads`."""

    def __init__(self, num_classes: int, sizes: Sizes) -> None:
        super().__init__()
        self.stages = nn.ModuleList(
            roi_heads.RoIHeads(
                MultiScaleRoIAlign(LEVELS, output_size=7, sampling_ratio=2),
                TwoMLPHead(sizes.channels * 7 * 7, sizes.hidden),
                BoxPredictor(sizes.hidden, num_classes),
                fg_iou_thresh=iou,
                bg_iou_thresh=iou,
                batch_size_per_image=sizes.samples,
                positive_fraction=sizes.objects,
                bbox_reg_weights=weights,
                score_thresh=0.05,
                nms_thresh=0.5,
                detections_per_img=sizes.detections,
            )
            for iou, weights in zip(IOU_THRESHOLDS, BOX_WEIGHTS, strict=True)
        )
        self.mask_pool = MultiScaleRoIAlign(LEVELS, output_size=14, sampling_ratio=2)
        self.mask_head = nn.Sequential(
            MaskRCNNHeads(sizes.channels, (sizes.mask_channels,) * 4, dilation=1),
            MaskRCNNPredictor(sizes.mask_channels, sizes.mask_channels, num_classes),
        )

    def forward(
        self,
        features: OrderedDict[str, Tensor],
        proposals: BoxesByImage,
        image_sizes: list[tuple[int, int]],
        targets: list[Target] | None = None,
    ) -> tuple[list[Target], dict[str, Tensor]]:
        """Detections in eval, losses in training; the other is empty."""
        if self.training:
            assert targets is not None
            return [], self.losses(features, proposals, image_sizes, targets)
        return self.detections(features, proposals, image_sizes), {}

    def losses(
        self,
        features: OrderedDict[str, Tensor],
        boxes: BoxesByImage,
        image_sizes: list[tuple[int, int]],
        targets: list[Target],
    ) -> dict[str, Tensor]:
        """Weighted losses of each stage's classes and boxes, and of the masks."""
        losses = {}
        for number, (stage, weight) in enumerate(zip(self.stages, LOSS_WEIGHTS, strict=True), 1):
            # The objects' own boxes are added to what is sampled from: every stage sees objects.
            boxes, matches, labels, best_shifts = stage.select_training_samples(boxes, targets)
            scores, shifts = _predict(stage, features, boxes, image_sizes)
            of_classes, of_boxes = roi_heads.fastrcnn_loss(
                scores, _for_each_class(shifts, scores), labels, best_shifts
            )
            losses[f"classes {number}"] = weight * of_classes
            losses[f"boxes {number}"] = weight * of_boxes
            sampled, boxes = boxes, refine(stage.box_coder, shifts, boxes, image_sizes)
        objects = [one > 0 for one in labels]
        boxes = [one[keep] for one, keep in zip(sampled, objects, strict=True)]
        matches = [one[keep] for one, keep in zip(matches, objects, strict=True)]
        losses["masks"] = roi_heads.maskrcnn_loss(
            self._mask_logits(features, boxes, image_sizes),
            boxes,
            [target["masks"] for target in targets],
            [target["labels"] for target in targets],
            matches,
        )
        return losses

    def detections(
        self,
        features: OrderedDict[str, Tensor],
        boxes: BoxesByImage,
        image_sizes: list[tuple[int, int]],
    ) -> list[Target]:
        """The boxes that the last stage makes, scored by all three, each with its mask."""
        probabilities = []
        for stage in self.stages:
            scores, shifts = _predict(stage, features, boxes, image_sizes)
            probabilities.append(scores.softmax(-1))
            scored, boxes = boxes, refine(stage.box_coder, shifts, boxes, image_sizes)
        boxes, scores, labels = stage.postprocess_detections(
            # Softmax, which follows, makes probabilities of their logarithms again.
            torch.stack(probabilities).mean(0).log(),
            _for_each_class(shifts, scores),
            scored,
            image_sizes,
        )
        masks = roi_heads.maskrcnn_inference(
            self._mask_logits(features, boxes, image_sizes), labels
        )
        names = ("boxes", "scores", "labels", "masks")
        images = zip(boxes, scores, labels, masks, strict=True)
        return [dict(zip(names, image, strict=True)) for image in images]

    def _mask_logits(
        self,
        features: OrderedDict[str, Tensor],
        boxes: BoxesByImage,
        image_sizes: list[tuple[int, int]],
    ) -> Tensor:
        """[boxes of all images, num_classes, 28, 28]."""
        return self.mask_head(self.mask_pool(features, boxes, image_sizes))


def refine(
    coder: BoxCoder, shifts: Tensor, boxes: BoxesByImage, image_sizes: Sequence[tuple[int, int]]
) -> BoxesByImage:
    """Each image's boxes, moved as a stage predicts and cut off at the image's edges.

    No gradient flows through them: to the next stage they are proposals like others.
    """
    moved = coder.decode(shifts.detach(), boxes).reshape(-1, 4).split([len(one) for one in boxes])
    return [clip_boxes_to_image(*one) for one in zip(moved, image_sizes, strict=True)]


def _predict(
    stage: roi_heads.RoIHeads,
    features: OrderedDict[str, Tensor],
    boxes: BoxesByImage,
    image_sizes: list[tuple[int, int]],
) -> tuple[Tensor, Tensor]:
    """What a stage says about boxes: logits of their classes, and how to shift them."""
    return stage.box_predictor(stage.box_head(stage.box_roi_pool(features, boxes, image_sizes)))


def _for_each_class(shifts: Tensor, scores: Tensor) -> Tensor:
    """[N, 4] -> [N, 4 * num_classes]: torchvision's functions look for one shift per class."""
    return shifts.repeat(1, scores.shape[1])
