"""Lower bounds of time, and docs/roofline.md."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from support import roofline
from support.issue_table import PLANNED_SECONDS, Issue, read_file
from support.roofline import (
    DOCUMENT,
    ISSUE,
    forecast_rows,
    issue_rows,
    issue_verdict,
    kernel_rows,
    planned_seconds,
    planned_verdict,
    step_rows,
    trace,
)

from moat_kernels.ops.triton_support.launching import triton_missing
from moat_kernels.ops.triton_support.traffic import Crossing, Pass
from moat_kernels.plan import GPUS, floor_seconds, kernels
from moat_kernels.plan.operators import OperatorPass


def one_pass(kernel: str, bytes: int, flops: int, arithmetic: str = "bfloat16") -> Pass:
    return Pass(kernel, (Crossing(torch.Size([bytes]), bytes),), (), flops, arithmetic)


def test_each_kernel_takes_the_longer_of_its_bytes_and_its_products() -> None:
    gpu = GPUS["a100"]
    moves = one_pass("moves", 2_039 * 10**9, 312)
    multiplies = one_pass("multiplies", 8, 312 * 10**12)
    assert floor_seconds([moves], gpu) == pytest.approx(1)
    assert floor_seconds([multiplies], gpu) == pytest.approx(1)
    assert floor_seconds([moves, multiplies, moves], gpu) == pytest.approx(3)
    thrice = one_pass("float32 by TF32", 8, 156 * 10**12, "tf32x3")
    assert floor_seconds([thrice], gpu) == pytest.approx(3)


def test_launches_are_grouped_by_kernel() -> None:
    groups = kernels([one_pass("a", 1, 2), one_pass("b", 100, 0), one_pass("a", 3, 4)])
    assert [(group.name, group.bytes, group.flops) for group in groups] == [
        ("b", 100, 0),
        ("a", 4, 6),
    ]


@pytest.mark.skipif(bool(triton_missing()), reason=triton_missing())
def test_the_document_is_current() -> None:
    """One variant of nine; `python benchmarks/roofline.py` writes it anew."""
    document = DOCUMENT.read_text().splitlines()
    steps = trace("tiny_moat_0")
    issue = read_file()
    for row in (
        *step_rows("tiny_moat_0", steps),
        *forecast_rows("tiny_moat_0", steps),
        *kernel_rows("none", steps),
        *issue_rows(issue, cuda=True),
        *issue_rows(issue, cuda=False),
        *f"{ISSUE}{issue_verdict(issue)}".splitlines(),
    ):
        assert row in document


def launch(kernel: str, cuda: int, triton: int, **counted: int) -> Issue:
    sizes = {"bytes": 0, "flops": 0, "instructions": 0, **counted}
    most = sizes["instructions"]
    texts = {"constants": "", "arguments": "", "grid": "", "numbers": "", "source": ""}
    made = {"unit": "bfloat16", "compiler": "", "warps": 4, "tensor_flops": 0, "blocks": 1}
    return Issue(kernel=kernel, cuda=cuda, triton=triton, most=most, **texts, **made, **sizes)


def test_issue_stands_beside_bytes_and_products() -> None:
    """132 multiprocessors issue 926.64 warp instructions in a ns, 3.35 TB/s move a GB in 0.3 ms."""
    rows = [
        launch("issues", 2, 1, instructions=926_640_000, bytes=335 * 10**7),
        launch("moves", 1, 1, instructions=92_664_000, bytes=670 * 10**7),
        launch("of Triton", 0, 3, flops=9894 * 10**8, instructions=92_664_000),
    ]
    by_cuda, by_triton = ([*issue_rows(rows, cuda)][2:] for cuda in (True, False))
    assert by_cuda[:2] == [
        "| `issues` | 2 | 1853 | 2.00 | 0.00 | 2.00 | 2.00 |",
        "| `moves` | 1 | 93 | 2.00 | 0.00 | 0.10 | 2.00 |",
    ]
    assert by_triton[1] == "| `of Triton` | 3 | 278 | 0.00 | 3.00 | 0.30 | 3.00 |"
    assert "| **all** | 3 | 1946 | 4.00 | 0.00 | 2.10 | 4.00 |" in by_cuda
    assert issue_verdict(rows).endswith("2.1 ms: met.")
    assert issue_verdict(rows * 4).endswith("8.4 ms: not met.")


def test_the_step_issues_no_more_than_it_did() -> None:
    """As planned. Who lowers it lowers the bound."""
    rows = read_file()
    seconds = sum(row.launches(True) * row.instructions for row in rows) / GPUS["h100"].issue_rate
    assert seconds <= PLANNED_SECONDS <= 8e-3


def test_a_step_by_the_guesses_that_it_was_planned_by() -> None:
    """Of each launch the longest of four times; of this package's those that were counted."""
    bytes_of_a_second = int(GPUS["h100"].bandwidth)
    own = one_pass("of this package", bytes_of_a_second, 0)
    stock = OperatorPass(own.kernel, own.reads, own.writes, own.flops, own.arithmetic)
    issue = [launch("issues", 3, 0, instructions=int(0.7 * GPUS["h100"].issue_rate))]
    small = [launch("small", 1000, 0)]
    assert planned_seconds([stock, own], []) == pytest.approx(1 / 0.85)
    assert planned_seconds([stock, own], issue) == pytest.approx(1 / 0.85 + 3)
    assert planned_seconds([], small) == pytest.approx(2e-3)


@pytest.mark.skipif(bool(triton_missing()), reason=triton_missing())
def test_the_plan_is_met() -> None:
    verdict = planned_verdict(trace("moat_0"), read_file())
    assert verdict in DOCUMENT.read_text() and verdict.endswith(": met.")


@pytest.fixture
def small_document(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> str:
    """Of one variant at batch 2, of which two runs measured something."""
    monkeypatch.setattr(roofline, "RUNS", tmp_path)
    monkeypatch.setattr(roofline, "BATCH", 2)
    monkeypatch.setattr(roofline, "MEASURED", (("tiny_moat_0", 2),))
    monkeypatch.setattr(roofline, "list_models", lambda: ["tiny_moat_0"])
    for run, contender, ms in (("2", "fused", 70.0), ("2", "stock", 70.0), ("10", "stock", 50.0)):
        row = {
            "workload": "tiny_moat_0 256 px, batch 2, training",
            "contender": contender,
            "ms": ms,
        }
        begun = {"section": "headline", "step": contender, "status": "begun"}
        done = {**begun, "status": "done", "rows": [row]}
        (tmp_path / run).mkdir(exist_ok=True)
        with (tmp_path / run / "results.jsonl").open("a") as file:
            file.write(f"{json.dumps(begun)}\n{json.dumps(done)}\n")
    return roofline.format_document()


@pytest.mark.skipif(bool(triton_missing()), reason=triton_missing())
def test_forecasts_stand_beside_the_latest_measurement(small_document: str) -> None:
    """Eager with so few images the host decides: 1611 launches of 33 microseconds, stock."""
    rows = [row for row in small_document.splitlines() if row.startswith("| tiny_moat_0, batch 2")]
    assert rows[0] == "| tiny_moat_0, batch 2 | stock | 50.0 | 10 | 53.2 | 1.06 |"
    assert [row.split(" | ")[1:4] for row in rows[1:]] == [["fused", "70.0", "2"]]
    assert "tiny_moat_0, 256 px | stock | 876 | 1611 |" in small_document
