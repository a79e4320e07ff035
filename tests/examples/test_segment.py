"""The segmentation example, run as users run it, on images small enough to take seconds."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("PIL", reason="the example needs Pillow")

import deeplab
import mask_folder
import photographs
import segment
import segmentation_picture
import segmentation_training
import weights
from labelled_images import IGNORED, Labelled
from mask_folder import MaskFolder
from photographs import DataError
from PIL import Image
from segmentation_scores import Confusion, otsu
from segmentation_training import Trainer
from support.example_program import small_model
from training import Settings

import moat_kernels
from moat_kernels.checkpoints import load_checkpoint, save_safetensors
from moat_kernels.checkpoints.safetensors import load_metadata

SETTINGS = Settings(
    model="tiny_moat_0",
    classes=["a", "b"],
    resolution=32,
    batch_size=2,
    steps=2,
    lr=1e-3,
    seed=0,
    amp=False,
    recompute="auto",
    device="cpu",
)


@pytest.fixture(autouse=True)
def nothing_read_before() -> None:
    photographs.read_image.cache_clear()
    mask_folder._read_mask.cache_clear()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Five images of a bright square; its mask has classes 0, 1, and an ignored frame."""
    random = np.random.default_rng(0)
    for name in ("images", "masks"):
        (tmp_path / "data" / name).mkdir(parents=True)
    for index in range(5):
        mask = np.zeros((40, 48), np.uint8)
        mask[10:30, 5 + 4 * index : 25 + 4 * index] = 1
        mask[:2] = IGNORED
        image = random.integers(0, 100, (40, 48, 3)) + 150 * (mask == 1)[..., None]
        Image.fromarray(image.astype(np.uint8)).save(tmp_path / f"data/images/{index}.png")
        Image.fromarray(mask).save(tmp_path / f"data/masks/{index}.png")
    return tmp_path / "data"


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """Calls the program with tiny models; peak memory has a test of its own."""
    monkeypatch.setattr(moat_kernels, "create_model", small_model)
    monkeypatch.setattr(deeplab, "WIDTH", 16)
    monkeypatch.setattr(segment, "peak_of_step", lambda *arguments: 2**20)

    def call(*arguments: object) -> int:
        small = ("--steps", 2, "--crop", 64, "--batch-size", 2, "--device", "cpu")
        output = ("--output", tmp_path / "out")
        return segment.main([str(one) for one in (*small, *output, *arguments)])

    return call


def results(tmp_path: Path) -> dict:
    return json.loads((tmp_path / "out" / "results.json").read_text())["results"]


def test_both_kinds_of_blocks_on_ones_own_images(run, folder, tmp_path, capsys) -> None:
    pytest.importorskip("matplotlib")
    assert run("--data", folder, "--blocks", "both", "--lr", "1e-4") == 0
    measured = results(tmp_path)
    assert measured["stock"]["losses"] == pytest.approx(measured["fused"]["losses"], abs=1e-3)
    assert measured["fused"]["saved_bytes"] < measured["stock"]["saved_bytes"]
    assert list(measured["fused"]["scores"]) == ["1", "2"]
    printed = capsys.readouterr().out
    for text in ("mean IoU, held out", "IoU of class 1", "pixel accuracy", "median step time"):
        assert text in printed
    written = {path.name for path in (tmp_path / "out").iterdir()}
    assert written == {
        *("results.json", "picture.png"),
        *("stock_best.safetensors", "stock_last.safetensors"),
        *("fused_best.safetensors", "fused_last.safetensors"),
    }
    assert Image.open(tmp_path / "out" / "picture.png").width > 1000


def test_nuclei_under_a_microscope(run, tmp_path, capsys, monkeypatch) -> None:
    if importlib.util.find_spec("stardist") is None:
        pytest.skip("needs stardist: pip install --no-deps -r requirements-examples.txt")
    monkeypatch.setattr(segment, "draw_picture", lambda *arguments: False)
    assert run("--steps", 1) == 0
    baseline = results(tmp_path)["fused"]["baseline"]
    assert 0.7 < baseline["iou"][1] < 0.8
    assert "Otsu's threshold: mean IoU" in capsys.readouterr().out


def test_it_learns(run, folder, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(segment, "draw_picture", lambda *arguments: False)
    assert run("--data", folder, "--steps", 40, "--lr", "5e-3", "--crop", 49) == 0
    scores = results(tmp_path)["fused"]["scores"]
    assert scores["40"]["iou"][1] > 0.6  # 0.26 if all were of class 1, 0 if none were


def test_saved_weights_give_the_model_back(run, folder, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(segment, "draw_picture", lambda *arguments: False)
    assert run("--data", folder) == 0
    path = tmp_path / "out" / "fused_last.safetensors"
    about = load_metadata(path)
    assert json.loads(about["classes"]) == ["class 0", "class 1"]
    assert float(about["mean_iou"]) >= 0 and about["step"] == "2"
    model = deeplab.deeplab("tiny_moat_0", 2, segmentation_training.WINDOW, fused=False)
    load_checkpoint(model, path)


def test_a_classifiers_weights_are_the_start(run, folder, tmp_path, capsys) -> None:
    classifier = small_model("tiny_moat_0", num_classes=5)
    save_safetensors(classifier.state_dict(), tmp_path / "classifier.safetensors")
    settings = dataclasses.replace(SETTINGS, checkpoint=str(tmp_path / "classifier.safetensors"))
    for trainer in segment._trainers("both", settings):
        for name, tensor in trainer.model.backbone.state_dict().items():
            assert torch.equal(tensor, classifier.state_dict()[name]), name
    (tmp_path / "other.safetensors").write_bytes(b"nothing")
    assert run("--data", folder, "--checkpoint", tmp_path / "other.safetensors") == 2
    assert "other.safetensors cannot be loaded into a tiny_moat_0" in capsys.readouterr().err


def image_of(folder: Path, name: str, pixels: np.ndarray) -> None:
    Image.fromarray(pixels).save(folder / name)


def remove_mask(folder: Path) -> None:
    (folder / "masks/1.png").unlink()


def break_image(folder: Path) -> None:
    (folder / "images/1.png").write_bytes(b"no image")


def break_mask(folder: Path) -> None:
    (folder / "masks/1.png").write_bytes(b"no image")


def resize_mask(folder: Path) -> None:
    image_of(folder, "masks/1.png", np.zeros((40, 47), np.uint8))


def color_mask(folder: Path) -> None:
    image_of(folder, "masks/1.png", np.zeros((40, 48, 3), np.uint8))


def one_class(folder: Path) -> None:
    for path in (folder / "masks").iterdir():
        image_of(folder, f"masks/{path.name}", np.zeros((40, 48), np.uint8))


def all_ignored(folder: Path) -> None:
    for path in (folder / "masks").iterdir():
        image_of(folder, f"masks/{path.name}", np.full((40, 48), IGNORED, np.uint8))


def gap(folder: Path) -> None:
    image_of(folder, "masks/1.png", np.full((40, 48), 7, np.uint8))


def unknown_class(folder: Path) -> None:
    (folder / "classes.txt").write_text("ground\nsquare\n")
    gap(folder)


def unlearned_class(folder: Path) -> None:
    image_of(folder, "masks/4.png", np.full((40, 48), 2, np.uint8))


def one_image(folder: Path) -> None:
    for index in range(1, 5):
        (folder / f"images/{index}.png").unlink()


def two_of_a_name(folder: Path) -> None:
    shutil.copy(folder / "images/1.png", folder / "images/1.bmp")


def one_name(folder: Path) -> None:
    (folder / "classes.txt").write_text("ground\n\n")


def no_masks(folder: Path) -> None:
    shutil.rmtree(folder / "masks")


@pytest.mark.parametrize(
    ("spoil", "told"),
    [
        (remove_mask, r"images/1\.png has no mask .*masks/1\.png .*add it"),
        (break_image, r"1 of 5 images cannot be used, mend(.|\n)*read the image .*images/1\.png"),
        (break_mask, r"cannot read the mask .*masks/1\.png"),
        (resize_mask, r"masks/1\.png is of 47 x 40 pixels, its image .*1\.png of 48 x 40"),
        (color_mask, r"masks/1\.png has pixels of mode RGB, .*save it as a grey or palette PNG"),
        (one_class, r"masks/0\.png and all other masks .* class 0 alone"),
        (all_ignored, r"masks/0\.png and all other masks .* no class"),
        (gap, r"masks/1\.png has class 7, but no mask .* has class 2"),
        (unknown_class, r"masks/1\.png has class 7, known are 0 \.\. 1, from .*classes\.txt"),
        (unlearned_class, r"masks/4\.png has class 2, known are 0 \.\. 1"),
        (one_image, r"images has 1 image .*two at least"),
        (two_of_a_name, r"1\.bmp and .*1\.png have one mask: rename"),
        (one_name, r"classes\.txt must have a name in each line, .* got 1 lines"),
        (no_masks, r"no folder .*masks"),
    ],
    ids=lambda value: value.__name__ if callable(value) else "",
)
def test_what_cannot_be_used_is_named(
    spoil: Callable[[Path], None], told: str, folder: Path
) -> None:
    spoil(folder)
    with pytest.raises(DataError, match=told):
        MaskFolder(folder)


def test_bad_data_ends_the_program_before_training(run, folder, tmp_path, capsys) -> None:
    remove_mask(folder)
    assert run("--data", folder) == 2
    assert "masks/1.png" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_stardist_is_missing(run, monkeypatch, capsys) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert run() == 2
    assert "requirements-examples.txt" in capsys.readouterr().err


def test_a_full_disk_loses_nothing_that_was_written(
    run, folder, tmp_path, monkeypatch, capsys
) -> None:
    monkeypatch.setattr(segment, "draw_picture", lambda *arguments: False)
    save, saved = weights.save_weights, []

    def save_once(module, path, metadata=None):
        if path.name in saved:
            raise OSError(28, "No space left on device")
        saved.append(path.name)
        save(module, path, metadata)

    monkeypatch.setattr(weights, "save_weights", save_once)
    assert run("--data", folder) == 2
    told = capsys.readouterr()
    assert "warning: cannot write the weights" in told.err and "No space left" in told.err
    assert "median step time" in told.out  # what was measured is reported
    assert load_metadata(tmp_path / "out" / "fused_last.safetensors")["step"] == "1"


def test_weights_of_an_earlier_run_are_kept(run, folder, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(segment, "draw_picture", lambda *arguments: False)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "fused_best.safetensors").write_text("precious")
    assert run("--data", folder, "--steps", 1) == 0
    assert (tmp_path / "out" / "fused_best.safetensors.old").read_text() == "precious"


def test_output_that_cannot_be_written_is_told_before_training(run, folder, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert run("--data", folder, "--output", tmp_path / "file") == 2
    assert "--output: cannot write to" in capsys.readouterr().err


def test_masks_of_crops_follow_the_image(folder: Path) -> None:
    images = MaskFolder(folder)
    for position in range(8):
        crop = images.crop(position, 0, 64)
        assert crop.image.shape == (3, 64, 64) and crop.labels.shape == (64, 64)
        inside = crop.labels != IGNORED
        bright = crop.image.mean(0) > 0.47
        assert (bright == (crop.labels == 1))[inside].float().mean() > 0.9
    assert torch.equal(images.crop(3, 0, 64).image, images.crop(3, 0, 64).image)
    assert not torch.equal(images.crop(3, 0, 64).image, images.crop(3, 1, 64).image)


def test_classes_get_their_names(folder: Path) -> None:
    (folder / "classes.txt").write_text("ground\nsquare\nnever seen\n")
    assert MaskFolder(folder).classes == ["ground", "square", "never seen"]


def test_scores_of_a_small_map() -> None:
    confusion = Confusion(3)
    labels = torch.tensor([[0, 0, 1], [1, IGNORED, 0]])
    found = torch.tensor([[0, 1, 1], [0, 1, 0]])
    assert confusion.scores() is None
    confusion.add(found, labels)
    scores = confusion.scores()
    assert scores.iou == [2 / 4, 1 / 3, None]
    assert scores.mean_iou == pytest.approx((1 / 2 + 1 / 3) / 2)
    assert scores.accuracy == 3 / 5


def test_otsu_tells_bright_from_dark() -> None:
    pytest.importorskip("skimage")
    labels = torch.tensor([[0, 1, 1], [1, 0, 0]])
    image = (0.2 + 0.6 * labels).expand(3, -1, -1)
    assert torch.equal(otsu(image, bright=1), labels)
    assert torch.equal(otsu(image, bright=0), 1 - labels)


def test_pixels_that_are_ignored_teach_nothing(folder, monkeypatch) -> None:
    monkeypatch.setattr(moat_kernels, "create_model", small_model)
    trainer = Trainer("fused", SETTINGS)
    images = torch.randn(2, 3, 32, 32)
    nothing = torch.full((2, 32, 32), IGNORED)
    assert trainer.loss(images, nothing).item() == 0
    labels = nothing.clone()
    labels[0, 3, 4] = 1
    logits = trainer.model(images)
    expected = -logits.log_softmax(1)[0, 1, 3, 4]
    torch.testing.assert_close(trainer.loss(images, labels), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's /proc")
def test_peak_memory_is_that_of_the_same_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """The fresh process is started by the classifier's example, too: here its task runs."""
    monkeypatch.setattr(moat_kernels, "create_model", small_model)

    def in_this_process(program: str, task: dict) -> int | None:
        assert program == segmentation_training.__file__
        task = json.loads(json.dumps(task))
        settings = Settings(**task["settings"])
        return segmentation_training._measure_in_this_process(task["blocks"], settings)

    monkeypatch.setattr(segmentation_training, "peak_in_fresh_process", in_this_process)
    images, labels = torch.randn(2, 3, 32, 32), torch.zeros(2, 32, 32, dtype=torch.int64)
    assert segmentation_training.peak_of_step(Trainer("fused", SETTINGS), images, labels) > 0


def test_the_picture_of_many_classes(tmp_path: Path) -> None:
    """Every class has a colour, also the eighth, and what is ignored is no error."""
    pytest.importorskip("matplotlib")
    from matplotlib.figure import Figure

    labels = torch.arange(9).repeat_interleave(4).expand(8, -1).clone()
    labels[0] = IGNORED
    axes = Figure().add_subplot()
    one = Labelled("stripes", torch.zeros(3, 8, 36), labels)
    segmentation_picture._draw_errors(axes, one, np.where(labels == 8, 0, labels))
    drawn = np.asarray(axes.images[0].get_array())
    assert (drawn[1:, 32:] != 0).any(-1).all()
    assert (drawn[0] == 0).all() and (drawn[:, :32] == 0).all()
