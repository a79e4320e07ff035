"""What the benchmarks of whole models compare: runtimes that compute the model, and our own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
PATHS = os.pathsep.join(map(str, (ROOT / "benchmarks", ROOT / "tests", ROOT)))


def run(program: str) -> Any:
    """What a program prints last, as JSON."""
    result = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, "PYTHONPATH": PATHS},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout.splitlines()[-1])


# Compiling a model takes a minute.
RUNTIMES = """
import json
import torch
from bench_models import exact_logits, largest_error
from images import calibration_batches, measured_images
from runtimes import RUNTIMES, Served, make_runtime
from support.small_model import make_model
model = make_model(torch.float32, fused=False).eval()
x = measured_images(3, 32)
served, exact = Served(model, x, calibration_batches(32)), exact_logits(model, x)
print(json.dumps({
    name: largest_error(make_runtime(name, served).call(), exact)
    for name in RUNTIMES if "torch" not in name
}))
"""


def test_runtimes_compute_the_model_in_their_precision() -> None:
    errors = run(RUNTIMES)
    if not errors:
        pytest.skip("neither OpenVINO nor ONNX Runtime is installed")
    float32, int8 = (0.0, 1e-5), (1e-4, 0.2)  # weights of int8 that nobody trained
    expected = {
        "OpenVINO": (0.0, 0.03),  # bfloat16 where the CPU can
        "OpenVINO float32": float32,
        "OpenVINO int8": int8,
        "ONNX Runtime": float32,
        "ONNX Runtime int8": int8,
        "ONNX Runtime int8 dynamic": int8,
    }
    for name, error in errors.items():
        least, most = expected[name]
        assert least <= error < most, name


# With `freeze` as a CPU has it that multiplies int8 and not bfloat16.
OURS = """
import json
import bench_models, interleaved
import moat_kernels as mk
import torch
from shapes import Model

interleaved.SECONDS = 0.0
calibrated = []

def freeze(model, dtype=torch.float32, calibration=()):
    if dtype == torch.bfloat16:
        raise ValueError("this CPU does not multiply bfloat16")
    calibrated.append([str(dtype), [list(batch.shape) for batch in calibration]])
    return model

mk.freeze = freeze
names = ("stock", *bench_models.FROZEN, *bench_models.LOW_PRECISIONS)
rows = []
bench_models.make_eval_group(Model("tiny_moat_0", 64, 1, (2,)), 2, names).measure(rows.append)
print(json.dumps({
    "errors": {row["contender"]: row["logit_error"] for row in rows if "failure" not in row},
    "failures": {row["contender"]: row["failure"] for row in rows if "failure" in row},
    "calibrated": calibrated,
}))
"""


def test_frozen_models_of_each_precision() -> None:
    found = run(OURS)
    if "cpu frozen" not in found["errors"]:
        pytest.skip("the native kernels are not usable")
    assert found["errors"].keys() == {"stock", "cpu frozen", "cpu frozen int8"}
    assert max(found["errors"].values()) < 1e-4
    assert found["failures"] == {
        "cpu frozen bfloat16": "ValueError: this CPU does not multiply bfloat16"
    }
    images = [[1, 3, 64, 64]] * 64
    assert found["calibrated"] == [["torch.float32", []], ["torch.int8", images]]
