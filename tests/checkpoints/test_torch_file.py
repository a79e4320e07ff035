"""Files of torch.save: plain data only, whole, and no more than a checkpoint has."""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints.small_models import (
    WEIGHTS,
    is_untouched,
    module_with,
    saved,
)

from moat_kernels.checkpoints import CheckpointError, load_checkpoint, torch_file


class Bomb:
    def __reduce__(self) -> tuple[Any, ...]:
        return (pytest.fail, ("the pickle was executed",))


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        ({"state_dict": {"x": torch.ones(1)}}, r"missing in the file: .*; not in the model: x"),
        ({"epoch": 3}, "no state_dict: 'epoch' is a int, not a tensor"),
        ({"x": torch.ones(1), "epoch": 3}, "no state_dict: 'epoch' is a int, not a tensor"),
        ({0: torch.ones(1)}, "no state_dict: 0 is not the name of a tensor"),
        ({}, "no state_dict: it is empty"),
        ([torch.ones(1)], "holds a list, not a state_dict"),
        (Bomb(), r"it holds a _pytest\.outcomes\._Fail, which is not plain data; if you trust"),
        (torch.nn.Linear(1, 1), "it holds a torch.nn.modules.linear.Linear, .* only its state_d"),
    ],
)
def test_torch_files_that_are_no_state_dict(tmp_path: Path, content: Any, complaint: str) -> None:
    torch.save(content, tmp_path / "bad.pt")
    with pytest.raises(CheckpointError, match=rf"bad\.pt: .*{complaint}"):
        load_checkpoint(module_with(WEIGHTS), tmp_path / "bad.pt")


def test_archives_that_unpack_to_more_than_their_size(tmp_path: Path) -> None:
    path = saved(tmp_path, {"x": torch.zeros(100_000)})
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    with pytest.raises(CheckpointError, match=r"x\.ckpt: a compressed archive, which torch.save"):
        load_checkpoint(module_with(WEIGHTS), path)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol 5")
def test_a_pickle_that_torch_cannot_restrict(tmp_path: Path) -> None:
    torch.save(WEIGHTS, tmp_path / "x.pt", pickle_protocol=5)
    with pytest.raises(CheckpointError, match=r"x\.pt: .* safely: Unsupported operand 149"):
        load_checkpoint(module_with(WEIGHTS), tmp_path / "x.pt")


@pytest.mark.parametrize("kind", ["zip", "legacy"])
def test_a_pickle_that_is_too_large_is_not_read(
    tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch_file, "_MAXIMUM_PICKLE_BYTES", 1000)
    path, lists = tmp_path / "x.pt", b"\x80\x02" + b"]" * 998 + b"."
    if kind == "zip":
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("x/data.pkl", lists)
    else:
        path.write_bytes(lists)
    with pytest.raises(CheckpointError, match=r"x\.pt: .*1001 bytes are too many"):
        load_checkpoint(module_with(WEIGHTS), path)


def test_every_cut_of_a_torch_file_is_noticed(tmp_path: Path) -> None:
    path, model = saved(tmp_path, WEIGHTS), module_with(WEIGHTS)
    content = path.read_bytes()
    for size in range(0, len(content), 61):
        path.write_bytes(content[:size])
        with pytest.raises(CheckpointError, match=r"x\.ckpt: "):
            load_checkpoint(model, path)
    assert is_untouched(model)
