"""`python -m moat_kernels.checkpoints`: output, exit codes and one-line errors."""

from __future__ import annotations

import json
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from checkpoints.bundle_writer import write_bundle

from moat_kernels.checkpoints import load_safetensors, load_tensorflow
from moat_kernels.checkpoints.__main__ import main


def metadata_of(path: Path) -> dict[str, str]:
    content = path.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    return json.loads(content[8 : 8 + length])["__metadata__"]


def test_conversion(
    tmp_path: Path, golden_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    destination = tmp_path / "model.safetensors"
    assert main([str(golden_folder), str(destination)]) == 0
    expected = load_tensorflow(golden_folder).state_dict
    converted = load_safetensors(destination)
    assert converted.keys() == expected.keys()
    assert all(torch.equal(converted[name], expected[name]) for name in expected)
    assert metadata_of(destination) == {
        "format": "pt",
        "source": "model.ckpt-1234",
        "weights": "raw",
    }
    output = capsys.readouterr().out
    assert "loaded 166 tensors (19 initial, 147 raw) from 159 variables" in output
    assert "skipped 1: not a variable of MOAT: global_step" in output


def test_conversion_of_averages(
    tmp_path: Path, variables: dict[str, np.ndarray], capsys: pytest.CaptureFixture[str]
) -> None:
    twins = {f"{name}/ExponentialMovingAverage": array * 2 for name, array in variables.items()}
    prefix = write_bundle(tmp_path, variables | twins)
    assert main([str(prefix), str(tmp_path / "ema.safetensors"), "--ema"]) == 0
    assert "(147 ema, 19 initial)" in capsys.readouterr().out
    bias = load_safetensors(tmp_path / "ema.safetensors")["stem.conv_0.bias"]
    np.testing.assert_array_equal(bias.numpy(), variables["moat/stem/conv_0/bias"] * 2)
    assert metadata_of(tmp_path / "ema.safetensors")["weights"] == "ema"


def test_list(golden_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(golden_folder), "--list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 160
    assert "global_step  []  int64" in lines
    assert "moat/block_02_00/attention/q/weight  [64, 2, 32]  float32" in lines


def test_a_bad_file_is_one_line_on_stderr(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "bad.index").write_bytes(b"\x89PNG")
    assert main([str(tmp_path / "bad"), str(tmp_path / "out.safetensors")]) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    (line,) = captured.err.splitlines()
    assert line.startswith("error: ") and "bad.index" in line
    assert not (tmp_path / "out.safetensors").exists()


def test_a_destination_that_cannot_be_written(
    tmp_path: Path, golden_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(golden_folder), str(tmp_path / "missing" / "out.safetensors")]) == 1
    assert len(capsys.readouterr().err.splitlines()) == 1


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["source"], "give either DESTINATION or --list"),
        (["source", "x.safetensors", "--list"], "give either DESTINATION or --list"),
        (["source", "--list", "--ema"], "--ema is for conversion"),
        (["source", "x.pt"], "must end in .safetensors, not 'x.pt'"),
        ([], "SOURCE"),
    ],
)
def test_usage(arguments: list[str], complaint: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        main(arguments)
    assert exit_.value.code == 2
    assert complaint in capsys.readouterr().err


def test_it_runs_as_a_module(golden_folder: Path) -> None:
    command = [sys.executable, "-m", "moat_kernels.checkpoints", str(golden_folder), "--list"]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "moat/stem/conv_0/kernel  [3, 3, 3, 16]  float32" in result.stdout
