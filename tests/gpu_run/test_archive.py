"""The archive of compiled kernels: what was packed is found again elsewhere."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

pytest.importorskip("triton")

from benchmarks.gpu import archive


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    """A Triton cache with one compiled kernel, and an entry that is none."""
    folder = tmp_path / "here"
    entry = folder / "ABC"
    entry.mkdir(parents=True)
    for name in ("add.cubin", "add.json", "add.ptx"):
        (entry / name).write_text(name)
    paths = {path.name: str(path) for path in sorted(entry.iterdir())}
    (entry / "__grp__add.json").write_text(json.dumps({"child_paths": paths}))
    (folder / "DEF").mkdir()
    (folder / "DEF" / "notes.json").write_text("{}")
    return folder


def test_lists_of_files_follow_the_folder(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(archive, "LIBRARY", ("no library",))
    file, there = tmp_path / "kernels.tar.xz", tmp_path / "there"
    assert archive.pack(cache, [], file)["kernels"] == 1
    archive.unpack(file, there)
    paths = json.loads((there / "ABC" / "__grp__add.json").read_text())["child_paths"]
    assert paths == {name: str(there / "ABC" / name) for name in ("add.cubin", "add.json")}
    assert all(Path(path).read_text() == name for name, path in paths.items())
    assert not (there / "DEF").exists()


def test_another_triton_is_refused(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(archive, "LIBRARY", ())
    file = tmp_path / "kernels.tar.xz"
    archive.pack(cache, [], file)
    monkeypatch.setattr(archive, "versions", lambda: {"triton": "9.9", "python": "3.0"})
    with pytest.raises(ValueError, match=r"packed with .* here run \{'triton': '9.9'"):
        archive.unpack(file, tmp_path / "there")
