"""The example program's checkpoints among other people's files, on full disks and interrupted."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

pytest.importorskip("PIL", reason="the example needs Pillow")

import checkpoint_folder
import training
from checkpoint_folder import latest_checkpoint
from checkpointing import CheckpointError, load_checkpoint, save_checkpoint
from support.example_program import STEPS


class FewNumbers:
    """A trainer as far as checkpoints know one, of 400,000 bytes."""

    blocks = "fused"

    def __init__(self, settings: training.Settings) -> None:
        self.settings = settings
        self.weight = torch.zeros(100_000)

    def tensors(self) -> dict:
        return {"model": {"weight": self.weight}}

    def history(self) -> dict:
        return {"losses": [1.0], "step_seconds": [1.0]}

    def load(self, tensors: dict, history: dict) -> None:
        self.weight = tensors["model"]["weight"]


@pytest.fixture
def trainer(settings: training.Settings) -> FewNumbers:
    return FewNumbers(settings)


@pytest.fixture
def folder(trainer: FewNumbers, tmp_path: Path) -> Path:
    """Holds the checkpoints of steps 1 and 2."""
    for step in (1, 2):
        save_checkpoint(tmp_path / "run", [trainer], step)
    return tmp_path / "run"


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def contents(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


STRANGERS = (
    *("step_0_notes", "step_00000001_best", "step_00000001.unfinished", "step_00000003.unfinished"),
    *("step_00000001.old", "step_000000001", "step_1", "step_", "step_00000001.bak"),
    *("step_\u0661\u0661\u0661\u0661\u0661\u0661\u0661\u0661", "best", "run.json.bak"),
)


def test_what_others_put_there_is_left_alone_and_does_not_matter(run, tmp_path):
    folder = tmp_path / "run"
    every_step = ("--output", folder, "--checkpoint-every", 1)
    assert run(*every_step, "--steps", 1) == 0
    for name in STRANGERS:
        (folder / name).mkdir()
        (folder / name / "mine.txt").write_text(name)
    shutil.copytree(folder / "step_00000001", folder / "step_00000001_copy")
    shutil.copytree(folder / "step_00000001", folder / "step_00000000")
    (folder / "step_00000001_link").symlink_to(folder / "step_00000001")
    (folder / "step_notes.txt").write_text("a file")
    before = {name: contents(folder / name) for name in names(folder)}
    del before["step_00000001"], before["step_00000001_link"]
    assert run(*every_step, "--resume", folder) == 0
    after = {name: contents(folder / name) for name in names(folder)}
    for own in ("step_00000003", "step_00000004", "step_00000001_link"):
        del after[own]
    assert after == before


def add_a_note(checkpoint: Path) -> None:
    (checkpoint / "note.txt").write_text("the best one")


def add_a_folder(checkpoint: Path) -> None:
    (checkpoint / "analysis").mkdir()


def replace_by_a_link(checkpoint: Path) -> None:
    checkpoint.rename(checkpoint.with_name("moved"))
    checkpoint.symlink_to(checkpoint.with_name("moved"))


def as_older_versions_wrote_it(checkpoint: Path) -> None:
    run = json.loads((checkpoint / "run.json").read_text())
    del run["files"]
    (checkpoint / "run.json").write_text(json.dumps(run))


@pytest.mark.parametrize(
    "change", [add_a_note, add_a_folder, replace_by_a_link, as_older_versions_wrote_it]
)
def test_a_checkpoint_that_somebody_changed_is_resumed_but_not_removed(folder, trainer, change):
    change(folder / "step_00000002")
    assert latest_checkpoint(folder) == folder / "step_00000002"
    for step in (3, 4, 5):
        save_checkpoint(folder, [trainer], step)
    left = [name for name in names(folder) if name != "moved"]
    assert left == ["step_00000002", "step_00000004", "step_00000005"]


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def empty_it(checkpoint: Path) -> None:
    shutil.rmtree(checkpoint)
    checkpoint.mkdir()


def make_it_a_file(checkpoint: Path) -> None:
    shutil.rmtree(checkpoint)
    checkpoint.write_text("")


def make_it_a_loop(checkpoint: Path) -> None:
    shutil.rmtree(checkpoint)
    checkpoint.symlink_to(checkpoint)


def copy_another_step(checkpoint: Path) -> None:
    shutil.rmtree(checkpoint)
    shutil.copytree(checkpoint.with_name("step_00000001"), checkpoint)


@pytest.mark.parametrize(
    "damage",
    [
        lambda checkpoint: cut(checkpoint / "__0_0.distcp"),
        lambda checkpoint: cut(checkpoint / ".metadata"),
        lambda checkpoint: cut(checkpoint / "run.json"),
        lambda checkpoint: (checkpoint / "run.json").write_text("[" * 100_000),
        lambda checkpoint: (checkpoint / "run.json").write_text('{"step": "2"}'),
        lambda checkpoint: (checkpoint / "run.json").write_bytes(b"\xff"),
        empty_it,
        make_it_a_file,
        make_it_a_loop,
        copy_another_step,
    ],
    ids=range(10),
)
def test_what_is_no_whole_checkpoint_is_passed_over(folder, capsys, damage):
    damage(folder / "step_00000002")
    assert latest_checkpoint(folder) == folder / "step_00000001"
    (warning,) = capsys.readouterr().err.splitlines()
    assert warning.startswith(f"warning: passed over, {folder / 'step_00000002'} is ")
    assert names(folder) == ["step_00000001", "step_00000002"]


def test_what_is_in_the_way_of_a_checkpoint_is_found_before_training(run, tmp_path, capsys):
    folder = tmp_path / "run"
    for name in ("step_00000001", "step_00000004", "step_00000005"):
        (folder / name).mkdir(parents=True)
        (folder / name / "mine.txt").write_text(name)
    before = contents(folder)
    assert run("--output", folder) == 2
    captured = capsys.readouterr()
    assert f"{folder / 'step_00000004'} is needed for a checkpoint" in captured.err
    assert "steps of" not in captured.out
    assert contents(folder) == before
    shutil.rmtree(folder / "step_00000004")
    assert run("--output", folder) == 0
    assert contents(folder).items() >= {"step_00000005/mine.txt": b"step_00000005"}.items()


def test_what_comes_in_the_way_while_training_is_kept(folder, trainer):
    (folder / "step_00000003").mkdir()
    with pytest.raises(CheckpointError, match="something that this program did not write"):
        save_checkpoint(folder, [trainer], 3)
    assert names(folder) == ["step_00000001", "step_00000002", "step_00000003"]


def test_a_step_that_is_done_again_replaces_its_checkpoint(folder, trainer):
    trainer.weight.fill_(1.0)
    save_checkpoint(folder, [trainer], 1)
    assert names(folder) == ["step_00000001", "step_00000002"]
    trainer.weight = torch.zeros(100_000)
    assert load_checkpoint(folder / "step_00000001", [trainer]) == 1
    assert torch.equal(trainer.weight, torch.ones(100_000))


def test_halves_that_killed_runs_left_are_removed(folder, trainer):
    for name in ("step_00000001.unfinished", "step_00000002.old", "step_00000002.unfinished1"):
        half = folder / name
        half.mkdir()
        (half / "run.json").write_text(json.dumps({"step": int(name[12])}))
        (half / "__0_0.distcp").write_bytes(b"half")
    save_checkpoint(folder, [trainer], 3)
    assert names(folder) == ["step_00000002", "step_00000003"]


def test_a_folder_that_cannot_be_read_is_named(folder, monkeypatch):
    def listdir(path: Path) -> list[str]:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(checkpoint_folder.os, "listdir", listdir)
    with pytest.raises(training.TrainingError, match=f"cannot read the folder {folder}: "):
        checkpoint_folder.checkpoints(folder)


@contextmanager
def full_disk(bytes_left: int) -> Iterator[None]:
    """No file of more than so many bytes can be written."""
    resource = pytest.importorskip("resource")
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (bytes_left, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))


# run.json has some hundred bytes.
@pytest.mark.parametrize("bytes_left", [0, 50, 1000, 100_000])
def test_a_full_disk_leaves_nothing_half(folder, trainer, bytes_left):
    before = contents(folder)
    message = f"cannot write the checkpoint {folder / 'step_00000003'}: \\[Errno 27\\]"
    with full_disk(bytes_left), pytest.raises(CheckpointError, match=message):
        save_checkpoint(folder, [trainer], 3)
    assert contents(folder) == before and names(folder) == ["step_00000001", "step_00000002"]


@pytest.mark.parametrize("failing", [(2, 4), (2,)], ids=["to the end", "for a while"])
def test_training_goes_on_without_a_checkpoint(run, tmp_path, capsys, monkeypatch, failing):
    def save(folder: Path, trainers: list, step: int) -> None:
        with full_disk(1000 if step in failing else -1):
            save_checkpoint(folder, trainers, step)

    monkeypatch.setattr("train_classifier.save_checkpoint", save)
    folder = tmp_path / "run"
    code = run("--output", folder, "--checkpoint-every", 2)
    error = capsys.readouterr().err
    for step in failing:
        assert f"warning: cannot write the checkpoint {folder}/step_0000000{step}: " in error
    assert (code, "error: cannot write" in error) == ((2, True) if 4 in failing else (0, False))
    saved = [path.name for path in folder.glob("step_*")]
    assert saved == ([] if 4 in failing else ["step_00000004"])
    results = json.loads((folder / "results.json").read_text())["results"]
    assert len(results["fused"]["losses"]) == STEPS


def interrupted(*arguments: object, **options: object) -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize("function", ["torch.save", "os.fsync", "pickle.dump", "pathlib.Path.stat"])
def test_an_interrupt_while_writing_leaves_nothing_half(folder, trainer, monkeypatch, function):
    """torch.distributed.checkpoint wraps what goes wrong in its own exception, Ctrl-C too."""
    before = contents(folder)
    with monkeypatch.context() as patches, pytest.raises(KeyboardInterrupt):
        patches.setattr(function, interrupted)
        save_checkpoint(folder, [trainer], 3)
    assert contents(folder) == before and names(folder) == ["step_00000001", "step_00000002"]


def test_ctrl_c_while_writing_ends_the_run(run, tmp_path, monkeypatch, capsys):
    with monkeypatch.context() as patches:
        patches.setattr("torch.save", interrupted)
        assert run("--output", tmp_path / "run") == 130
    assert "stopped" in capsys.readouterr().out
    assert names(tmp_path / "run") == ["fused_best.safetensors", "fused_last.safetensors"]


def test_an_old_checkpoint_that_cannot_be_removed_is_named(folder, trainer, monkeypatch, capsys):
    def rename(path: Path, target: Path) -> None:
        if target.suffix == ".old":
            raise PermissionError(13, "Permission denied", str(path))
        path.replace(target)

    monkeypatch.setattr(Path, "rename", rename)
    save_checkpoint(folder, [trainer], 3)
    expected = f"warning: cannot remove the old checkpoint {folder / 'step_00000001'}: "
    assert expected in capsys.readouterr().err
    assert latest_checkpoint(folder) == folder / "step_00000003"
