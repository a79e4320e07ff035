"""The example program, run as users run it, on pictures small enough to take seconds."""

from __future__ import annotations

import dataclasses
import itertools
import json
import shutil
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("PIL", reason="the example needs Pillow")
import chart
import checkpoint_folder
import checkpointing
import memory
import photographs
import progress
import train_classifier
import training
from PIL import Image, ImageColor
from support.example_program import STEPS

import moat_kernels


def newest(tmp_path: Path) -> Path:
    """Where the last run without --output wrote."""
    return max((tmp_path / "runs").iterdir(), key=lambda folder: int(folder.name))


def results(tmp_path: Path) -> dict:
    return read_results(newest(tmp_path))


def read_results(folder: Path) -> dict:
    return json.loads((folder / "results.json").read_text())


def test_stock_and_fused_blocks_train_alike(run, tmp_path, capsys):
    assert run("--blocks", "both", "--lr", "1e-4") == 0
    measured = results(tmp_path)["results"]
    assert measured["stock"]["losses"] == pytest.approx(measured["fused"]["losses"], abs=1e-4)
    assert measured["stock"]["accuracy"] == measured["fused"]["accuracy"]
    assert measured["fused"]["saved_bytes"] < 0.6 * measured["stock"]["saved_bytes"]
    output = capsys.readouterr().out
    for row in ("top-1 of 2 held out", "difference of the losses", "saved for backward"):
        assert row in output


def test_the_loss_falls(run, tmp_path):
    assert run("--steps", 24) == 0
    measured = results(tmp_path)["results"]["fused"]
    assert measured["last_loss"] < 0.7 * measured["first_loss"]


def state_after(folder: Path, settings: training.Settings) -> dict[str, torch.Tensor]:
    """All tensors of the last checkpoint in `folder`, by blocks and name."""
    trainers = [training.Trainer(blocks, settings) for blocks in ("stock", "fused")]
    checkpointing.load_checkpoint(folder, trainers)
    tensors = {}
    for trainer in trainers:
        state = trainer.tensors()
        for name, tensor in state["model"].items():
            tensors[f"{trainer.blocks} {name}"] = tensor
        for name, moments in state["optimizer"]["state"].items():
            for kind, tensor in moments.items():
                tensors[f"{trainer.blocks} {kind} of {name}"] = tensor
    return tensors


@pytest.mark.parametrize("model", ["tiny_moat_0", "moat_3"])  # without and with drop path
def test_a_resumed_run_repeats_the_uninterrupted_one(run, tmp_path, settings, model):
    arguments = ("--blocks", "both", "--model", model, "--checkpoint-every", 2)
    assert run(*arguments, "--output", tmp_path / "whole") == 0
    whole = read_results(tmp_path / "whole")["results"]
    resume = ("--resume", tmp_path / "whole" / "step_00000002")
    assert run(*arguments, *resume, "--output", tmp_path / "resumed") == 0
    resumed = read_results(tmp_path / "resumed")["results"]
    for blocks in ("stock", "fused"):
        for numbers in ("losses", "validations"):
            assert resumed[blocks][numbers] == whole[blocks][numbers]
    longer = dataclasses.replace(settings, model=model, steps=STEPS + 1, classes=["coarse", "fine"])
    expected = state_after(tmp_path / "whole", longer)
    actual = state_after(tmp_path / "resumed", longer)
    assert expected.keys() == actual.keys()
    for name, tensor in expected.items():
        assert torch.equal(actual[name], tensor), name


def interrupt_at(monkeypatch: pytest.MonkeyPatch, owner: object, name: str, call: int) -> None:
    """Make the `call`-th call of a function raise KeyboardInterrupt instead."""
    function, calls = getattr(owner, name), itertools.count(1)

    def interrupted(*arguments, **options):
        if next(calls) == call:
            raise KeyboardInterrupt
        return function(*arguments, **options)

    monkeypatch.setattr(owner, name, interrupted)


def test_a_run_that_was_interrupted_leaves_a_checkpoint(run, tmp_path, monkeypatch, capsys):
    interrupt_at(monkeypatch, training.Trainer, "step", 4)
    assert run("--output", tmp_path / "run", "--checkpoint-every", 2) == 130
    assert f"--resume {tmp_path / 'run'} continues from step_00000002" in capsys.readouterr().out
    assert [path.name for path in checkpoint_folder.checkpoints(tmp_path / "run")] == [
        "step_00000002"
    ]


@pytest.mark.parametrize(
    ("owner", "name", "call"),
    [(checkpointing.dcp, "save", 2), (Path, "rename", 4)],  # each save renames its metadata first
    ids=["before writing", "before naming"],
)
def test_dying_while_saving_leaves_the_checkpoint_before(
    run, tmp_path, monkeypatch, owner, name, call
):
    with monkeypatch.context() as patches:
        interrupt_at(patches, owner, name, call)
        assert run("--output", tmp_path / "run", "--checkpoint-every", 1) == 130
    assert [path.name for path in (tmp_path / "run").glob("step_*")] == ["step_00000001"]
    resume = ("--resume", tmp_path / "run", "--output", tmp_path / "run")
    assert run(*resume, "--checkpoint-every", 1) == 0
    left = [path.name for path in (tmp_path / "run").glob("step_*")]
    assert sorted(left) == ["step_00000003", "step_00000004"]


def test_checkpoints_of_another_run_are_not_mixed_in(run, tmp_path, capsys):
    checkpoint = ("--output", tmp_path / "run")
    assert run("--steps", 1, *checkpoint) == 0
    assert run(*checkpoint) == 2
    assert "holds checkpoints of another run" in capsys.readouterr().err


def test_autocast(run, tmp_path):
    assert run("--blocks", "both", "--amp", "--steps", 1) == 0
    measured = results(tmp_path)["results"]
    # bfloat16 has 8 significant bits.
    assert measured["stock"]["losses"] == pytest.approx(measured["fused"]["losses"], rel=2e-2)


def test_recompute_saves_more(run, tmp_path):
    saved = {}
    for level in ("none", "expand", "block"):
        assert run("--recompute", level, "--steps", 1) == 0
        saved[level] = results(tmp_path)["results"]["fused"]["saved_bytes"]
    assert saved["block"] < saved["expand"] < saved["none"]


@pytest.mark.parametrize("blocks", ["both", "fused"])
def test_the_chart_is_a_picture(run, tmp_path, monkeypatch, blocks):
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(train_classifier, "draw_chart", chart.draw_chart)
    assert run("--blocks", blocks) == 0
    with Image.open(newest(tmp_path) / "chart.png") as picture:
        assert picture.width >= 1200
        drawn = {color for _, color in picture.convert("RGB").getcolors(maxcolors=2**20)}
    for kind, color in chart.COLORS.items():
        assert (ImageColor.getrgb(color) in drawn) == (blocks in (kind, "both"))


def test_without_matplotlib_the_numbers_still_come(run, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(train_classifier, "draw_chart", chart.draw_chart)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert run("--steps", 1) == 0
    assert "matplotlib is not installed" in capsys.readouterr().out
    assert results(tmp_path)["results"]["fused"]["losses"]
    assert not (newest(tmp_path) / "chart.png").exists()


def test_saved_bytes_count_each_storage_once_and_no_parameters(settings):
    trainer = training.Trainer("stock", settings)
    weight = torch.nn.Parameter(torch.ones(8))
    trainer.model.register_parameter("weight", weight)

    def loss(images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        exponential = (weight * images).exp()  # saves weight and images, then its own result
        return (exponential * exponential.view(8)).sum()  # saves it once more, and a view of it

    trainer.loss = loss
    images = torch.ones(8, requires_grad=True)
    assert memory.saved_for_backward(trainer, images, torch.ones(8)) == 2 * 8 * 4


def test_moving_averages_begin_with_the_first_batch(settings):
    trainer = training.Trainer("fused", settings)
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        mean = trainer.model.stem.conv_0(images).mean((0, 2, 3))
    trainer.step(0, images, torch.tensor([0, 1]))
    torch.testing.assert_close(trainer.model.stem.norm_0.running_mean, mean)
    assert training.batch_norm_momentum(100_000) == 0.01


def test_a_failed_measurement_of_memory_does_not_lose_the_run(settings, monkeypatch, capsys):
    monkeypatch.setattr(memory.sys, "executable", "/bin/false")
    trainer = training.Trainer("stock", settings)
    assert memory.peak_of_step(trainer, torch.randn(2, 3, 32, 32), torch.tensor([0, 1])) is None
    assert "peak memory of the stock blocks was not measured" in capsys.readouterr().err


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's /proc")
def test_peak_memory_holds_at_least_what_is_saved(settings):
    trainer = training.Trainer("stock", settings)
    images, labels = torch.randn(2, 3, 32, 32), torch.tensor([0, 1])
    saved = memory.saved_for_backward(trainer, images, labels)
    peak = memory.peak_of_step(trainer, images, labels)
    gradients = sum(parameter.numel() * 4 for parameter in trainer.model.parameters())
    assert peak > 0.8 * max(saved, gradients)
    assert peak < 10 * (saved + gradients)


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


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--model", "moat_9"), "invalid choice: 'moat_9'"),
        (("--steps", "0"), "must be above 0"),
        (("--lr", "nan"), "must be above 0"),
        (("--seed", "-1"), "must be within 0"),
    ],
)
def test_bad_arguments_are_named(capsys, arguments, message):
    with pytest.raises(SystemExit, match="2"):
        train_classifier.main(arguments)
    assert message in capsys.readouterr().err


def test_resume_refuses_what_does_not_fit(run, tmp_path, capsys):
    path, foreign, torn = tmp_path / "run", tmp_path / "foreign", tmp_path / "torn"
    assert run("--blocks", "fused", "--steps", 1, "--output", path) == 0
    foreign.mkdir()
    (foreign / "run.json").write_text("something else")
    shutil.copytree(path, torn)
    (torn / "step_00000001" / ".metadata").unlink()
    capsys.readouterr()
    for arguments, message in (
        (("--model", "tiny_moat_1"), "has model tiny_moat_0, this run has tiny_moat_1"),
        (("--blocks", "both"), "it has no stock blocks"),
        (("--steps", 1), "has done 1 steps already"),
        (("--resume", tmp_path / "none"), "is no checkpoint of this program"),
        (("--resume", foreign), "is no checkpoint of this program"),
        (("--resume", torn), "has none that is whole"),
        (("--resume", torn / "step_00000001"), "is damaged: .metadata not as written"),
    ):
        assert run("--resume", path, *arguments) == 2
        assert message in capsys.readouterr().err


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="needs a folder that takes no files")
def test_folders_that_take_no_files_are_found_before_training(run, capsys):
    assert run("--output", "/proc/self") == 2
    captured = capsys.readouterr()
    assert "--output: cannot write to /proc/self" in captured.err
    assert "step" not in captured.out


def test_numbers_that_cannot_be_written_are_at_least_printed(run, tmp_path, capsys):
    (tmp_path / "out" / "results.json").mkdir(parents=True)
    assert run("--steps", 1, "--output", tmp_path / "out") == 2
    captured = capsys.readouterr()
    assert "loss, first step" in captured.out
    assert f"--output: cannot write to {tmp_path / 'out'}" in captured.err


def test_folders_that_cannot_be_made_are_found_before_training(run, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert run("--output", tmp_path / "file" / "below") == 2
    captured = capsys.readouterr()
    assert f"--output: cannot write to {tmp_path / 'file' / 'below'}" in captured.err
    assert "step" not in captured.out


def test_a_diverging_run_stops(run, monkeypatch, capsys):
    monkeypatch.setattr(training.Trainer, "update", lambda *arguments: float("nan"))
    assert run("--blocks", "stock") == 2
    assert "the loss of the stock blocks is nan at step 1" in capsys.readouterr().err


def test_progress_is_ten_lines_in_a_file(capsys):
    bar = progress.Progress(done=0, total=200)
    for step in range(1, 201):
        bar.show(step, "text")
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 10
    assert lines[0].startswith("[#...............]  20/200  ")
    assert lines[-1] == "[################] 200/200  0:00 left  text"


def test_progress_is_one_line_in_a_terminal(capsys, monkeypatch):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", "60")
    bar = progress.Progress(done=0, total=5)
    for step in range(1, 6):
        bar.show(step, "long text " * 10)
    output = capsys.readouterr().out
    assert output.count("\n") == 1
    assert all(len(part.strip()) < 60 for part in output.replace("\x1b[2K", "").split("\r"))
