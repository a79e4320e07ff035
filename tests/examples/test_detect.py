"""The detection example, run as users run it, on images small enough to take a second."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from support.coco import write_folder
from support.example_program import SMALL_SIZES, small_model
from support.peers import import_detector

import moat_kernels
from moat_kernels.checkpoints import load_safetensors, save_safetensors
from moat_kernels.checkpoints.safetensors import load_metadata

detect = import_detector("detect")
make_trainer, draw_picture = detect.Trainer, detect.draw_picture

SMALL = detect.Sizes(**SMALL_SIZES)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_folder(tmp_path_factory.mktemp("coco") / "data")


@pytest.fixture
def trainers(monkeypatch: pytest.MonkeyPatch) -> list:
    """Those that the program made."""
    made: list = []

    def make(*arguments: object) -> object:
        made.append(make_trainer(*arguments))
        return made[-1]

    monkeypatch.setattr(detect, "Trainer", make)
    return made


@pytest.fixture
def run(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """Two steps on tiny data, sizes and models; without peak memory and picture."""
    monkeypatch.setattr(moat_kernels, "create_model", small_model)
    monkeypatch.setattr(detect, "Sizes", lambda: SMALL)
    monkeypatch.setattr(detect, "peak_of_step", lambda *arguments: 2**20)
    monkeypatch.setattr(detect, "draw_picture", lambda *arguments: False)

    def call(*arguments: object) -> int:
        small = ("--data", data, "--steps", 2, "--resolution", 64, "--batch-size", 1)
        fixed = ("--device", "cpu", "--output", tmp_path / "out")
        return detect.main([str(one) for one in (*small, *fixed, *arguments)])

    return call


def test_stock_and_fused_blocks_train_alike(run, tmp_path, capsys):
    assert run("--blocks", "both", "--lr", "1e-5") == 0
    measured = json.loads((tmp_path / "out" / "results.json").read_text())["results"]
    assert measured["stock"]["losses"] == pytest.approx(measured["fused"]["losses"], rel=1e-3)
    assert measured["fused"]["saved_bytes"] < measured["stock"]["saved_bytes"]
    assert list(measured["fused"]["precisions"]) == ["1", "2"]
    output = capsys.readouterr().out
    for text in ("on 4 images with objects of 2 classes", "box AP, held out", "1/2", "2/2"):
        assert text in output


def test_weights_are_saved_and_those_of_earlier_runs_kept(run, trainers, tmp_path, capsys):
    assert run() == 0 and run() == 0
    files = sorted(path.name for path in (tmp_path / "out").glob("*.safetensors*"))
    kept = [name + end for name in ("best", "last") for end in (".safetensors", ".safetensors.old")]
    assert files == [f"fused_{name}" for name in kept]
    last = tmp_path / "out" / "fused_last.safetensors"
    assert load_metadata(last).items() >= {"step": "2", "classes": '["bright", "dark"]'}.items()
    other = make_trainer("stock", trainers[-1].settings).model
    other.load_state_dict(load_safetensors(last))
    for name, parameter in trainers[-1].model.named_parameters():
        assert torch.equal(parameter, other.get_parameter(name)), name


def test_a_full_disk_keeps_the_weights_before(run, tmp_path, monkeypatch, capsys):
    def save(module: torch.nn.Module, path: Path, metadata: dict) -> None:
        if metadata["step"] == "2":
            raise OSError(28, "No space left on device", str(path))
        save_safetensors(module.state_dict(), path, metadata)

    monkeypatch.setattr("weights.save_weights", save)
    assert run() == 2
    last = tmp_path / "out" / "fused_last.safetensors"
    assert load_metadata(last)["step"] == "1"
    assert f"error: cannot write the weights {last}: [Errno 28]" in capsys.readouterr().err
    assert (tmp_path / "out" / "results.json").exists()


def test_the_backbone_starts_from_a_classifier(run, trainers, tmp_path, monkeypatch, capsys):
    classifier = small_model("tiny_moat_0", num_classes=3)
    save_safetensors(classifier.state_dict(), tmp_path / "classifier.safetensors")
    assert run("--checkpoint", tmp_path / "classifier.safetensors", "--lr", "1e-12") == 0
    assert "weights of the backbone from" in capsys.readouterr().out
    for name, parameter in trainers[0].model.backbone.moat.named_parameters():
        torch.testing.assert_close(parameter, classifier.get_parameter(name), msg=name)


@pytest.mark.skipif(find_spec("stardist") is None, reason="stardist has the microscopy image")
def test_nuclei_are_what_it_learns_without_data(run, monkeypatch, capsys):
    monkeypatch.setattr(detect, "CocoFolder", lambda folder: detect.Microscopy())
    assert run("--steps", 1) == 0
    assert "nuclei under a microscope" in capsys.readouterr().out


@pytest.mark.parametrize("blocks", ["both", "fused"])
def test_the_picture_is_drawn(run, tmp_path, monkeypatch, blocks):
    pytest.importorskip("matplotlib")
    from PIL import Image, ImageColor

    monkeypatch.setattr(detect, "draw_picture", draw_picture)
    assert run("--blocks", blocks) == 0
    with Image.open(tmp_path / "out" / "picture.png") as picture:
        assert picture.width >= 1200
        drawn = {color for _, color in picture.convert("RGB").getcolors(maxcolors=2**20)}
    for kind, color in {"stock": "#8d95a1", "fused": "#d9480f"}.items():
        assert (ImageColor.getrgb(color) in drawn) == (blocks in (kind, "both"))


def test_a_loss_that_is_not_finite_stops(run, monkeypatch, capsys):
    monkeypatch.setattr(make_trainer, "update", lambda *arguments: float("nan"))
    assert run("--blocks", "stock") == 2
    assert "the loss of the stock blocks is nan at step 1" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--data", "nowhere"), "cannot read nowhere/annotations.json: [Errno 2]"),
        (("--resolution", 100), "--resolution 100 must be a multiple of 32"),
        (("--checkpoint", "nowhere"), "--checkpoint nowhere cannot be loaded into a tiny_moat_0"),
        (("--output", f"{__file__}/nowhere"), f"--output: cannot write to {__file__}/nowhere: "),
    ],
)
def test_what_cannot_work_is_said_before_training(run, capsys, arguments, message):
    assert run(*arguments) == 2
    captured = capsys.readouterr()
    assert message in captured.err and "steps of" not in captured.out


def test_a_corrupt_image_is_named_before_training(run, data, tmp_path, capsys):
    folder = shutil.copytree(data, tmp_path / "corrupt")
    (folder / "images" / "2.png").write_bytes(b"")
    assert run("--data", folder) == 2
    captured = capsys.readouterr()
    assert f"cannot read the image {folder / 'images' / '2.png'}" in captured.err
    assert "steps of" not in captured.out
