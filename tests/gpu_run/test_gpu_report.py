"""docs/gpu_results.md and its charts, of invented records."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import pytest

from benchmarks.gpu import charts, losses
from benchmarks.gpu.chapters import classify, write_reason
from benchmarks.gpu.comparison import judge
from benchmarks.gpu.findings import NOT_YET, REHEARSAL, UNKNOWN_CARD, expected_steps, read_cards
from benchmarks.gpu.journal import Journal, Row
from benchmarks.gpu.report import CHAPTERS, format_document, main
from benchmarks.gpu.runner import START

TRAINING = "moat_0 224 px, batch 64, training"
H100, H200 = "NVIDIA H100 80GB HBM3", "NVIDIA H200"
FIRST_DAY, SECOND_DAY = 1_800_000_000.0, 1_800_100_000.0  # 2027-01-15 and -16


def begin(folder: Path, card: str, day: float = FIRST_DAY, driver: str = "580.1") -> Journal:
    """A run on a card that has ended no step but its facts."""
    journal = Journal(folder)
    with journal.file.open("a") as file:
        begun = {"section": "machine", "step": "facts", "status": "begun", "at": day, "limit": 9.0}
        file.write(json.dumps(begun) + "\n")
    facts = {"GPU": card, "driver": driver, "CUDA of torch": "13.0", "torch": "2.11.0"}
    facts |= {"triton": "3.6.0", "moat_kernels": "0.1.0"}
    journal.end("machine", "facts", "done", [{"": k, "this machine": v} for k, v in facts.items()])
    return journal


def add_model(
    journal: Journal, contender: str, ms: float, peak: float | None, section: str = "headline"
) -> None:
    row = {"workload": TRAINING, "contender": contender, "ms": ms, "images/s": 64e3 / ms}
    journal.end(section, f"{TRAINING}: {contender}", "done", [{**row, "peak, GiB": peak}])


def profiled(step: str, kernels: Sequence[tuple[str, float, float | None]]) -> list[Row]:
    """Rows of a profile, of (name, milliseconds, those of the floor)."""
    rows: list[Row] = [
        {
            "step": step,
            "kernel": name,
            "launches": 2,
            "ms": ms,
            "predicted GB": None if floor is None else 1.5,
            "TB/s": None,
            "TFLOP/s": None,
            "floor ms": floor,
            "lost ms": None if floor is None else ms - floor,
        }
        for name, ms, floor in kernels
    ]
    total = {**rows[0], "kernel": losses.TOTAL, "ms": sum(row["ms"] for row in rows)}
    return [total | {"launches": 2 * len(rows), "floor ms": None}, *rows]


def launch(kernel: str, microseconds: float, floor: float, count: int) -> Row:
    return {
        "kernel": kernel,
        "first tensor; launch": "8x8; m=32",
        "in a step": count,
        "µs": microseconds,
        "predicted MB": 10.0,
        "TB/s": 1.0,
        "TFLOP/s": 1.0,
        "floor µs": floor,
        "lost in a step, ms": 1e-3 * count * (microseconds - floor),
    }


def document(*folders: Path) -> str:
    return format_document(read_cards(folders), {})


def chapter(text: str, title: str) -> str:
    """From a heading to the next of its level."""
    level, _, _ = title.partition(" ")
    return text.split(f"\n{title}", 1)[1].split(f"\n{level} ", 1)[0]


def cells(text: str, first: str) -> list[str]:
    """The row of a table that begins with this cell."""
    lines = [line for line in text.splitlines() if line.startswith(f"| {first} |")]
    assert len(lines) == 1, (first, lines)
    return [cell.strip() for cell in lines[0].split("|")[1:-1]]


def test_without_a_run_every_chapter_says_so(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    text = document(tmp_path / "empty", tmp_path / "missing")
    assert not (tmp_path / "missing").exists()
    assert f"Nothing has been run on a GPU: everything is {NOT_YET}." in text
    for title in CHAPTERS:
        body = chapter(text, f"### {title}")
        assert NOT_YET in body.lower() or "not begun" in body, title
    assert f"Fused against stock: {NOT_YET}." in chapter(text, f"#### {TRAINING}")
    # The steps of a complete run have not begun, and there is no number anywhere else.
    assert cells(text, "tuned")[1:] == [*["0"] * 6, "4"]


def test_the_fastest_of_each_kind_decides(tmp_path: Path) -> None:
    journal = begin(tmp_path, H100)
    add_model(journal, "stock", 40.0, 20.0)
    add_model(journal, "fused", 30.0, 10.0)
    add_model(journal, "stock, compiled", 20.0, 16.0)
    add_model(journal, "fused, CUDA graph", 22.0, None)
    journal.end(
        "headline", f"{TRAINING}: fused, compiled", "failed", reason="ValueError: a <bad> x"
    )
    text = chapter(document(tmp_path), f"#### {TRAINING}")
    assert (
        "Fused is **slower** than the fastest stock way that was measured: `fused, CUDA graph`"
        " takes 22.00 ms, `stock, compiled` 20.00 ms, a ratio of 1.10."
    ) in text
    assert cells(text, "fused")[1:] == ["30", "2133", "0.75", "1.5", "10", "0.5"]
    assert cells(text, "fused, CUDA graph")[3:] == ["0.55", "1.1", "", ""]
    order = [text.index(f"| {name} |") for name in ("stock", "stock, compiled", "fused")]
    assert order == sorted(order)
    assert "Failed: `fused, compiled`." in text
    assert "Not measured yet: `stock, CUDA graph`, `stock, blocks checkpointed`, " in text
    # Without a number: stock in a CUDA graph, checkpointed, and by max-autotune.
    assert cells(document(tmp_path), TRAINING)[-2:] == ["slower", "3"]


@pytest.mark.parametrize(
    ("ours", "outcome"), [(9.9, "faster"), (10.04, "as fast"), (10.1, "slower"), (None, NOT_YET)]
)
def test_the_outcome_is_the_ratio_as_it_is_printed(ours: float | None, outcome: str) -> None:
    row = None if ours is None else {"ms": ours}
    assert judge(row, {"ms": 10.0}) == outcome


def test_the_later_run_wins_step_by_step(tmp_path: Path) -> None:
    first, second = tmp_path / "a", tmp_path / "b"
    journal = begin(first, H100)
    add_model(journal, "stock", 40.0, 20.0)
    add_model(journal, "fused", 30.0, 10.0)
    add_model(journal, "stock, compiled", 25.0, 10.0)
    journal.end("attention", START, "cut off", reason="no time left")
    journal = begin(second, H100, SECOND_DAY, driver="590.2")
    add_model(journal, "fused", 16.0, 10.0)
    # Neither says anything about the step.
    journal.end("headline", f"{TRAINING}: stock", "cut off", reason="late")
    journal.end("headline", f"{TRAINING}: stock, compiled", "skipped", reason="not here")
    journal.end("attention", "14x14, 12 heads: SDPA by cuDNN", "skipped", reason="no cuDNN")
    text = document(first, second)
    table = chapter(text, f"#### {TRAINING}")
    assert [cells(table, name)[1::6] for name in ("stock", "fused")] == [["40", "1"], ["16", "2"]]
    assert cells(table, "stock, compiled")[-1] == "1"
    assert "`fused (run 2)` takes 16.00 ms, `stock, compiled (run 1)` 25.00 ms" in table
    assert "- run 1, 2027-01-15: driver 580.1, torch 2.11.0, Triton 3.6.0, CUDA 13.0" in text
    assert "- run 2, 2027-01-16: driver 590.2" in text
    assert "The runs differ in driver" in text
    assert "no time left" not in text  # the later run had time


def test_cards_are_never_mixed(tmp_path: Path) -> None:
    folders = [tmp_path / name for name in "abc"]
    add_model(begin(folders[0], H100), "stock", 40.0, 20.0)
    add_model(begin(folders[1], H200), "fused", 30.0, 10.0)
    add_model(Journal(folders[2]), "fused", 20.0, 10.0)
    text = document(*folders)
    for card, found in ((H100, "stock"), (H200, "fused"), (UNKNOWN_CARD, "fused")):
        mine = chapter(text, f"## {card}")
        table = chapter(mine, f"#### {TRAINING}, {card}")
        assert f"Fused against stock: {NOT_YET}." in table
        assert cells(table, found)[4] == ("1" if found == "stock" else "")
        assert all(card in line for line in mine.splitlines() if line.startswith("###"))


def test_a_rehearsal_says_that_its_numbers_are_invented(tmp_path: Path) -> None:
    begin(tmp_path, REHEARSAL)
    assert "**A rehearsal on a CPU: all its numbers are invented.**" in document(tmp_path)


def test_kernels(tmp_path: Path) -> None:
    journal = begin(tmp_path, H100)
    ours = [
        ("expand_kernel", 3.0, 2.0),
        ("depthwise_kernel", 5.0, 1.0),
        ("fold_table_kernel", 1, None),
    ]
    theirs = [("void batch_norm_f<4>", 6.0, None), ("sm90_xmma_gemm", 4.0, None)]
    journal.end("kernels", "profile of fused", "done", profiled("fused", [*ours, theirs[1]]))
    journal.end("kernels", "profile of stock", "done", profiled("stock", theirs))
    alone = [launch("expand_kernel", 100.0, 50.0, 4), launch("expand_kernel", 200.0, 50.0, 2)]
    journal.end("kernels", "alone", "done", alone)
    counted = {"kernel": "depthwise_kernel", "launches": 2, "ms": 5.0, "DRAM GB": 1.7}
    counted |= {"instructions, millions": 3000.0, "issue at full rate, ms": 3.2}
    journal.end("kernels", "counters", "done", [counted])
    text = chapter(document(tmp_path), "### Where the time goes")
    kinds = chapter(text, "#### Stock and fused steps")
    assert cells(kinds, "moat_kernels") == ["moat_kernels", "9", ""]
    assert cells(kinds, "batch norm") == ["batch norm", "", "6"]
    assert cells(kinds, "products, convolutions") == ["products, convolutions", "4", "4"]
    assert cells(kinds, "all kernels") == ["all kernels", "13", "10"]
    assert "Launches of fused: 8; stock: 4." in kinds
    floors = chapter(text, "#### Our kernels against their floors")
    assert "Together they lose 5.00 ms of the step." in floors
    depthwise = ["2", "5", "1", "4", "", "", "1.5", "1.7", "3000", "3.2"]
    assert cells(floors, "`depthwise_kernel`")[1:] == depthwise
    # Four launches of 100 and two of 200 µs, floors of 50 µs.
    assert cells(floors, "`expand_kernel`")[5:7] == ["0.8", "0.5"]
    assert floors.index("depthwise_kernel") < floors.index("expand_kernel")
    assert cells(chapter(text, "#### Kernels of the step: stock"), "`void batch_norm_f<4>`")


def test_kinds_are_told_by_names() -> None:
    def kind(name: str) -> str:
        return losses.kind_of({"kernel": name, "floor ms": None})

    assert kind("void moat_kernels::expand_depthwise_kernel<c10::BFloat16>") == losses.OURS
    assert kind("12 other kinds") == losses.UNLISTED
    assert kind("void at::native::(anonymous namespace)::multi_tensor_apply_k") == "optimiser"
    assert kind("void at::native::(anonymous namespace)::conv_depthwise2d_b") == (
        "depthwise convolutions"
    )
    assert kind("void cudnn::ops::nchwToNhwcKernel<__nv_bfloat16>") == "copies, casts"
    assert kind("void at::native::reduce_kernel<512, 1>") == "reductions"
    assert kind("something_new") == "others"


def test_errors_by_family(tmp_path: Path) -> None:
    journal = begin(tmp_path, H100)
    steps = [step for step in expected_steps(False)["smoke"] if step.startswith("attention")]
    float32 = [step for step in steps if step.endswith("float32")]
    for error, step in zip((1e-6, 3e-6, 2e-6), float32, strict=True):
        row = {"case": step, "worst": "x", "error": error, "of stock": 2e-6}
        journal.end("smoke", step, "done", [{**row, "not the same twice": ""}])
    halves = [step for step in steps if step.endswith("bfloat16")]
    reason = "AssertionError: two runs differ in x, table (smoke.py:123)"
    journal.end("smoke", halves[0], "failed", reason=reason)
    journal.end("smoke", halves[1], "crashed", reason="killed by SIGSEGV")
    text = chapter(document(tmp_path), "### Errors against float64")
    rows = [line for line in text.splitlines() if line.startswith("| attention | Triton")]
    assert (
        rows[0] == "| attention | Triton | float32 | 3 | 3 | 0 | 0 | 0 | 0 | 3e-06 | 2e-06 | 1.5 |"
    )
    assert rows[1] == "| attention | Triton | bfloat16 | 3 | 0 | 0 | 1 | 2 | 1 |  |  |  |"
    assert f"- {halves[0]}: failed: {reason}" in text
    assert f"- {halves[1]}: crashed: killed by SIGSEGV" in text


def test_every_case_of_smoke_has_a_family() -> None:
    found = {classify(step) for step in expected_steps(False)["smoke"]}
    dtypes = ("float32", "bfloat16", "float16")
    families = [("attention", "Triton"), ("layer norm", "Triton")]
    families += [("mbconv", "Triton"), ("mbconv", "CUDA C++")]
    assert found == {(*family, dtype) for family in families for dtype in dtypes}


def test_attention_against_the_fastest_other(tmp_path: Path) -> None:
    journal = begin(tmp_path, H100)
    for method, microseconds in (("moat_kernels", 50.0), ("SDPA, bias materialised", 100.0)):
        row = {"map": "7x7, 24 heads", "attention": method, "forward, µs": 20.0}
        row |= {"with backward, µs": 60.0, "in CUDA graphs, µs": microseconds}
        row |= {"error of the table's gradient": 1e-3}
        journal.end("attention", f"7x7, 24 heads: {method}", "done", [row])
    text = chapter(document(tmp_path), "#### 7x7, 24 heads")
    assert "Ours is **faster than** the fastest other way" in text
    assert "a ratio of 0.50." in text
    assert "Not measured yet: `SDPA by cuDNN`, `FlexAttention, compiled`." in text


def test_tests_and_sanitizers(tmp_path: Path) -> None:
    journal = begin(tmp_path, H100)
    first, *others = expected_steps(False)["checks"]
    rows = [{"tests": first, "outcome": "7 passed, 1 failed, 2 skipped"}]
    rows.append({"tests": "test_a::two", "outcome": "wrong in /home/someone/x.py"})
    journal.end("checks", first, "done", rows)
    summary = {"checker": "racecheck", "calls": 18, "summary": "RACECHECK SUMMARY: 0 hazards"}
    journal.end("checks", others[-1], "done", [summary])
    text = document(tmp_path)
    checks = chapter(text, "### Tests and sanitizers")
    assert f"`{first}`: 7 passed, 1 failed, 2 skipped." in checks
    assert "- `test_a::two`: wrong in …/x.py" in checks
    assert f"`{others[-1]}`: 18 calls, RACECHECK SUMMARY: 0 hazards." in checks
    assert f"`{others[-2]}`: {NOT_YET}." in checks
    assert "Failed tests, named above: 1." in chapter(text, "### What was not done, and why")


def test_tuned_launches(tmp_path: Path) -> None:
    journal = begin(tmp_path, H100)
    entries = [
        {"kernel": "mbconv expand", "sizes": "8x9", "static, µs": 30.0, "tuned, µs": 15.0},
        {"kernel": "mbconv pool", "sizes": "8x9", "static, µs": 10.0, "tuned, µs": 10.0},
    ]
    journal.end("tune", "tune", "done", [{**entry, "launch": "m=32"} for entry in entries])
    add_model(journal, "stock", 40.0, 20.0)
    add_model(journal, "fused", 30.0, 10.0)
    add_model(journal, "fused", 24.0, 10.0, section="tuned")
    text = chapter(document(tmp_path), "### Tuned launches")
    assert "2 launches were measured, 1 of them became faster." in text
    assert "takes 40 µs with the static table and 25 µs with the measured one (0.62 times)" in text
    assert cells(text, "`mbconv expand`")[1:] == ["8x9", "30", "15", "m=32", "15"]
    assert cells(text, TRAINING)[1:] == ["fused", "30", "24", "0.8", "0.6"]
    assert f"Not measured yet: `{TRAINING}: fused, CUDA graph`, " in text


def test_a_search_that_hung_has_what_it_wrote(tmp_path: Path) -> None:
    journal = begin(tmp_path, H100)
    journal.end("tune", "tune", "hung", reason="no end within 140 s")
    entry = {"op": "mbconv", "kernel": "expand", "dtype": "torch.bfloat16", "sizes": [8, 9]}
    entry |= {"blocks": {"m": 32}, "microseconds": 15.0, "static_microseconds": 30.0}
    table = {"sections": [{"device": H100, "launches": [entry]}]}
    (tmp_path / "launches.json").write_text(json.dumps(table))
    text = chapter(document(tmp_path), "### Tuned launches")
    assert cells(text, "`mbconv expand`")[1:] == ["8x9", "30", "15", "m=32", "15"]
    assert "The search: hung." in text


def test_everything_that_was_not_done_is_named(tmp_path: Path) -> None:
    journal = begin(tmp_path, H100)
    for status in ("failed", "crashed", "hung", "cut off", "skipped"):
        journal.end("smoke", f"the {status} one", status, reason=f"reason of {status}")
    journal.begin("kernels", "alone", 90.0)
    text = chapter(document(tmp_path), "### What was not done, and why")
    for status in ("failed", "crashed", "hung", "cut off", "skipped"):
        assert f"- smoke, the {status} one: {status}: reason of {status}" in text
    assert "- kernels, alone: cut off: the run ended in it" in text


def test_reasons_show_no_folder_and_no_tag() -> None:
    reason = "OSError: /home/a/b.txt, 3 TB/s, and/or <kernel> (x.py:3)"
    assert write_reason(reason) == "OSError: …/b.txt, 3 TB/s, and/or &lt;kernel> (x.py:3)"


def test_charts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    journal = begin(tmp_path / "run", H100)
    add_model(journal, "stock", 40.0, 20.0)
    journal.end("kernels", "alone", "done", [launch("expand_kernel", 100.0, 50.0, 4)])
    main(
        [
            *(str(tmp_path / "run"), str(tmp_path / "missing")),
            *("--document", str(tmp_path / "docs" / "results.md"), "--charts", str(tmp_path)),
        ]
    )
    assert f"{tmp_path / 'missing'} has no results.jsonl" in capsys.readouterr().err
    text = (tmp_path / "docs" / "results.md").read_text()
    assert "![training](../gpu_training.png)" in text
    assert "![kernels of a training step](../gpu_kernels.png)" in text
    assert f"Chart, inference: {NOT_YET}." in text
    for name, drawn in (("training", True), ("kernels", True), ("inference", False)):
        assert (tmp_path / f"gpu_{name}.png").exists() == drawn
    assert not any(charts.draw([], tmp_path / "none").values())
