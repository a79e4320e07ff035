"""`python -m moat_kernels.checkpoints`: output, exit codes and one-line errors."""

from __future__ import annotations

import json
import re
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from checkpoints.bundle_writer import write_bundle
from checkpoints.keras_writer import write_saved_model
from checkpoints.small_models import WEIGHTS, saved

import moat_kernels
from moat_kernels.checkpoints import load_safetensors, load_tensorflow, save_safetensors
from moat_kernels.checkpoints.__main__ import main
from moat_kernels.configuration import configurations_of


def metadata_of(path: Path) -> dict[str, str]:
    content = path.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    return json.loads(content[8 : 8 + length])["__metadata__"]


def test_conversion(
    tmp_path: Path, golden_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    destination = tmp_path / "model.safetensors"
    assert main(["convert", str(golden_folder), str(destination)]) == 0
    expected = load_tensorflow(golden_folder).state_dict
    converted = load_safetensors(destination)
    assert converted.keys() == expected.keys()
    assert all(torch.equal(converted[name], expected[name]) for name in expected)
    metadata = metadata_of(destination)
    configuration = json.loads(metadata.pop("moat_kernels"))[""]
    assert configuration["se_activation"] == "silu" and configuration["depths"] == [1, 2, 2, 1]
    assert metadata == {"format": "pt", "source": "model.ckpt-1234", "weights": "raw"}
    output = capsys.readouterr().out
    assert "loaded 166 tensors (19 initial, 147 raw) from 159 variables" in output
    assert "skipped 1: not a variable of MOAT: global_step" in output


def test_conversion_of_averages(
    tmp_path: Path, variables: dict[str, np.ndarray], capsys: pytest.CaptureFixture[str]
) -> None:
    twins = {f"{name}/ExponentialMovingAverage": array * 2 for name, array in variables.items()}
    prefix = write_bundle(tmp_path, variables | twins)
    assert main(["convert", str(prefix), str(tmp_path / "ema.safetensors"), "--ema"]) == 0
    assert "(147 ema, 19 initial)" in capsys.readouterr().out
    bias = load_safetensors(tmp_path / "ema.safetensors")["stem.conv_0.bias"]
    np.testing.assert_array_equal(bias.numpy(), variables["moat/stem/conv_0/bias"] * 2)
    assert metadata_of(tmp_path / "ema.safetensors")["weights"] == "ema"


def test_list(golden_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["list", str(golden_folder)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 160
    assert "global_step  []  int64" in lines
    assert "moat/block_02_00/attention/q/weight  [64, 2, 32]  float32" in lines


def test_a_bad_file_is_one_line_on_stderr(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "bad.index").write_bytes(b"\x89PNG")
    assert main(["convert", str(tmp_path / "bad"), str(tmp_path / "out.safetensors")]) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    (line,) = captured.err.splitlines()
    assert line.startswith("error: ") and "bad.index" in line
    assert not (tmp_path / "out.safetensors").exists()


def test_a_destination_that_cannot_be_written(
    tmp_path: Path, golden_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["convert", str(golden_folder), str(tmp_path / "missing" / "out.safetensors")]) == 1
    assert len(capsys.readouterr().err.splitlines()) == 1


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ([], "convert | list"),
        (["source", "x.safetensors"], "invalid choice: 'source'"),
        (["convert", "source"], "DESTINATION"),
        (["list"], "SOURCE"),
        (["list", "source", "--ema"], "unrecognized arguments: --ema"),
        (["convert", "source", "x.pt"], "must end in .safetensors, not 'x.pt'"),
        (
            ["convert", "a", "b.safetensors", "--window-size", "all"],
            "must be an integer or none, not 'all'",
        ),
        (["convert", "a", "b.safetensors", "--channel-order", "grb"], "invalid choice: 'grb'"),
    ],
)
def test_usage(arguments: list[str], complaint: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        main(arguments)
    assert exit_.value.code == 2
    assert complaint in capsys.readouterr().err


def test_it_runs_as_a_module(golden_folder: Path) -> None:
    command = [sys.executable, "-m", "moat_kernels.checkpoints", "list", str(golden_folder)]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "moat/stem/conv_0/kernel  [3, 3, 3, 16]  float32" in result.stdout


def test_conversion_of_a_keras_model(
    tmp_path: Path, keras: dict[str, np.ndarray], capsys: pytest.CaptureFixture[str]
) -> None:
    source = write_saved_model(tmp_path / "tagger", keras)
    destination = tmp_path / "tagger.safetensors"
    options = ["--resolution", "320", "--window-size", "none"]
    assert main(["convert", str(source), str(destination), *options]) == 0
    loaded = load_safetensors(destination)
    expected = load_tensorflow(source, resolution=320, window_size=None)
    assert all(torch.equal(loaded[name], expected.state_dict[name]) for name in loaded)
    # As JSON has it: lists in place of tuples.
    assert configurations_of(loaded)[""] == json.loads(json.dumps(expected.configuration))
    assert metadata_of(destination)["source"] == "tagger"
    output = capsys.readouterr().out
    assert "assumed: channel_order 'bgr'" in output and "assumed: resolution" not in output
    assert main(["convert", str(source), str(destination), "--window-size", "7"]) == 0
    assert configurations_of(load_safetensors(destination))[""]["window_size"][2] == [7, 7]


def test_list_of_an_object_checkpoint_has_the_names_of_variables(
    tmp_path: Path, keras: dict[str, np.ndarray], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["list", str(write_saved_model(tmp_path / "tagger", keras))]) == 0
    lines = capsys.readouterr().out.splitlines()
    attention = r"variables/\d+/.ATTRIBUTES/VARIABLE_VALUE  \[64, 2, 32\]  float32  "
    pattern = re.compile(attention + "stage2_block1_attention/q/weight")
    assert sum(pattern.fullmatch(line) is not None for line in lines) == 1
    assert lines[-1] == "_CHECKPOINTABLE_OBJECT_GRAPH  skipped: dtype string is not supported"


@pytest.mark.parametrize("name", ["x.pth.tar", "x.ckpt", "x.th", "pytorch_model.bin"])
def test_conversion_of_a_training_checkpoint(
    tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    weights = {f"module.{key}": tensor for key, tensor in WEIGHTS.items()}
    torch.save({"model": weights, "epoch": 3}, tmp_path / name)
    destination = tmp_path / "model.safetensors"
    assert main(["convert", str(tmp_path / name), str(destination)]) == 0
    loaded = load_safetensors(destination)
    assert loaded.keys() == WEIGHTS.keys()
    assert all(torch.equal(loaded[key], WEIGHTS[key]) for key in WEIGHTS)
    assert metadata_of(destination) == {"format": "pt", "source": name, "weights": "raw"}
    output = capsys.readouterr().out
    assert "loaded 2 tensors (2 raw) from 2 variables" in output
    assert "skipped 1: beside 'model': epoch" in output


def test_one_of_several_state_dicts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    content = {"model": WEIGHTS, "model_ema": {"x": torch.ones(2)}}
    source, destination = str(saved(tmp_path, content)), str(tmp_path / "ema.safetensors")
    assert main(["convert", source, destination]) == 1
    assert "'model' (2 tensors), 'model_ema' (1 tensors)" in capsys.readouterr().err
    assert main(["convert", source, destination, "--key", "model_ema"]) == 0
    assert load_safetensors(destination).keys() == {"x"}
    capsys.readouterr()
    assert main(["list", source, "--key", "model_ema"]) == 0
    assert capsys.readouterr().out == "x  [2]  float32\n"


def test_the_configuration_of_a_model_and_other_metadata_stay(tmp_path: Path) -> None:
    model = moat_kernels.create_model(
        "tiny_moat_0", num_classes=2, pool_size=3, depths=(1, 1, 1, 1)
    )
    torch.save({"state_dict": torch.nn.DataParallel(model).state_dict()}, tmp_path / "x.pt")
    first, second = tmp_path / "first.safetensors", tmp_path / "second.safetensors"
    assert main(["convert", str(tmp_path / "x.pt"), str(first)]) == 0
    assert configurations_of(load_safetensors(first))[""]["pool_size"] == 3
    save_safetensors(load_safetensors(first), first, {"classes": "[]"})
    assert main(["convert", str(first), str(second)]) == 0
    assert configurations_of(load_safetensors(second))[""]["pool_size"] == 3
    assert metadata_of(second)["classes"] == "[]"


@pytest.mark.parametrize(
    ("source", "option", "complaint"),
    [
        ("torch", ["--ema"], "--ema is for TensorFlow checkpoints only"),
        ("torch", ["--resolution", "320"], "--resolution, --window-size .* are for Keras models"),
        ("official", ["--key", "model"], "--key is for files of torch.save only"),
        ("official", ["--channel-order", "rgb"], "channel_order are for Keras models"),
        ("official", ["--resolution", "0"], "resolution must be an integer from 1"),
    ],
)
def test_options_that_are_not_for_the_source(
    tmp_path: Path,
    golden_folder: Path,
    source: str,
    option: list[str],
    complaint: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = saved(tmp_path, WEIGHTS) if source == "torch" else golden_folder
    assert main(["convert", str(path), str(tmp_path / "x.safetensors"), *option]) == 1
    assert re.search(complaint, capsys.readouterr().err)
