"""The example program under torchrun: many processes, and what happens when one is killed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("PIL", reason="the example needs Pillow")

from PIL import Image

ROOT = Path(__file__).parents[2]
STEPS = 6
TIMEOUT_SECONDS = 150

# The program with a model that takes milliseconds, and steps slow enough to be killed between.
PROGRAM = f"""
import os, sys, time
sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / "examples")!r}]
import torch
import moat_kernels, train_classifier, training
torch.set_num_threads(1)
create_model = moat_kernels.create_model
sizes = {{"stem_width": 8, "widths": (8, 16, 32, 64), "depths": (1, 1, 1, 1)}}
moat_kernels.create_model = lambda name, **options: create_model(name, **sizes, **options)
train_classifier.draw_chart = lambda *arguments: False
train_classifier.peak_of_step = lambda *arguments: None
slow = float(os.environ.get("SECONDS_PER_STEP", "0"))
step = training.Trainer.step
def slow_step(*arguments):
    time.sleep(slow)
    step(*arguments)
training.Trainer.step = slow_step
sys.exit(train_classifier.main())
"""


@pytest.fixture
def arguments(tmp_path: Path) -> list[str]:
    random = np.random.default_rng(0)
    for name, size in (("coarse", 4), ("fine", 24)):
        (tmp_path / "data" / name).mkdir(parents=True)
        for index in range(3):
            pixels = random.integers(0, 256, (size, size, 3), dtype=np.uint8)
            picture = Image.fromarray(pixels).resize((48, 40))
            picture.save(tmp_path / "data" / name / f"{index}.png")
    (tmp_path / "program.py").write_text(PROGRAM)
    small = f"--steps {STEPS} --resolution 32 --batch-size 4 --device cpu --checkpoint-every 1"
    return [str(tmp_path / "program.py"), "--data", str(tmp_path / "data"), *small.split()]


def torchrun(*options: str) -> list[str]:
    rendezvous = ["--standalone", "--nproc-per-node", "2", "--local-addr", "127.0.0.1"]
    return [sys.executable, "-m", "torch.distributed.run", *rendezvous, *options]


def environment(**more: str) -> dict[str, str]:
    fixed = {
        "PYTHONFAULTHANDLER": "1",
        "GLOO_SOCKET_IFNAME": "lo",
        "OMP_NUM_THREADS": "1",
        "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",  # see examples/processes.py
    }
    return {**os.environ, **fixed, **more}


def losses(output: Path) -> list[float]:
    return json.loads((output / "results.json").read_text())["results"]["fused"]["losses"]


def children(parent: int) -> list[int]:
    return [int(pid) for pid in Path(f"/proc/{parent}/task/{parent}/children").read_text().split()]


def output_of(process: subprocess.Popen) -> str:
    """What `process` prints until it ends; with its workers' stacks if they hang."""
    try:
        return process.communicate(timeout=TIMEOUT_SECONDS)[0]
    except subprocess.TimeoutExpired:
        for worker in children(process.pid):
            os.kill(worker, signal.SIGABRT)
        process.terminate()
        pytest.fail(f"the run hangs:\n{process.communicate(timeout=60)[0]}")


def wait_for(path: Path, process: subprocess.Popen) -> None:
    deadline = time.monotonic() + TIMEOUT_SECONDS
    while not path.exists():
        assert process.poll() is None, "the run ended early"
        assert time.monotonic() < deadline, f"no {path.name}"
        time.sleep(0.05)


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="needs Linux's /proc")
def test_a_killed_process_changes_nothing(arguments: list[str], tmp_path: Path) -> None:
    """Two processes, one of them killed, give the losses of one process that nobody disturbed."""
    checkpoints = tmp_path / "run"
    command = [*torchrun("--max-restarts", "1"), *arguments, "--output", str(checkpoints)]
    process = subprocess.Popen(
        [*command, "--output", str(tmp_path / "killed")],
        env=environment(SECONDS_PER_STEP="0.5"),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        wait_for(checkpoints / "step_00000002", process)
        os.kill(children(process.pid)[-1], signal.SIGKILL)
        output = output_of(process)
    finally:
        process.kill()
    assert process.returncode == 0, output
    assert "SIGKILL" in output or "-9" in output, output
    alone = subprocess.run(
        [sys.executable, *arguments, "--output", str(tmp_path / "alone")],
        env=environment(),
        capture_output=True,
        text=True,
    )
    assert alone.returncode == 0, alone.stderr
    killed = losses(tmp_path / "killed")
    assert len(killed) == STEPS
    # Sums in another order, fed back through six steps of AdamW.
    assert killed == pytest.approx(losses(tmp_path / "alone"), abs=1e-3)
