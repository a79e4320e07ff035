"""A small folder of images with annotations in COCO's format."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

SIDE, WIDTH = 80, 96
IMAGES = 4
OBJECT = 24  # pixels on a side


def write_folder(folder: Path) -> Path:
    """Grey images, each with a bright square (a polygon) and a dark one (run lengths)."""
    from PIL import Image

    (folder / "images").mkdir(parents=True)
    random = np.random.default_rng(0)
    images, annotations = [], []
    for number in range(IMAGES):
        pixels = np.full((SIDE, WIDTH, 3), 128, np.uint8)
        for label, (first, color) in enumerate(((4, 255), (52, 0)), start=1):
            left, top = int(random.integers(first, first + 16)), int(random.integers(4, 50))
            right, bottom = left + OBJECT, top + OBJECT
            pixels[top:bottom, left:right] = color
            polygon = [[left, top, right, top, right, bottom, left, bottom]]
            mask = (pixels[:, :, 0] == color).ravel(order="F")
            edges = np.flatnonzero(np.diff(np.concatenate([[False], mask])))
            counts = np.diff([0, *edges, mask.size]).tolist()
            annotations.append(
                {
                    "id": len(annotations),
                    "image_id": number,
                    "category_id": label,
                    "bbox": [left, top, OBJECT, OBJECT],
                    "segmentation": polygon
                    if label == 1
                    else {"size": [SIDE, WIDTH], "counts": counts},
                }
            )
        name = f"{number}.png"
        Image.fromarray(pixels).save(folder / "images" / name)
        images.append({"id": number, "file_name": name, "width": WIDTH, "height": SIDE})
    categories = [{"id": 1, "name": "bright"}, {"id": 2, "name": "dark"}]
    content = {"images": images, "categories": categories, "annotations": annotations}
    (folder / "annotations.json").write_text(json.dumps(content))
    return folder
