"""COCO's average precision of boxes and masks, by the pycocotools package."""

from __future__ import annotations

import io
from collections.abc import Mapping
from contextlib import redirect_stdout
from dataclasses import dataclass
from typing import Any

import numpy as np
from pycocotools import mask as run_lengths
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from scenes import Scene
from torch import Tensor

MASK_THRESHOLD = 0.5  # of a mask's probabilities


@dataclass(frozen=True)
class AveragePrecision:
    """box and mask: the mean over IoU thresholds 0.5, 0.55, .. 0.95; box_50, mask_50: at 0.5."""

    box: float
    mask: float
    box_50: float
    mask_50: float


def best_step(precisions: Mapping[int, AveragePrecision]) -> int:
    """Of precisions by step the step of the highest box AP; among those, of the highest mask AP."""
    return max(precisions, key=lambda step: (precisions[step].box, precisions[step].mask))


class Evaluation:
    """Collects what was found in scenes, beside what is there; of each 100 detections count."""

    def __init__(self, classes: int) -> None:
        self._categories = [{"id": number} for number in range(1, classes + 1)]
        self._images: list[dict[str, Any]] = []
        self._truth: list[dict[str, Any]] = []
        self._found: list[dict[str, Any]] = []

    def add(self, scene: Scene, found: dict[str, Tensor]) -> None:
        """found: boxes, labels, scores and masks, as the detector returns them."""
        height, width = scene.image.shape[1:]
        self._images.append({"id": len(self._images) + 1, "height": height, "width": width})
        objects = zip(scene.masks, scene.boxes(), scene.labels, scene.ignored, strict=True)
        for mask, box, label, ignored in objects:
            self._add(self._truth, mask, box, label, iscrowd=int(ignored))
        masks = found["masks"][:, 0] > MASK_THRESHOLD
        objects = zip(masks, found["boxes"], found["labels"], found["scores"], strict=True)
        for mask, box, label, score in objects:
            self._add(self._found, mask, box, label, iscrowd=0, score=float(score))

    def _add(
        self,
        annotations: list[dict[str, Any]],
        mask: Tensor,
        box: Tensor,
        label: Tensor,
        **more: float,
    ) -> None:
        left, top, right, bottom = box.tolist()
        encoded = run_lengths.encode(np.asfortranarray(mask.numpy().astype(np.uint8)))
        annotations.append(
            {
                "id": len(annotations) + 1,  # 0 would be taken for none
                "image_id": self._images[-1]["id"],
                "category_id": int(label),
                "bbox": [left, top, right - left, bottom - top],
                "segmentation": encoded,
                "area": float(run_lengths.area(encoded)),
                **more,
            }
        )

    def result(self) -> AveragePrecision:
        """Of all that was added."""
        values = []
        with redirect_stdout(io.StringIO()):  # it prints what it is doing
            truth, found = self._collection(self._truth), self._collection(self._found)
            for kind in ("bbox", "segm"):
                evaluation = COCOeval(truth, found, kind)
                evaluation.evaluate()
                evaluation.accumulate()
                evaluation.summarize()
                values.append([float(value) for value in evaluation.stats[:2]])
        (box, box_50), (mask, mask_50) = values
        return AveragePrecision(box, mask, box_50, mask_50)

    def _collection(self, annotations: list[dict[str, Any]]) -> COCO:
        collection = COCO()
        collection.dataset = {
            "images": self._images,
            "categories": self._categories,
            "annotations": annotations,
        }
        collection.createIndex()
        return collection
