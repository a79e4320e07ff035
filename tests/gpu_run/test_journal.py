"""The records of `make gpu`, and the tables made of them."""

from __future__ import annotations

from pathlib import Path

from benchmarks.gpu.journal import Journal
from benchmarks.gpu.tables import format_tables


def test_the_last_end_of_a_step_counts(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    journal.begin("smoke", "a", 5.0)
    journal.end("smoke", "a", "cut off", reason="late")
    assert journal.finished("smoke") == set()
    journal.begin("smoke", "a", 5.0)
    assert journal.running("smoke")["step"] == "a"
    journal.end("smoke", "a", "done", [{"error": 1e-3}])
    assert journal.running("smoke") is None
    assert journal.finished("smoke") == {"a"}
    assert journal.rows("smoke") == [{"error": 1e-3}]


def test_a_line_that_was_cut_short_is_left_out(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    journal.end("smoke", "a", "done")
    with journal.file.open("a") as file:
        file.write('{"section": "smo')
    assert [record["step"] for record in journal.records()] == ["a"]


def test_tables(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    journal.end("copy", "a", "done", [{"kernel": "a|b", "ms": 1.23456, "launches": 12}])
    journal.end("copy", "b", "done", [{"kernel": "c", "ms": None, "launches": 3}])
    journal.end("copy", "c", "failed", reason="no memory")
    table = format_tables(journal.ended())
    assert (
        "| kernel | ms | launches |\n|---|---:|---:|\n| a\\|b | 1.23 | 12 |\n| c |  | 3 |" in table
    )
    assert "- c: failed: no memory" in table
