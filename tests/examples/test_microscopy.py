"""The microscopy image: every nucleus in one part, crops whose masks follow the pixels."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("PIL", reason="the example needs Pillow")

import microscopy
from microscopy import OUTSIDE, Part
from photographs import DataError
from PIL import Image


@pytest.fixture
def files(tmp_path: Path) -> Path:
    """A folder as in stardist: two nuclei, the second across the border at column 8 of 12."""
    instances = np.zeros((8, 12), np.uint16)
    instances[1:3, 1:4] = 1
    instances[4:6, 6:11] = 2
    Image.fromarray(instances).save(tmp_path / "mask2d.tif")
    Image.fromarray(instances * 100 + np.arange(12, dtype=np.uint16)).save(tmp_path / "img2d.tif")
    return tmp_path


def test_the_image_of_stardist() -> None:
    if importlib.util.find_spec("stardist") is None:
        pytest.skip("needs stardist: pip install --no-deps -r requirements-examples.txt")
    training, held_out = microscopy.load_microscopy()
    assert training.image.shape == training.instances.shape == (512, 341)
    assert held_out.image.shape == held_out.instances.shape == (512, 171)
    nuclei = [set(np.unique(part.instances)) - {0, OUTSIDE} for part in (training, held_out)]
    assert not nuclei[0] & nuclei[1]
    assert len(nuclei[0]) + len(nuclei[1]) == 125


def test_a_nucleus_across_the_border_is_in_one_part(files: Path) -> None:
    training, held_out = microscopy.split(*microscopy.read_files(files))
    assert set(np.unique(training.instances)) == {0, 1, OUTSIDE}
    assert set(np.unique(held_out.instances)) == {0, 2}
    assert (training.instances == OUTSIDE).sum() == 4


@pytest.mark.parametrize("size", [6, 32])  # smaller and larger than the part
def test_masks_of_crops_follow_the_image(size: int) -> None:
    instances = np.kron(np.arange(1, 7).reshape(2, 3), np.ones((8, 8), np.int64))
    part = Part(instances.astype(np.float32), instances)
    random = np.random.default_rng(0)
    seen = set()
    for _ in range(20):
        crop = microscopy.random_crop(part, size, random)
        assert crop.image.shape == crop.instances.shape == (size, size)
        inside = crop.instances != OUTSIDE
        assert inside.all() == (size == 6)
        seen |= set(np.unique(crop.instances[inside]))
        if len(np.unique(crop.instances[inside])) > 1:
            # Brightness is linear in the label but where scaling blends neighbours.
            assert np.corrcoef(crop.image[inside], crop.instances[inside])[0, 1] > 0.9
    assert seen == set(range(1, 7))


def test_crops_are_repeated_by_the_same_seed(files: Path) -> None:
    part, _ = microscopy.split(*microscopy.read_files(files))
    first, second, other = (
        microscopy.random_crop(part, 6, np.random.default_rng(seed)) for seed in (1, 1, 2)
    )
    assert np.array_equal(first.image, second.image)
    assert not np.array_equal(first.image, other.image)


def test_stardist_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(DataError, match=r"pip install --no-deps -r requirements-examples\.txt"):
        microscopy.load_microscopy()


def test_files_of_stardist_that_are_broken(files: Path) -> None:
    (files / "mask2d.tif").write_bytes(b"no image")
    with pytest.raises(DataError, match=r"cannot read .*mask2d\.tif"):
        microscopy.read_files(files)
    Image.fromarray(np.ones((4, 12), np.uint16)).save(files / "mask2d.tif")
    with pytest.raises(DataError, match=r"mask2d\.tif is of \(4, 12\) pixels"):
        microscopy.read_files(files)
    (files / "img2d.tif").unlink()
    with pytest.raises(DataError, match=r"cannot read .*img2d\.tif"):
        microscopy.read_files(files)
