"""The benchmarks on a GPU, with a stand-in where there is none, and what CPU and GPU share."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

from moat_kernels.plan import GPUS, TrainingStep
from moat_kernels.plan.report import capacity

ROOT = Path(__file__).parents[1]
STAND_IN = ROOT / "tests" / "support" / "gpu_stand_in"


def run(folder: Path, *command: str) -> subprocess.CompletedProcess[str]:
    """`python ...` in `folder`, where a GPU is stood in for."""
    paths = map(str, (STAND_IN, ROOT / "benchmarks", ROOT / "tests", ROOT))
    environment = {"PYTHONPATH": os.pathsep.join(paths), "MADE": str(folder / "made.txt")}
    # The benchmarks are no part of the run that these tests are shared out in.
    inherited = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_XDIST")}
    return subprocess.run(
        [sys.executable, *command],
        cwd=folder,
        env={**inherited, **environment},
        capture_output=True,
        text=True,
    )


class Run(NamedTuple):
    """Rows of made_up.py by group and contender, how often groups were made, pytest's output."""

    rows: dict[str, dict[str, dict]]
    made: list[str]
    output: str
    lines: Path


def run_pytest(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """With the conftest.py of benchmarks/, and no other."""
    pytest.importorskip("pytest_benchmark")
    plugins = ("-c", os.devnull, "--rootdir", str(folder), "--noconftest", "-p", "conftest")
    return run(folder, "-m", "pytest", *plugins, *arguments)


def run_made_up(folder: Path, device: str) -> Run:
    lines = folder / "results.jsonl"
    options = ("--benchmark-only", "--device", device, "--results", str(lines))
    output = run_pytest(folder, str(STAND_IN / "made_up.py"), *options).stdout
    assert lines.exists(), output
    rows: dict[str, dict[str, dict]] = {}
    for line in lines.read_text().splitlines()[1:]:
        entry = json.loads(line)
        rows.setdefault(entry["group"], {})[entry["extra_info"]["contender"]] = entry["extra_info"]
    return Run(rows, (folder / "made.txt").read_text().split("\n")[:-1], output, lines)


@pytest.fixture(scope="module")
def on_gpu(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return run_made_up(tmp_path_factory.mktemp("gpu"), "cuda")


@pytest.fixture(scope="module")
def on_cpu(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return run_made_up(tmp_path_factory.mktemp("cpu"), "cpu")


def failures(rows: dict[str, dict]) -> dict[str, str]:
    return {name: row["failure"] for name, row in rows.items() if "failure" in row}


def test_times_and_memory_are_those_of_the_gpu(on_gpu: Run) -> None:
    floor, ours = (on_gpu.rows["group"][name] for name in ("floor", "ours"))
    assert ours["interleaved_ms"] == pytest.approx(2.001)  # by events, without the setup
    assert ours["time_over_floor"] == pytest.approx(2.001 / 1.001)
    assert floor["peak_bytes"] == 3 * 2**20
    assert floor["device"] == "Stand-in"


def test_contenders_that_end_their_process_fail_alone(on_gpu: Run) -> None:
    assert failures(on_gpu.rows["group"]) == {
        "cannot be made": "torch.OutOfMemoryError: made up",
        "raises": "ValueError: channels must be positive, got -3",
        "loses the device": "RuntimeError: CUDA error: an illegal memory access was encountered",
        "crashes": "its process died: SIGSEGV",
        "hangs": "no answer in 5 s",
    }
    # Once, and again after each of the last three.
    assert on_gpu.made.count("group") == 4


def test_contenders_that_raise_fail_alone_on_a_cpu(on_cpu: Run) -> None:
    rows = on_cpu.rows["group"]
    assert failures(rows).keys() == {"cannot be made", "raises"}
    assert 2.0 <= rows["ours"]["interleaved_ms"] < 200.0
    assert on_cpu.made.count("group") == 1


@pytest.mark.parametrize("device", ["cpu", "gpu"])
def test_what_all_contenders_share_is_tried_once(
    device: str, request: pytest.FixtureRequest
) -> None:
    result: Run = request.getfixturevalue(f"on_{device}")
    reason = "RuntimeError: no model of this name"
    assert failures(result.rows["nothing"]) == {"floor": reason, "ours": reason}
    assert (result.made.count("nothing"), result.made.count("without peer")) == (1, 1)
    failed = 2 + len(failures(result.rows["group"]))
    assert f"{failed} failed, 2 passed, 2 skipped" in result.output
    assert "FAILED" in result.output and "channels must be positive, got -3" in result.output


def test_results_of_a_run_that_was_cut_off(on_gpu: Run, tmp_path: Path) -> None:
    lines = tmp_path / "cut.jsonl"
    lines.write_text(on_gpu.lines.read_text()[:-10])
    tables = tmp_path / "tables.md"
    report = (str(ROOT / "benchmarks" / "report.py"), str(lines))

    refused = run(tmp_path, *report)
    assert "results of a GPU need --tables FILE and --charts FOLDER" in refused.stderr

    written = run(tmp_path, *report, "--tables", str(tables), "--charts", str(tmp_path))
    assert written.returncode == 0, written.stderr
    assert "| ours | 2.00 |  | 2.00 |" in tables.read_text()
    assert "crashes failed: `its process died: SIGSEGV`" in tables.read_text()
    assert "on Stand-in" in tables.read_text()


def test_results_file_of_another_kind_is_refused(tmp_path: Path) -> None:
    result = run_pytest(tmp_path, "--results", "results.json")
    assert "--results must be a .jsonl file, got results.json" in result.stderr


CONTENDERS = """
import json, sys
from types import SimpleNamespace
import device
device.choose(sys.argv[1])
usable = SimpleNamespace(usable=True)
device.backend_status = lambda: dict.fromkeys(("reference", "torch", "cpu", "triton"), usable)
import bench_adapters, bench_linear, bench_mbconv, bench_models, bench_stem
import bench_window_attention, shapes
comparisons = [
    *(*bench_adapters.COMPARISONS, *bench_linear.TRAINING, *bench_mbconv.EVAL),
    *(*bench_mbconv.TRAINING, *bench_models.EVAL, *bench_models.TRAINING, *bench_stem.TRAINING),
    *bench_window_attention.TRAINING,
]
print(json.dumps({
    "quick": [c.name for c in comparisons if not c.full],
    "names": {c.name: [*c.contenders, *c.slow] for c in comparisons},
    "models": shapes.MODELS,
}))
"""


@pytest.fixture(scope="module")
def contenders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict]:
    """What CONTENDERS prints, by device."""
    found = {}
    for device in ("cpu", "cuda"):
        result = run(tmp_path_factory.mktemp(device), "-c", CONTENDERS, device)
        assert result.returncode == 0, result.stderr
        found[device] = json.loads(result.stdout)
    return found


def test_batches_and_rows_suit_the_device(contenders: dict[str, dict]) -> None:
    cpu, gpu = contenders["cpu"], contenders["cuda"]
    assert {
        "mbconv eval 56x56x96 batch 1",
        "mbconv training 56x56x96 batch 8",
        "model eval moat_0 224 batch 1",
        "model training tiny_moat_0 256 batch 8",
        "adapters training timm coatnet_0 224 batch 2",
    } <= set(cpu["quick"])
    assert {"model training moat_2 384 batch 4", "model eval moat_4 512 batch 1"} <= set(
        cpu["names"]
    )
    assert {
        "mbconv eval 56x56x96 batch 64",
        "mbconv training 56x56x96 batch 64",
        "window_attention training 14x14x384 whole map batch 64",
        "model eval moat_0 224 batch 256",
        "model training tiny_moat_0 256 batch 64",
    } <= set(gpu["quick"])
    of_cpus = {"cpu", "OpenVINO", "ONNX", "zentorch", "torch.compile bfloat16", "floor, oneDNN"}
    rows = {name for names in gpu["names"].values() for name in names}
    assert not [name for name in rows if name.split()[0] in of_cpus or name in of_cpus]
    assert {"triton", "triton auto", "torch.compile", "floor"} <= rows


def test_stock_fits_a_gpu_of_80_gb(contenders: dict[str, dict]) -> None:
    h100 = GPUS["h100"]
    models = contenders["cuda"]["models"]
    for name, resolution, batch, _ in [model for model in models if "tiny" not in model[0]]:
        step = TrainingStep(
            *(name, resolution, "stock"),
            precision="float32",
            optimizer="sgd",
            architecture=h100.architecture,
        )
        assert step.trace(batch).peak < capacity(h100), name
