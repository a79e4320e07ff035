"""A folder of images in, their classes out: whatever the images are and whenever it is stopped."""

from __future__ import annotations

import csv
import itertools
import json
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("PIL", reason="the example needs Pillow")

import predict
import prediction_model
from PIL import Image
from support.example_program import small_model

import moat_kernels
from moat_kernels.checkpoints import save_safetensors
from moat_kernels.configuration import KERAS
from moat_kernels.preprocessing import PIXELS, Preprocessing

CLASSES = ["ant", "bee", "cat, black", "dog", "elk", "fox"]
NAMES = ["a/0.png", "a/1.png", "a/2.png", "b/c/3.png", "b/c/4.jpg", "b/5.png", "b/6.png"]
RESOLUTION = 32
RESULTS = ("predictions.csv", "predictions.json", "errors.csv")


def make_model(seed: int = 0, **options: object) -> moat_kernels.MOAT:
    """One that tells images apart, as random weights alone do not."""
    torch.manual_seed(seed)
    model = small_model("tiny_moat_0", num_classes=len(CLASSES), **options).eval()
    with torch.no_grad():
        model.logits_head.weight *= 100
    return model


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("weights") / "model.safetensors"
    save_safetensors(make_model().state_dict(), path, {"classes": json.dumps(CLASSES)})
    return path


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """Seven images of random blotches, one of them turned by its EXIF data, in three folders."""
    folder = tmp_path / "images"
    for number, name in enumerate(NAMES):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        size = (6, 5 + number, 3)
        pixels = np.random.default_rng(number).integers(0, 256, size, dtype=np.uint8)
        Image.fromarray(pixels).resize((60, 40)).save(path)
    (folder / "notes.txt").write_text("no image")
    (folder / "a" / "._0.png").write_bytes(b"what macOS adds")
    return folder


@pytest.fixture
def run(
    checkpoint: Path, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., int]:
    """Calls the program on the images."""
    monkeypatch.setattr(predict, "RUNS", tmp_path / "runs")

    def call(*arguments: object) -> int:
        given = ("--checkpoint", checkpoint, "--images", images, "--resolution", RESOLUTION)
        speed = ("--batch", 2, "--workers", 2, "--device", "cpu")
        return predict.main([str(one) for one in (*given, *speed, *arguments)])

    return call


def scores(folder: Path) -> dict[str, dict[str, float]]:
    """By image the scores by label, of predictions.json."""
    return {
        entry["image"]: {one["label"]: one["score"] for one in entry["predictions"]}
        for entry in json.loads((folder / "predictions.json").read_text())
    }


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8", errors="surrogateescape") as file:
        return list(csv.DictReader(file))


def contents(folder: Path) -> list[bytes]:
    return [(folder / name).read_bytes() for name in RESULTS]


def assert_alike(found: Path, expected: Path, tolerance: float) -> None:
    left, right = scores(found), scores(expected)
    assert left.keys() == right.keys()
    for image in left:
        assert left[image] == pytest.approx(right[image], abs=tolerance), image


def expected_scores(image: Path) -> dict[str, float]:
    """Of one image by itself, by the plain model."""
    model = make_model()
    preprocessing = moat_kernels.get_preprocessing("tiny_moat_0")
    with Image.open(image) as opened:
        square = (60 - 0.875 * 40) / 2, 0.0625 * 40, (60 + 0.875 * 40) / 2, 0.9375 * 40
        small = opened.convert("RGB").resize((RESOLUTION,) * 2, Image.Resampling.BICUBIC, square)
    mean, std = np.array(preprocessing.mean), np.array(preprocessing.std)
    x = torch.from_numpy((np.asarray(small) / 255 - mean) / std).permute(2, 0, 1)[None].float()
    with torch.no_grad():
        return dict(zip(CLASSES, model(x).softmax(1)[0].tolist(), strict=True))


def test_every_image_has_its_own_classes(run, images, tmp_path, capsys) -> None:
    assert run("--top", 6) == 0
    (output,) = (tmp_path / "runs").iterdir()
    found = scores(output)
    assert list(found) == sorted(NAMES)
    for name in NAMES:
        assert found[name] == pytest.approx(expected_scores(images / name), abs=1e-4), name
        assert list(found[name].values()) == sorted(found[name].values(), reverse=True)
    assert len({max(one, key=one.get) for one in found.values()}) > 1  # else swaps would not show
    assert [
        (row["image"], row["label"], float(row["score"]))
        for row in rows(output / "predictions.csv")
    ] == [(name, *pair) for name, one in found.items() for pair in one.items()]
    assert rows(output / "errors.csv") == []
    assert "7 images in " in (text := capsys.readouterr().out)
    assert "images per second, batch 2, float32, cpu" in text and "7/7" in text


@pytest.mark.parametrize("name", ["names.txt", "names.csv", "names.json"])
def test_labels_of_a_file_go_before_those_of_the_checkpoint(run, tmp_path, name: str) -> None:
    lines = {"names.txt": "{}\n", "names.csv": "0,{}\n", "names.json": '"{}",'}[name]
    text = "".join(lines.format(f"{label}!".replace(",", "")) for label in CLASSES)
    text = {"names.csv": f"id,name\n{text}", "names.json": f"[{text[:-1]}]"}.get(name, text)
    (tmp_path / name).write_text(text)
    run("--top", 6, "--output", tmp_path / "own")
    assert run("--top", 6, "--labels", tmp_path / name, "--output", tmp_path / "given") == 0
    renamed = {
        image: {f"{label}!".replace(",", ""): score for label, score in one.items()}
        for image, one in scores(tmp_path / "own").items()
    }
    assert scores(tmp_path / "given") == renamed


def test_without_labels_classes_have_numbers(run, tmp_path) -> None:
    save_safetensors(make_model().state_dict(), tmp_path / "bare.safetensors")
    assert run("--checkpoint", tmp_path / "bare.safetensors", "--output", tmp_path / "run") == 0
    assert {label for one in scores(tmp_path / "run").values() for label in one} <= set("012345")


def test_names_of_any_kind(run, images, tmp_path, capsys) -> None:
    odd = ['comma, "quote"\nline.png', "\u00e9\u732b.png", os.fsdecode(b"\xff.png")]
    for name in odd:
        (images / name).write_bytes((images / "a/0.png").read_bytes())
    (images / "broken \n, ;.png").write_text("text")
    for _ in range(2):
        assert run("--output", tmp_path / "run") == 2
    assert sorted([*NAMES, *odd]) == list(scores(tmp_path / "run"))
    (error,) = rows(tmp_path / "run/errors.csv")
    assert error["image"] == "broken \n, ;.png"
    assert {row["image"] for row in rows(tmp_path / "run/predictions.csv")} == {*NAMES, *odd}


def test_a_tagger_sees_what_its_file_tells(run, images, tmp_path) -> None:
    """Pixels of the whole image with a white border, blue first."""
    model, path = make_model(**KERAS), tmp_path / "tagger.safetensors"
    model.describe_images(Preprocessing(*PIXELS, RESOLUTION, "bgr", "border", 1.0))
    save_safetensors(model.state_dict(), path)
    assert run("--checkpoint", path, "--threshold", 0, "--output", tmp_path / "tags") == 0
    found = scores(tmp_path / "tags")
    for name in NAMES:
        square = np.full((60, 60, 3), 255, np.uint8)
        square[10:50] = np.asarray(Image.open(images / name).convert("RGB"))
        small = Image.fromarray(square).resize((RESOLUTION,) * 2, Image.Resampling.BICUBIC)
        x = torch.from_numpy(np.array(small)[..., ::-1].copy()).permute(2, 0, 1)[None]
        with torch.no_grad():
            expected = model(x).sigmoid()[0].tolist()
        assert [found[name][str(index)] for index in range(6)] == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"num_classes": 0}, "has no classifier"),
        ({"in_chans": 4}, "is for images of 4 channels"),
        ({"num_classes": 5}, "names 6 classes, but the model has 5"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_models_that_do_not_classify_photographs_are_refused(
    run, tmp_path, capsys, options, complaint: str
) -> None:
    path, labels = tmp_path / "x.safetensors", tmp_path / "labels.txt"
    labels.write_text("\n".join(CLASSES))
    save_safetensors(small_model("tiny_moat_0", **options).state_dict(), path)
    assert run("--checkpoint", path, "--labels", labels) == 1
    assert complaint in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()


def test_what_is_no_checkpoint_is_named(run, tmp_path, capsys) -> None:
    (tmp_path / "x.pt").write_text("text")
    for path in (tmp_path / "x.pt", tmp_path / "none"):
        assert run("--checkpoint", path) == 1
        assert f"error: --checkpoint {path} cannot be loaded: " in capsys.readouterr().err


def test_weights_of_which_no_preprocessing_is_known(run, tmp_path, capsys) -> None:
    torch.save(dict(make_model().state_dict()), tmp_path / "bare.pt")
    assert run("--checkpoint", tmp_path / "bare.pt") == 1
    assert "does not tell how images are prepared" in capsys.readouterr().err


def test_five_classes_unless_told_otherwise(run, tmp_path) -> None:
    assert run() == 0
    assert {len(one) for one in scores(tmp_path / "runs" / "1").values()} == {5}
    assert run("--top", 9) == 0  # more than there are
    assert {len(one) for one in scores(tmp_path / "runs" / "2").values()} == {6}


def test_tags_above_a_threshold(run, tmp_path) -> None:
    run("--threshold", 0, "--output", tmp_path / "all")
    every = scores(tmp_path / "all")
    assert all(len(one) == len(CLASSES) for one in every.values())
    best = sorted(max(one.values()) for one in every.values())
    between = (best[0] + best[1]) / 2  # one image has no tag above it
    run("--threshold", between, "--output", tmp_path / "some")
    assert scores(tmp_path / "some") == {
        image: {label: score for label, score in one.items() if score > between}
        for image, one in every.items()
    }
    (without,) = [row for row in rows(tmp_path / "some/predictions.csv") if not row["label"]]
    assert without["score"] == "" and not scores(tmp_path / "some")[without["image"]]


@pytest.mark.parametrize(
    ("options", "tolerance"),
    [
        ("--batch 1", 1e-4),
        ("--batch 3", 1e-4),
        ("--no-freeze", 1e-4),
        ("--dtype bfloat16", 0.1),
        ("--dtype float16", 0.1),
        ("--dtype bfloat16 --no-freeze", 0.1),
    ],
)
@pytest.mark.filterwarnings("ignore::moat_kernels.FallbackWarning")  # CPUs that lack a dtype
def test_other_ways_to_compute_the_same(run, tmp_path, options: str, tolerance: float) -> None:
    run("--top", 6, "--output", tmp_path / "one")
    assert run("--top", 6, "--output", tmp_path / "other", *options.split()) == 0
    assert_alike(tmp_path / "other", tmp_path / "one", tolerance)
    assert contents(tmp_path / "other") != contents(tmp_path / "one") or "--dtype" not in options


def test_a_model_that_cannot_be_frozen_runs_as_it_is(run, tmp_path, capsys, monkeypatch) -> None:
    def refuse(*arguments: object, **options: object) -> None:
        raise ValueError("nothing in model can be frozen: no native kernels")

    run("--output", tmp_path / "one")
    monkeypatch.setattr(moat_kernels, "freeze", refuse)
    assert run("--output", tmp_path / "other") == 0
    assert "warning: not frozen: nothing in model can be frozen" in capsys.readouterr().err
    assert_alike(tmp_path / "other", tmp_path / "one", 1e-4)


def damage(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-40])


def test_what_cannot_be_read_is_left_out_and_tried_again(run, images, tmp_path, capsys) -> None:
    run("--output", tmp_path / "whole")
    kept = {name: (images / name).read_bytes() for name in ("a/1.png", "b/5.png")}
    damage(images / "a/1.png")
    (images / "b/5.png").write_text("text")
    output = tmp_path / "run"
    for _ in range(2):
        capsys.readouterr()
        assert run("--output", output) == 2
        error = capsys.readouterr().err
        assert "left out: a/1.png: " in error and "left out: b/5.png: cannot identify" in error
        assert f"2 images were left out, see {output / 'errors.csv'}" in error
        first, second = rows(output / "errors.csv")
        assert (first["image"], second["image"]) == ("a/1.png", "b/5.png")
        assert "truncated" in first["reason"] and "cannot identify" in second["reason"]
        others = scores(tmp_path / "whole")
        del others["a/1.png"], others["b/5.png"]
        for name, found in scores(output).items():
            assert found == pytest.approx(others.pop(name), abs=1e-4)
        assert not others
    for name, data in kept.items():
        (images / name).write_bytes(data)
    assert run("--output", output) == 0
    assert rows(output / "errors.csv") == []
    assert_alike(output, tmp_path / "whole", 1e-4)


def test_what_failed_before_is_tried_last(run, images, tmp_path, monkeypatch) -> None:
    """Else a machine that is often interrupted would do little else."""
    (images / "a/0.png").write_text("text")
    tried, append = [], predict.Journal.append

    def stop_after_one(journal: predict.Journal, records: list) -> None:
        append(journal, records)
        tried.extend(record.image for record in records)
        raise KeyboardInterrupt

    monkeypatch.setattr(predict.Journal, "append", stop_after_one)
    for _ in range(5):
        assert run("--output", tmp_path / "run") == 130
    assert tried == [*sorted(NAMES), "a/0.png"]


def test_images_may_come_go_and_change(run, images, tmp_path, capsys, calls) -> None:
    output = tmp_path / "run"
    run("--output", output)
    before = scores(output)
    (images / "a/0.png").unlink()
    (images / "a/new.png").write_bytes((images / "b/6.png").read_bytes())
    (images / "a/2.png").write_bytes((images / "b/5.png").read_bytes())
    calls.clear()
    capsys.readouterr()
    assert run("--output", output) == 0
    assert sum(calls) == 2
    text = capsys.readouterr()
    assert "1 images were deleted since they were predicted, 'a/0.png' among them" in text.err
    assert "7 images in " in text.out and "5 of them done before" in text.out
    after = scores(output)
    assert after["a/0.png"] == before["a/0.png"]
    assert after["a/new.png"] == pytest.approx(before["b/6.png"], abs=1e-4)
    assert after["a/2.png"] == pytest.approx(before["b/5.png"], abs=1e-4)


def test_an_image_that_is_deleted_meanwhile(run, images, tmp_path, capsys, monkeypatch) -> None:
    names = predict.image_names

    def then_delete(folder: Path) -> list[str]:
        found = names(folder)
        (folder / "b/6.png").unlink()
        return found

    monkeypatch.setattr(predict, "image_names", then_delete)
    assert run("--output", tmp_path / "run") == 2
    assert "left out: b/6.png: it was deleted meanwhile" in capsys.readouterr().err
    monkeypatch.undo()
    assert "b/6.png" not in scores(tmp_path / "run")


def test_what_is_not_finite_is_no_result(run, tmp_path, monkeypatch) -> None:
    logits = prediction_model.Classifier.logits

    def broken(self: prediction_model.Classifier, pixels: torch.Tensor) -> torch.Tensor:
        result = logits(self, pixels).clone()
        result[0, 3] = float("nan")
        return result

    monkeypatch.setattr(prediction_model.Classifier, "logits", broken)
    assert run("--output", tmp_path / "run", "--dtype", "bfloat16") == 2
    reasons = {row["reason"] for row in rows(tmp_path / "run/errors.csv")}
    assert reasons == {
        "the model's outputs for it are not finite in bfloat16; --dtype float32 may help"
    }
    assert len(scores(tmp_path / "run")) == 3  # one of each batch of two


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many images the model was given in each call."""
    logits, counts = prediction_model.Classifier.logits, []

    def counting(self: prediction_model.Classifier, pixels: torch.Tensor) -> torch.Tensor:
        counts.append(len(pixels))
        return logits(self, pixels)

    monkeypatch.setattr(prediction_model.Classifier, "logits", counting)
    return counts


@pytest.mark.parametrize("batches", [0, 1, 3])
def test_after_ctrl_c_it_goes_on(run, tmp_path, capsys, calls, monkeypatch, batches: int) -> None:
    run("--output", tmp_path / "whole")
    output = tmp_path / "run"
    with monkeypatch.context() as context:
        append = predict.Journal.append

        def stop(journal: predict.Journal, records: list) -> None:
            if len(journal) == 2 * batches:
                raise KeyboardInterrupt
            append(journal, records)

        context.setattr(predict.Journal, "append", stop)
        capsys.readouterr()
        assert run("--output", output) == 130
    assert f"the same command with --output {output} goes on" in capsys.readouterr().out
    whole = scores(tmp_path / "whole")
    assert scores(output) == {name: whole[name] for name in sorted(whole)[: 2 * batches]}
    calls.clear()
    assert run("--output", output) == 0
    assert sum(calls) == len(NAMES) - 2 * batches
    assert contents(output) == contents(tmp_path / "whole")


@pytest.mark.parametrize("share", [0.0, 0.4, 0.7, 0.99])
def test_after_a_power_failure_it_goes_on(run, tmp_path, capsys, share: float) -> None:
    """Only a part of the journal came to the disk, results did not."""
    run("--output", tmp_path / "whole")
    output = tmp_path / "run"
    output.mkdir()
    (output / "run.json").write_bytes((tmp_path / "whole/run.json").read_bytes())
    journal = (tmp_path / "whole/journal.jsonl").read_bytes()
    (output / "journal.jsonl").write_bytes(journal[: int(share * len(journal))])
    assert run("--output", output) == 0
    assert contents(output) == contents(tmp_path / "whole")
    assert (output / "journal.jsonl").read_bytes() == journal
    told = "bytes of journal.jsonl are of an interrupted batch" in capsys.readouterr().out
    assert told == (share > 0)


def test_a_run_that_is_done_computes_nothing_more(run, tmp_path, calls) -> None:
    output = tmp_path / "run"
    run("--output", output)
    before = contents(output)
    calls.clear()
    assert run("--output", output) == 0
    assert not calls and contents(output) == before


@pytest.mark.parametrize("written", [0, 1, 3, 5, 8])
def test_on_a_full_disk_it_stops_and_goes_on(
    run, tmp_path, capsys, monkeypatch, written: int
) -> None:
    """However much of settings, journal and results came to the disk before."""
    run("--output", tmp_path / "whole")
    with monkeypatch.context() as context:
        sync, done = os.fsync, itertools.count()

        def fail(descriptor: int) -> None:
            if next(done) >= written:
                raise OSError(28, "No space left on device")
            sync(descriptor)

        context.setattr(os, "fsync", fail)
        assert run("--output", tmp_path / "run") == 1
    assert f"error: --output {tmp_path / 'run'}: [Errno 28]" in capsys.readouterr().err
    assert run("--output", tmp_path / "run") == 0
    assert contents(tmp_path / "run") == contents(tmp_path / "whole")


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ("--top 3", "top was 5, is 3"),
        ("--threshold 0.5", "top was 5, is null; threshold was null, is 0.5"),
        ("--resolution 48", "resolution was 32, is 48"),
        ("--batch 3", "batch was 2, is 3"),
        ("--dtype float16", 'dtype was "float32", is "float16"'),
    ],
)
@pytest.mark.filterwarnings("ignore::moat_kernels.FallbackWarning")
def test_a_run_of_other_settings_is_refused(run, tmp_path, capsys, options: str, told: str) -> None:
    output = tmp_path / "run"
    run("--output", output)
    before = contents(output)
    assert run("--output", output, *options.split()) == 1
    error = capsys.readouterr().err
    assert f"error: --output {output} holds a run of other settings (" in error and told in error
    assert contents(output) == before


def test_a_run_of_other_weights_or_labels_is_refused(run, tmp_path, capsys) -> None:
    output = tmp_path / "run"
    run("--output", output)
    weights, labels = tmp_path / "other.safetensors", tmp_path / "labels.txt"
    save_safetensors(make_model(seed=1).state_dict(), weights, {"classes": json.dumps(CLASSES)})
    labels.write_text("\n".join(reversed(CLASSES)))
    assert run("--output", output, "--checkpoint", weights) == 1
    assert "(weights was " in capsys.readouterr().err
    assert run("--output", output, "--labels", labels) == 1
    assert "(labels was " in capsys.readouterr().err


def test_the_checkpoint_may_move(run, checkpoint, tmp_path, calls) -> None:
    run("--output", tmp_path / "run")
    moved = tmp_path / "moved.safetensors"
    moved.write_bytes(checkpoint.read_bytes())
    calls.clear()
    assert run("--output", tmp_path / "run", "--checkpoint", moved) == 0
    assert not calls


def test_results_of_something_else_are_not_overwritten(run, tmp_path, capsys) -> None:
    (tmp_path / "predictions.csv").write_text("mine")
    assert run("--output", tmp_path) == 1
    assert "has a predictions.csv, but no run.json" in capsys.readouterr().err
    assert (tmp_path / "predictions.csv").read_text() == "mine"
