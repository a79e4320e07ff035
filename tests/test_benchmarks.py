"""What makes tables and charts of benchmark results, on made-up ones."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
BLOCK = "mbconv eval 56x56x96 batch 1"
MODEL = "model training tiny_moat_0 256 batch 8"


def info(contender: str, milliseconds: float, **more: float) -> dict[str, object]:
    machine = {"device": "A CPU", "instruction_set": "avx2", "threads": 3}
    return {
        "contender": contender,
        "interleaved_ms": milliseconds,
        "gflops": 100.0 / milliseconds,
        "peak_gflops": 50.0,
        **machine,
        **more,
    }


@pytest.fixture
def results(tmp_path: Path) -> Path:
    """A file of pytest-benchmark: a block at 1.05 of its floor, a model's training step."""
    rows = {
        BLOCK: [info("floor", 2.0, time_over_floor=1.0), info("cpu", 2.1, time_over_floor=1.05)],
        MODEL: [
            info("stock", 1000.0, saved_bytes=10 * 2**20, peak_bytes=12 * 2**20),
            info("stock channels_last", 900.0, saved_bytes=10 * 2**20, peak_bytes=12 * 2**20),
            info("torch.compile", 950.0, saved_bytes=8 * 2**20, peak_bytes=11 * 2**20),
            info("cpu auto", 500.0, saved_bytes=5 * 2**20, peak_bytes=6 * 2**20),
        ],
    }
    facts = {
        "cpu": {"name": "A CPU", "threads": 3},
        "extension": {"instruction_set": "avx2"},
        "versions": {"torch": "2.0", "moat_kernels": "0.1"},
    }
    entries = [{"group": group, "extra_info": row} for group in rows for row in rows[group]]
    file = tmp_path / "results.json"
    machine_info = {"moat_kernels": facts}
    file.write_text(json.dumps({"benchmarks": entries, "machine_info": machine_info}))
    return file


def run(program: str, *arguments: object) -> str:
    command = [sys.executable, str(BENCHMARKS / program), *map(str, arguments)]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_targets_that_are_met_missed_and_not_measured(results: Path) -> None:
    table = run("targets.py", "--no-run", "--results", results, "--only", f"{BLOCK}|{MODEL}")
    rows = [line.split() for line in table.splitlines()]
    block = ["<=", "1.10", "1.05", "met", "A", "CPU,", "avx2,", "3", "threads"]
    assert [*BLOCK.split(), *block] in rows
    assert [*MODEL.split(), ">=", "1.90", "1.80", "missed", *block[4:]] in rows  # 900 / 500
    assert [*MODEL.split(), "<=", "0.40", "0.50", "missed", *block[4:]] in rows
    assert [*MODEL.split(), "<=", "0.10", "not", "measured"] in rows
    assert table.splitlines()[-1] == "2 of 4 met; 3 not measured"


def test_the_tables_and_the_chart(results: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    run("report.py", results, "--tables", tmp_path / "tables.md", "--charts", tmp_path)
    tables = (tmp_path / "tables.md").read_text()
    assert "A CPU, native kernels avx2, 3 threads, torch 2.0" in tables
    assert "| cpu auto | 500.00 | 1.80 |  | 0.2 | 0% | 5.0 MiB | 6.0 MiB |" in tables
    assert (tmp_path / "training.png").stat().st_size > 10_000
    assert not (tmp_path / "eval.png").exists()
