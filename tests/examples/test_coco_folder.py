"""Folders in COCO's format: read as they are meant, or what is wrong with them is named."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("PIL", reason="the example needs Pillow")
pytest.importorskip("pycocotools", reason="the example needs pycocotools")

import photographs
from average_precision import Evaluation
from coco_annotations import encode
from coco_folder import CocoFolder
from photographs import DataError
from PIL import Image
from pycocotools import mask as run_lengths
from scenes import Scene
from support.coco import SIDE, WIDTH, write_folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    photographs.read_image.cache_clear()
    return write_folder(tmp_path / "data")


def change(folder: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    """Edit the annotations."""
    path = folder / "annotations.json"
    content = json.loads(path.read_text())
    edit(content)
    path.write_text(json.dumps(content))


def test_objects_have_the_masks_and_classes_that_were_annotated(folder):
    data = CocoFolder(folder)
    assert data.classes == ["bright", "dark"]
    assert [picture.path.name for picture in data.training] == ["0.png", "1.png", "2.png"]
    (scene,) = data.held_out()
    assert scene.image.shape == (3, SIDE, WIDTH)
    assert scene.labels.tolist() == [1, 2] and scene.ignored.tolist() == [False, False]
    # Drawn in both ways, as a polygon and as run lengths, of the same bright and dark squares.
    assert torch.equal(scene.masks[0], scene.image[0] > 0.9)
    assert torch.equal(scene.masks[1], scene.image[0] < 0.1)


def test_crops_show_objects_where_they_are(folder):
    data = CocoFolder(folder)
    crops = [data.crop(position, 0, 64) for position in range(8)]
    for crop in crops:
        assert crop.image.shape == (3, 64, 64) and crop.masks.shape == (2, 64, 64)
        assert crop.image[0][crop.masks[0]].mean() > 0.85
    again = data.crop(3, 0, 64)
    assert torch.equal(again.image, crops[3].image) and torch.equal(again.masks, crops[3].masks)
    assert not torch.equal(data.crop(3, 1, 64).image, crops[3].image)


def corrupt(folder: Path) -> None:
    path = folder / "images" / "1.png"
    path.write_bytes(path.read_bytes()[:60])


def resize(folder: Path) -> None:
    Image.new("RGB", (50, 40)).save(folder / "images" / "1.png")


def annotation(index: int, key: str, value: Any) -> Callable[[Path], None]:
    def edit(content: dict[str, Any]) -> None:
        content["annotations"][index][key] = value

    return lambda folder: change(folder, edit)


def keep_one_image(content: dict[str, Any]) -> None:
    content["images"] = content["images"][:1]
    content["annotations"] = content["annotations"][:2]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (corrupt, r"cannot read the image .*1\.png: "),
        (lambda folder: (folder / "images" / "1.png").unlink(), "1.png: there is no such file"),
        (resize, r"1\.png has 50 x 40 pixels, and not 96 x 80 as is said of it"),
        (lambda folder: (folder / "annotations.json").unlink(), "cannot read .*annotations.json"),
        (lambda folder: (folder / "annotations.json").write_text("{"), "must be in COCO's format"),
        (lambda folder: (folder / "annotations.json").write_text("{}"), "has no list 'images'"),
        (lambda folder: change(folder, keep_one_image), "lists 1 image, two at least are needed"),
        (
            annotation(0, "image_id", 99),
            r"annotations\[0\] \(id 0\): image_id 99 is not among the 4",
        ),
        (annotation(0, "category_id", 9), "category_id 9 is not among the 2"),
        (annotation(0, "image_id", []), r"annotations\[0\] \(id 0\): "),
        (
            annotation(0, "bbox", [90, 10, 10, 20]),
            "bbox reaches from 90 to 100, beyond its image of",
        ),
        (annotation(0, "bbox", [1, 1, -5, 5]), "bbox must be left, top, width and height"),
        (annotation(0, "bbox", [1, 1, float("nan"), 5]), "bbox must be a list of numbers"),
        (annotation(0, "segmentation", []), "must be a list of polygons or run lengths"),
        (annotation(0, "segmentation", [[1, 1, 9, 9]]), "needs x and y of three points"),
        (annotation(0, "segmentation", [[1, 1, 9, 9, 99, 1]]), "segmentation reaches from 1 to 99"),
        (
            annotation(0, "segmentation", {"size": [96, 80], "counts": [7680]}),
            r"segmentation is of size \[96, 80\], its image of \[80, 96\]",
        ),
        (
            annotation(0, "segmentation", {"size": [80, 96], "counts": "00"}),
            "run lengths of segmentation are not of 7680 pixels",
        ),
        (
            annotation(0, "segmentation", {"size": [80, 96], "counts": [-1, 7681]}),
            "run lengths of segmentation are not of 7680 pixels",
        ),
        (
            lambda folder: change(folder, lambda content: content["annotations"][1].pop("bbox")),
            r"annotations\[1\] \(id 1\): has no 'bbox'",
        ),
        (
            lambda folder: change(folder, lambda content: content["images"][1].update(id=0)),
            "id 0 was used before",
        ),
        (
            lambda folder: change(folder, lambda content: content.update(annotations=[])),
            "has no object in any image that is trained on",
        ),
    ],
)
def test_what_cannot_be_used_is_named(folder, damage, message):
    damage(folder)
    with pytest.raises(DataError, match=message):
        CocoFolder(folder)


def test_run_lengths_are_read_in_every_form():
    random = np.random.default_rng(0)
    for height, width in ((1, 1), (7, 40), (64, 5)):
        mask = np.asfortranarray(random.random((height, width)) < 0.3).astype(np.uint8)
        compressed = run_lengths.encode(mask)["counts"].decode()
        flat = mask.ravel(order="F")
        edges = np.flatnonzero(np.diff(np.concatenate([[0], flat]))).tolist()
        counts = np.diff([0, *edges, flat.size]).tolist()
        for form in (compressed, counts):
            encoded = encode({"size": [height, width], "counts": form}, width, height)
            assert np.array_equal(run_lengths.decode(encoded), mask)


def test_objects_without_a_pixel_are_left_out_with_a_warning(folder, capsys):
    annotation(0, "segmentation", [[5, 5, 5, 5, 5, 5]])(folder)
    assert [len(picture.objects) for picture in CocoFolder(folder).training] == [1, 2, 2]
    assert "warning: 1 annotations of no pixel are left out: 0" in capsys.readouterr().err


def scene(*columns: slice, ignored: tuple[bool, ...]) -> Scene:
    masks = torch.zeros(len(columns), 16, 64, dtype=torch.bool)
    for mask, one in zip(masks, columns, strict=True):
        mask[:, one] = True
    labels = torch.ones(len(columns), dtype=torch.int64)
    return Scene(torch.zeros(3, 16, 64), masks, labels, torch.tensor(ignored))


def precision(there: Scene, found: Scene, scores: list[float]) -> tuple[float, float]:
    evaluation = Evaluation(classes=1)
    detections = {"boxes": found.boxes(), "labels": found.labels, "scores": torch.tensor(scores)}
    evaluation.add(there, {**detections, "masks": found.masks[:, None].float()})
    result = evaluation.result()
    return result.box, result.mask_50


def test_average_precision_of_cases_counted_by_hand():
    left, right = slice(0, 20), slice(40, 64)
    both = scene(left, right, ignored=(False, False))
    one, none = scene(left, ignored=(False,)), scene(ignored=())
    assert precision(both, both, [0.9, 0.8]) == pytest.approx((1, 1))
    # Of 101 recalls 0, 0.01, .. 1 those up to 0.5 are reached.
    assert precision(both, one, [0.9]) == pytest.approx((51 / 101, 51 / 101))
    assert precision(both, none, []) == (0, 0)
    # A false alarm of higher score halves the precision; not if what it shows is to be ignored.
    assert precision(one, both, [0.8, 0.9]) == pytest.approx((0.5, 0.5))
    assert precision(scene(left, right, ignored=(False, True)), both, [0.8, 0.9]) == pytest.approx(
        (1, 1)
    )
    # 16 of 20 columns: an IoU of 0.8, reached by the thresholds 0.5, 0.55, .. 0.8, 7 of 10.
    assert precision(one, scene(slice(0, 16), ignored=(False,)), [0.9]) == pytest.approx((0.7, 1))
