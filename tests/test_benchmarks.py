"""What makes tables and charts of benchmark results, on made-up ones."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
BLOCK = "mbconv eval 56x56x96 batch 1"
MODEL = "model training tiny_moat_0 256 batch 8"
EVAL = "model eval tiny_moat_0 256 batch 1"
SIZES = "sizes training tiny_moat_0"


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
    """A file of pytest-benchmark: a block at 1.05 of its floor, a model in training and in eval."""
    rows = {
        BLOCK: [info("floor", 2.0, time_over_floor=1.0), info("cpu", 2.1, time_over_floor=1.05)],
        MODEL: [
            info("stock", 1000.0, saved_bytes=10 * 2**20, peak_bytes=12 * 2**20),
            info("stock channels_last", 900.0, saved_bytes=10 * 2**20, peak_bytes=12 * 2**20),
            info("torch.compile", 950.0, saved_bytes=8 * 2**20, peak_bytes=11 * 2**20),
            info("cpu auto", 500.0, saved_bytes=5 * 2**20, peak_bytes=6 * 2**20),
            info("cpu auto bfloat16", 400.0, saved_bytes=5 * 2**19, peak_bytes=6 * 2**19),
        ],
        EVAL: [
            info("OpenVINO", 6.0, logit_error=0.008),
            info("OpenVINO float32", 8.0, logit_error=4e-7),
            info("OpenVINO int8", 5.0, logit_error=0.03),
            info("cpu frozen", 5.5, logit_error=2e-7),
            info("cpu frozen bfloat16", 4.0, logit_error=0.006),
            info("cpu frozen int8", 4.0, logit_error=0.06),
        ],
        SIZES: [
            info("stock channels_last, 1344 px", 9.0, ms_per_megapixel=5.0, peak_bytes=4 * 2**30),
            info("cpu auto, 224 px", 0.9, ms_per_megapixel=2.25),
            info("cpu auto, 1344 px", 4.5, ms_per_megapixel=2.5, peak_bytes=3 * 2**30),
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


def run(*arguments: object) -> str:
    """What `python ...` prints where the benchmarks can be imported."""
    result = subprocess.run(
        [sys.executable, *map(str, arguments)],
        env={
            **os.environ,
            "PYTHONPATH": os.pathsep.join((str(BENCHMARKS), str(BENCHMARKS.parent))),
        },
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


def targets(results: Path, only: str) -> list[str]:
    options = ("--no-run", "--results", results, "--only", only)
    return run(BENCHMARKS / "targets.py", *options).splitlines()


def test_targets_that_are_met_missed_and_not_measured(results: Path) -> None:
    table = targets(results, f"{BLOCK}|{MODEL}")
    rows = [line.split() for line in table]
    block = ["<=", "1.10", "1.05", "met", "A", "CPU,", "avx2,", "3", "threads"]
    assert [*BLOCK.split(), *block] in rows
    assert [*MODEL.split(), ">=", "1.90", "1.80", "missed", *block[4:]] in rows  # 900 / 500
    assert [*MODEL.split(), "<=", "0.40", "0.50", "missed", *block[4:]] in rows
    assert [*MODEL.split(), "<=", "0.10", "not", "measured"] in rows
    assert [*MODEL.split(), ">=", "1.40", "1.25", "missed", *block[4:]] in rows  # autocast
    assert [*MODEL.split(), "<=", "0.51", "0.50", "met", *block[4:]] in rows
    assert table[-1] == "3 of 6 met; 4 not measured"


def test_each_precision_has_its_rival(results: Path) -> None:
    table = [line.replace(EVAL, "").split("A CPU")[0].split() for line in targets(results, EVAL)]
    sections = [
        ("cpu frozen bfloat16, speedup over OpenVINO", ">= 1.25 1.50 met"),
        ("cpu frozen bfloat16, speedup over cpu frozen", ">= 1.40 1.38 missed"),
        ("cpu frozen int8, speedup over OpenVINO int8", ">= 1.10 1.25 met"),
        ("cpu frozen int8, logit error over that of OpenVINO int8", "<= 1.00 2.00 missed"),
        ("both with weights prepared once, speedup over OpenVINO float32", ">= 1.30 1.45 met"),
        ("both with weights prepared once, speedup over ONNX Runtime", ">= 1.30 not measured"),
        ("both with weights prepared once, speedup over torch.compile", ">= 1.30 not measured"),
    ]
    for section, row in sections:
        assert table[table.index(f"model eval, {section}".split()) + 1] == row.split()


def test_what_a_pixel_costs_at_every_size(results: Path) -> None:
    table = [line.replace(SIZES, "").split("A CPU")[0].split() for line in targets(results, SIZES)]
    sections = [
        ("time of a pixel at 1344 px over that at 224 px", "<= 1.15 1.11 met"),
        ("peak of a step at 641 px over stock's", "<= 0.50 not measured"),
        ("peak of a step at 1344 px over stock's", "<= 0.50 0.75 missed"),
    ]
    for section, row in sections:
        assert (
            table[table.index(f"backbone training, cpu auto, {section}".split()) + 1] == row.split()
        )


def test_the_tables_and_the_charts(results: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    run(BENCHMARKS / "report.py", results, "--tables", tmp_path / "tables.md", "--charts", tmp_path)
    tables = (tmp_path / "tables.md").read_text()
    assert "A CPU, native kernels avx2, 3 threads, torch 2.0" in tables
    assert "| cpu auto | 500.00 | 1.80 |  | 0.2 | 0% | 5.0 MiB | 6.0 MiB |  |  |" in tables
    assert "| cpu frozen bfloat16 | 4.00 |  |  | 25.0 | 50% |  |  | 6.0e-03 |  |" in tables
    assert "| 3072.0 MiB |  | 2 |" in tables  # the peak, and ms / megapixel
    for chart in ("training.png", "eval.png", "sizes.png"):
        assert (tmp_path / chart).stat().st_size > 10_000


CHARTED = """
import sys
from report import charted, describe_contender
groups = charted({sys.argv[1]: dict.fromkeys(sys.argv[2:], {})}, "eval")
print(*(describe_contender(name)[0] for rows in groups.values() for name in rows), sep="\\n")
"""


def test_the_chart_shows_runtimes_as_users_meet_them() -> None:
    runtimes = ("OpenVINO", "OpenVINO float32", "OpenVINO int8", "ONNX Runtime")
    ours = ("cpu frozen", "cpu frozen bfloat16", "cpu frozen int8")
    assert run("-c", CHARTED, EVAL, *runtimes, *ours).splitlines() == [
        *("OpenVINO, its default precision", "OpenVINO int8", "ONNX Runtime"),
        "fused, native CPU, frozen",
        "fused, native CPU, frozen, bfloat16",
        "fused, native CPU, frozen, int8",
    ]
