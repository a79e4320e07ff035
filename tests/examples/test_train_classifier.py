"""The example program, run as users run it, on pictures small enough to take seconds."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import shutil
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("PIL", reason="the example needs Pillow")
import chart
import checkpoint_folder
import checkpointing
import files
import memory
import predict
import train_classifier
import training
import validation
import weights
from PIL import Image, ImageColor
from pretrained import start_from
from support.example_program import STEPS, small_model
from weights import save_weights

import moat_kernels
from moat_kernels.checkpoints.safetensors import load_metadata


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


def test_a_resumed_run_repeats_the_uninterrupted_one(run, tmp_path, settings):
    model = "moat_3"  # with drop path
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


def test_weights_are_saved_and_evaluated(run, tmp_path, capsys):
    assert run("--blocks", "both", "--validate-every", 2) == 0
    folder = newest(tmp_path)
    measured = results(tmp_path)["results"]
    steps = [one["step"] for one in measured["fused"]["validations"]]
    assert steps == [2, STEPS]
    for blocks in ("stock", "fused"):
        assert load_metadata(folder / f"{blocks}_last.safetensors")["step"] == str(STEPS)
        assert load_metadata(folder / f"{blocks}_best.safetensors")["model"] == "tiny_moat_0"
    capsys.readouterr()
    assert run("--evaluate", "--checkpoint", folder / "fused_last.safetensors") == 0
    loss = measured["fused"]["validations"][-1]["loss"]
    assert f"of 2 held out of 2 classes, loss {loss:.4f}" in capsys.readouterr().out
    assert newest(tmp_path) == folder


def test_the_best_weights_are_those_of_the_highest_accuracy(run, tmp_path, monkeypatch):
    accuracies = {1: 0.5, 2: 1.0, 3: 0.5, 4: 1.0}

    def validate(trainer: training.Trainer, examples: list, step: int) -> validation.Validation:
        return validation.Validation(step, accuracies[step], loss=float(step), pictures=2)

    monkeypatch.setattr(train_classifier, "validate", validate)
    assert run("--validate-every", 1) == 0
    best, last = (newest(tmp_path) / f"fused_{which}.safetensors" for which in ("best", "last"))
    assert (load_metadata(best)["step"], load_metadata(last)["step"]) == ("2", "4")


@pytest.fixture
def pretrained(tmp_path: Path) -> moat_kernels.MOAT:
    """Two classes' weights in `two.safetensors`, five classes' in `five.pt`."""
    torch.manual_seed(1)
    model = small_model("tiny_moat_0", num_classes=5)
    torch.save(model.state_dict(), tmp_path / "five.pt")
    model.reset_classifier(2)
    save_weights(model, tmp_path / "two.safetensors", {"classes": '["cat", "dog"]'})
    return model


@pytest.mark.parametrize(
    ("name", "message"),
    [("five.pt", "is not for 2 classes"), ("two.safetensors", "it is for 2 other classes")],
)
def test_training_starts_from_a_checkpoint(pretrained, tmp_path, settings, name, message):
    found = dataclasses.replace(settings, classes=["coarse", "fine"])
    model = small_model("tiny_moat_0", num_classes=2)
    own_head = model.logits_head.weight.clone()
    assert message in start_from(model, tmp_path / name, found)
    assert torch.equal(model.logits_head.weight, own_head)
    assert torch.equal(model.stem.conv_0.weight, pretrained.stem.conv_0.weight)


def test_both_kinds_of_blocks_start_from_the_same_checkpoint(run, pretrained, tmp_path, capsys):
    arguments = ("--checkpoint", tmp_path / "five.pt", "--blocks", "both", "--lr", "1e-4")
    assert run(*arguments, "--steps", 1) == 0
    assert "its classifier, if it has one, is left out" in capsys.readouterr().out
    measured = results(tmp_path)
    assert measured["settings"]["checkpoint"] == str(tmp_path / "five.pt")
    losses = [one["losses"] for one in measured["results"].values()]
    assert losses[0] == pytest.approx(losses[1], abs=1e-4)


def test_checkpoints_that_do_not_fit_are_named_before_training(run, pretrained, tmp_path, capsys):
    wide = moat_kernels.MOAT(8, (8, 16, 32, 96), (1, 2, 2, 1), num_classes=2)
    save_weights(wide, tmp_path / "wide.safetensors")
    (tmp_path / "text.safetensors").write_text("no weights")
    for name, arguments, message in (
        ("wide.safetensors", (), "in the file"),
        ("text.safetensors", (), "not a .safetensors file"),
        ("gone.safetensors", (), "no such checkpoint"),
        ("five.pt", ("--evaluate",), "is [5] in the file, [2] in the model"),
        ("two.safetensors", ("--evaluate",), "it is for 2 other classes"),
    ):
        assert run("--checkpoint", tmp_path / name, *arguments) == 2
        captured = capsys.readouterr()
        assert message in captured.err and f"--checkpoint {tmp_path / name}" in captured.err
        assert "steps of" not in captured.out
    assert not (tmp_path / "runs").exists()


def test_weights_of_an_earlier_run_are_put_aside(run, tmp_path, capsys):
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "fused_best.safetensors").write_text("an earlier run's")
    assert run("--steps", 1, "--output", folder) == 0
    assert (folder / "fused_best.safetensors.old").read_text() == "an earlier run's"
    assert "fused_best.safetensors.old now" in capsys.readouterr().out


@pytest.mark.parametrize("failing", [(2,), (2, 4)], ids=["for a while", "to the end"])
def test_a_full_disk_keeps_the_weights_before(run, tmp_path, monkeypatch, capsys, failing):
    def save(module: torch.nn.Module, path: Path, metadata: dict) -> None:
        if int(metadata["step"]) in failing:
            raise OSError(28, "No space left on device", str(path))
        save_weights(module, path, metadata)

    monkeypatch.setattr(weights, "save_weights", save)
    code = run("--validate-every", 1)
    last = newest(tmp_path) / "fused_last.safetensors"
    assert code == (2 if 4 in failing else 0)
    assert load_metadata(last)["step"] == ("3" if 4 in failing else "4")
    captured = capsys.readouterr()
    assert f"warning: cannot write the weights {last}: [Errno 28]" in captured.err
    assert "numbers " in captured.out


def test_numbers_that_cannot_be_written_leave_the_former_ones(tmp_path):
    (tmp_path / "results.json").write_text("former")
    with (
        pytest.raises(OSError, match="full"),
        files.written_whole(tmp_path / "results.json") as new,
    ):
        new.write_text("half")
        raise OSError("full")
    assert [path.name for path in tmp_path.iterdir()] == ["results.json"]
    assert (tmp_path / "results.json").read_text() == "former"


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


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--model", "moat_9"), "invalid choice: 'moat_9'"),
        (("--steps", "0"), "must be above 0"),
        (("--lr", "nan"), "must be above 0"),
        (("--seed", "-1"), "must be within 0"),
        (("--evaluate",), "needs the weights to evaluate: --checkpoint FILE"),
        (("--evaluate", "--checkpoint", "a", "--output", "b"), "leave --resume and --output out"),
        (("--resume", "a", "--checkpoint", "b"), "leave --checkpoint out"),
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


def test_its_weights_classify_as_they_did_when_they_were_tested(
    run, pictures, tmp_path, monkeypatch
):
    """The file tells how the pictures were prepared, and the names of the classes."""
    assert run("--lr", "1e-2", "--steps", 8) == 0
    weights = newest(tmp_path) / "fused_last.safetensors"
    monkeypatch.undo()
    output = tmp_path / "predicted"
    arguments = ("--checkpoint", weights, "--images", pictures, "--top", 2, "--output", output)
    assert predict.main([str(one) for one in (*arguments, "--device", "cpu")]) == 0
    images = json.loads((output / "predictions.json").read_text())
    scores = {
        one["image"]: {each["label"]: each["score"] for each in one["predictions"]}
        for one in images
    }
    losses = [-math.log(scores[f"{name}/2.png"][name]) for name in ("coarse", "fine")]
    (last,) = [
        one
        for one in read_results(weights.parent)["results"]["fused"]["validations"]
        if one["step"] == 8
    ]
    assert sum(losses) / 2 == pytest.approx(last["loss"], abs=1e-4)
