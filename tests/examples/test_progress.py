"""The bar that shows how far a run is."""

from __future__ import annotations

import sys

import pytest

pytest.importorskip("PIL", reason="the example needs Pillow")
import progress


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
