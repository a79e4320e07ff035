"""Reads annotations in COCO's format (instances_*.json), and says what cannot be used."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from photographs import DataError, read_image
from pycocotools import mask as run_lengths

IMAGES, ANNOTATIONS = "images", "annotations.json"
TOLERANCE = 1.0  # pixels that a box or a polygon may reach beyond its image, as some of COCO's do
NAMED = 20  # of what cannot be used, at most; the rest is counted

EncodedMask = dict[str, Any]  # {"size": [H, W], "counts": bytes}, as pycocotools has it


@dataclass(frozen=True)
class Object:
    """label: from 1. crowd: many objects in one mask."""

    mask: EncodedMask
    label: int
    crowd: bool


@dataclass
class Picture:
    """An image file and the objects in it."""

    path: Path
    width: int
    height: int
    objects: list[Object] = field(default_factory=list)


def read_annotations(folder: Path) -> tuple[list[str], list[Picture]]:
    """The names of the classes, and the images of FOLDER/annotations.json in order of their names.

    Reads every image and every mask. Raises DataError that names what cannot be used.
    """
    reader = _Reader(folder)
    lists = _read_lists(folder / ANNOTATIONS)
    uses = (reader.add_image, reader.add_category, reader.add_annotation)
    for (kind, items), use in zip(lists.items(), uses, strict=True):
        reader.use(kind, items, use)
    with ThreadPoolExecutor() as pool:
        reader.flaws += [flaw for flaw in pool.map(_flaw, reader.pictures.values()) if flaw]
    if reader.flaws:
        more = [f"and {len(reader.flaws) - NAMED} more"] if len(reader.flaws) > NAMED else []
        lines = "\n  ".join([*reader.flaws[:NAMED], *more])
        raise DataError(
            f"--data: correct {folder / ANNOTATIONS} or what it is about, or remove from it:"
            f"\n  {lines}"
        )
    if reader.empty:
        print(
            f"warning: {len(reader.empty)} annotations of no pixel are left out: "
            f"{', '.join(map(str, reader.empty[:NAMED]))}",
            file=sys.stderr,
        )
    return list(reader.classes), sorted(reader.pictures.values(), key=lambda one: one.path)


def _read_lists(path: Path) -> dict[str, list[Any]]:
    """What the file says of images, categories and annotations."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(
            f"--data: cannot read {path}: {error}; it must be in COCO's format, beside a folder "
            f"called {IMAGES}"
        ) from error
    lists = {}
    for kind in ("images", "categories", "annotations"):
        lists[kind] = content.get(kind) if isinstance(content, dict) else None
        if not isinstance(lists[kind], list):
            raise DataError(f"--data: {path} has no list {kind!r}; it must be in COCO's format")
    return lists


class _Reader:
    """Puts together what the lists say.

    classes: the label of each, by name. empty: ids of annotations whose masks have no pixel.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.pictures: dict[Any, Picture] = {}
        self.labels: dict[Any, int] = {}
        self.classes: dict[str, int] = {}
        self.empty: list[Any] = []
        self.flaws: list[str] = []

    def use(self, kind: str, items: Sequence[Any], use: Callable[[dict[str, Any]], None]) -> None:
        """Take each item, or note why it cannot be used."""
        for position, item in enumerate(items):
            name = f"{kind}[{position}]"
            try:
                if not isinstance(item, dict):
                    raise ValueError(f"must be an object, not {item!r}")
                name = f"{name} (id {item['id']!r})"
                use(item)
            except KeyError as error:
                self.flaws.append(f"{name}: has no {error}")
            except (ValueError, TypeError, OverflowError) as error:
                self.flaws.append(f"{name}: {error}")

    def add_image(self, item: dict[str, Any]) -> None:
        width, height = item["width"], item["height"]
        if not all(isinstance(side, int) and side > 0 for side in (width, height)):
            raise ValueError(
                f"width and height must be integers above 0, got {width!r}, {height!r}"
            )
        _check_new("id", item["id"], self.pictures)
        path = self.folder / IMAGES / item["file_name"]
        self.pictures[item["id"]] = Picture(path, width, height)

    def add_category(self, item: dict[str, Any]) -> None:
        _check_new("id", item["id"], self.labels)
        _check_new("name", str(item["name"]), self.classes)
        self.labels[item["id"]] = self.classes[str(item["name"])] = len(self.classes) + 1

    def add_annotation(self, item: dict[str, Any]) -> None:
        for key, known in (("image_id", self.pictures), ("category_id", self.labels)):
            if item[key] not in known:
                raise ValueError(f"{key} {item[key]!r} is not among the {len(known)} listed")
        picture = self.pictures[item["image_id"]]
        _check_box(item["bbox"], picture)
        mask = encode(item["segmentation"], picture.width, picture.height)
        if run_lengths.area(mask) == 0:
            self.empty.append(item["id"])
            return
        label, crowd = self.labels[item["category_id"]], bool(item.get("iscrowd", 0))
        picture.objects.append(Object(mask, label, crowd))


def _check_new(key: str, value: Any, known: dict[Any, Any]) -> None:
    if value in known:
        raise ValueError(f"{key} {value!r} was used before")


def _check_box(box: Any, picture: Picture) -> None:
    _check_numbers("bbox", box)
    if len(box) != 4 or min(box[2:]) < 0:
        raise ValueError(f"bbox must be left, top, width and height in pixels, got {box!r}")
    left, top, width, height = box
    _check_inside("bbox", [left, top, left + width, top + height], picture.width, picture.height)


def _check_numbers(key: str, values: Any) -> None:
    good = isinstance(values, list) and all(isinstance(value, int | float) for value in values)
    if not good or not all(map(math.isfinite, values)):
        raise ValueError(f"{key} must be a list of numbers, got {values!r:.80}")


def _check_inside(key: str, corners: Sequence[float], width: int, height: int) -> None:
    """corners: x, y, x, y, .."""
    for values, side in ((corners[0::2], width), (corners[1::2], height)):
        if min(values) < -TOLERANCE or max(values) > side + TOLERANCE:
            raise ValueError(
                f"{key} reaches from {min(values):g} to {max(values):g}, beyond its image of "
                f"{width} x {height} pixels"
            )


def encode(segmentation: Any, width: int, height: int) -> EncodedMask:
    """A mask from polygons or run lengths; ValueError if they are none of an image of that size."""
    if isinstance(segmentation, dict):
        return _of_run_lengths(segmentation, width, height)
    if not isinstance(segmentation, list) or not segmentation:
        raise ValueError(
            f"segmentation must be a list of polygons or run lengths, got {segmentation!r:.80}"
        )
    for polygon in segmentation:
        _check_numbers("a polygon of segmentation", polygon)
        if len(polygon) < 6 or len(polygon) % 2:
            raise ValueError(f"a polygon needs x and y of three points or more, got {polygon}")
        _check_inside("segmentation", polygon, width, height)
    return run_lengths.merge(run_lengths.frPyObjects(segmentation, height, width))


def _of_run_lengths(segmentation: dict[str, Any], width: int, height: int) -> EncodedMask:
    size, counts = segmentation["size"], segmentation["counts"]
    if size != [height, width]:
        raise ValueError(f"segmentation is of size {size}, its image of {[height, width]}")
    runs = counts if isinstance(counts, list) else _runs(str(counts))
    whole = all(isinstance(run, int) and run >= 0 for run in runs) and sum(runs) == height * width
    if not whole:
        # pycocotools would read memory that is not there.
        raise ValueError(f"the run lengths of segmentation are not of {height * width} pixels")
    return run_lengths.frPyObjects({"size": size, "counts": runs}, height, width)


def _runs(text: str) -> list[int]:
    """COCO's compressed run lengths: groups of 5 bits, from the third on as differences."""
    runs: list[int] = []
    value = shift = 0
    for character in text:
        group = ord(character) - 48
        value |= (group & 31) << shift
        shift += 5
        if not group & 32:  # the last group of a number, whose highest bit is the sign
            value -= (group & 16) << (shift - 4)
            runs.append(value + (runs[-2] if len(runs) > 2 else 0))
            value = shift = 0
    return runs


def _flaw(picture: Picture) -> str:
    """Why an image cannot be used; empty if it can."""
    try:
        size = read_image(picture.path).size
    except DataError as error:
        return str(error)
    if size != (picture.width, picture.height):
        return (
            f"{picture.path} has {size[0]} x {size[1]} pixels, and not {picture.width} x "
            f"{picture.height} as is said of it"
        )
    return ""
