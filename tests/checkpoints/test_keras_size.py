"""A Keras model of full size: seconds, and little more memory than its file takes."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
from checkpoints.keras_writer import keras_shapes, write_saved_model

from moat_kernels.checkpoints import load_safetensors

MOAT_2 = (128, (128, 256, 512, 1024), (2, 6, 14, 2))
CLASSES = 9000
# Prints the bytes that a conversion adds to the most memory that a process with all imports had.
# Linux's ru_maxrss would begin with that of the process that starts this one.
CONVERT = """
import re, sys
from pathlib import Path
from moat_kernels.checkpoints.__main__ import main

def peak():
    return 1024 * int(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1])

before = peak()
assert main(["convert", *sys.argv[1:]]) == 0
print(peak() - before)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's /proc")
def test_a_large_model_takes_little_more_memory_than_its_file(tmp_path: Path) -> None:
    """Some seconds, most of them to write the file, to import torch, and to wait for the disk."""
    with tempfile.TemporaryDirectory(dir=tmp_path) as folder:  # pytest would keep it
        check_memory(Path(folder))


def check_memory(folder: Path) -> None:
    shapes = keras_shapes(*MOAT_2, CLASSES)
    largest = max(int(np.prod(shape)) for shape in shapes.values())
    values = np.random.default_rng(0).random(largest, dtype=np.float32)
    variables = {
        name: values[: int(np.prod(shape))].reshape(shape) for name, shape in shapes.items()
    }
    source = write_saved_model(folder / "saved", variables, resolution=448)
    destination = folder / "model.safetensors"
    command = [sys.executable, "-c", CONVERT, str(source), str(destination)]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    size = destination.stat().st_size
    assert size > 200e6
    assert int(result.stdout.splitlines()[-1]) < 1.5 * size
    head = load_safetensors(destination)["logits_head.weight"].numpy()
    np.testing.assert_array_equal(head, variables["predictions_dense/kernel"].T)
