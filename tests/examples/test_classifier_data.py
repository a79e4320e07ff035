"""What the classifier is trained on: photographs of a package, a folder per class."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

pytest.importorskip("PIL", reason="the example needs Pillow")
import photographs

import moat_kernels


def test_bundled_photographs_are_on_disk_and_split():
    pytest.importorskip("skimage")
    found = photographs.bundled_photographs()
    assert len(found.classes) == len(found.training) == 12
    assert all(example.path.is_file() for example in found.training)
    right_of_training = max(example.region[2] for example in found.training)
    assert all(example.region[0] >= right_of_training for example in found.held_out)


def test_batches_follow_the_seed_and_the_step_alone(pictures):
    found = photographs.folder_photographs(pictures)
    preprocessing = moat_kernels.get_preprocessing("tiny_moat_0")

    def batch(seed: int, step: int) -> tuple[torch.Tensor, torch.Tensor]:
        return photographs.training_batch(
            found.training,
            seed=seed,
            step=step,
            batch_size=4,
            resolution=32,
            preprocessing=preprocessing,
        )

    images, labels = batch(0, 5)
    torch.rand(1)
    again, labels_again = batch(0, 5)
    assert torch.equal(images, again) and torch.equal(labels, labels_again)
    assert images.shape == (4, 3, 32, 32)
    assert sorted(labels.tolist()) == [0, 0, 1, 1]  # one epoch of the four training pictures
    assert not torch.equal(images, batch(0, 6)[0])
    assert not torch.equal(images, batch(1, 5)[0])


def test_a_folder_keeps_some_of_each_class_for_testing(pictures):
    found = photographs.folder_photographs(pictures)
    assert found.classes == ["coarse", "fine"]
    assert sorted(example.label for example in found.held_out) == [0, 1]
    assert not {one.path for one in found.training} & {one.path for one in found.held_out}


def copied(pictures: Path, folder: Path, *names: str) -> Path:
    """A folder of classes with some of the pictures."""
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(pictures / name, folder / name)
    return folder


def test_the_folders_train_and_val_say_what_is_held_out(pictures, tmp_path, capsys):
    folder = tmp_path / "mine"
    copied(pictures, folder / "train", "coarse/0.png", "fine/0.png", "fine/1.png")
    copied(pictures, folder / "val", "fine/2.png")
    copied(pictures, folder / "val", "coarse/1.png")
    copied(pictures, folder / "test", "fine/2.png")
    found = photographs.folder_photographs(folder)
    assert found.classes == ["coarse", "fine"]
    assert [one.label for one in found.training] == [0, 1, 1]
    assert [(one.path, one.label) for one in found.held_out] == [
        (folder / "val" / "coarse" / "1.png", 0),
        (folder / "val" / "fine" / "2.png", 1),
    ]
    assert "only train and val are used, not test" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (("coarse/0.png", "fine/0.png", "fine/1.png"), "coarse/0.png is the only image of its"),
        (("train/coarse/0.png", "train/fine/0.png"), "make it, with subfolders named alike, or"),
        (("val/coarse/0.png", "val/fine/0.png"), "there is nothing to train on"),
        (
            ("train/coarse/0.png", "train/fine/0.png", "val/coarse/1.png", "val/rough/1.png"),
            "val/rough is of a class that",
        ),
    ],
)
def test_what_is_missing_in_a_folder_is_named(run, pictures, tmp_path, capsys, names, message):
    picture = (pictures / "fine" / "0.png").read_bytes()
    for name in names:
        (tmp_path / "mine" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "mine" / name).write_bytes(picture)
    assert run("--data", tmp_path / "mine") == 2
    error = capsys.readouterr().err
    assert message in error and str(tmp_path / "mine") in error
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda folder: None, "is not a folder"),
        (lambda folder: folder.mkdir(), "at least two classes, found 0 subfolders"),
        (lambda folder: (folder / "cat").mkdir(parents=True), "found 1 subfolders"),
        (
            lambda folder: [(folder / name).mkdir(parents=True) for name in ("cat", "dog")],
            "has no images",
        ),
    ],
)
def test_bad_folders_are_named(run, tmp_path, capsys, make, message):
    folder = tmp_path / "mine"
    make(folder)
    assert run("--data", folder) == 2
    error = capsys.readouterr().err
    assert message in error and str(folder) in error
