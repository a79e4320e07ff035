"""Checkpoint files into models: all of it or none of it."""

from __future__ import annotations

import pickle
import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from checkpoints.bundle_writer import STRING, tensor_record, write_bundle
from checkpoints.hostile import SPECIAL_FILES, make_special_file
from checkpoints.small_models import (
    WEIGHTS,
    StateDict,
    is_untouched,
    module_with,
)

import moat_kernels
from moat_kernels.checkpoints import (
    CheckpointError,
    convert_variables,
    load_checkpoint,
    load_tensorflow,
    save_safetensors,
)

EMBEDDING = "relative_position_embedding"
Change = Callable[[StateDict], StateDict]

HEAD = ("final_layer_norm.", "logits_head.")


@pytest.fixture
def state_dict(variables: dict[str, np.ndarray]) -> StateDict:
    return convert_variables(variables).state_dict


def test_load_tensorflow_is_the_conversion_of_the_file(
    golden_folder: Path, state_dict: StateDict
) -> None:
    converted = load_tensorflow(golden_folder)
    assert converted.report.origin == str(golden_folder / "model.ckpt-1234")
    assert converted.state_dict.keys() == state_dict.keys()
    assert all(torch.equal(converted.state_dict[name], state_dict[name]) for name in state_dict)


def test_load_tensorflow_reports_what_the_bundle_skipped(
    tmp_path: Path, variables: dict[str, np.ndarray]
) -> None:
    prefix = write_bundle(
        tmp_path, variables, extra_records={b"text": tensor_record(STRING, (), b"")}
    )
    report = load_tensorflow(prefix).report
    assert report.skipped["text"] == "dtype string is not supported"
    assert report.skipped["global_step"] == "not a variable of MOAT"


@pytest.mark.parametrize("kind", ["folder", "prefix", "index", "safetensors", "pt"])
def test_every_kind_of_file(
    tmp_path: Path, golden_folder: Path, state_dict: StateDict, kind: str
) -> None:
    if kind == "safetensors":
        path = tmp_path / "model.safetensors"
        save_safetensors(state_dict, path)
    elif kind == "pt":
        path = tmp_path / "model.pt"
        torch.save(state_dict, path)
    else:
        endings = {"folder": "", "prefix": "/model.ckpt-1234", "index": "/model.ckpt-1234.index"}
        path = Path(f"{golden_folder}{endings[kind]}")
    model = module_with(state_dict)
    report = load_checkpoint(model, path)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, state_dict[name])
    assert report.loaded.keys() == state_dict.keys()
    assert str(report).startswith("checkpoint ")


def test_a_model_without_head_skips_the_head_of_the_file(
    golden_folder: Path, state_dict: StateDict
) -> None:
    model = module_with({k: v for k, v in state_dict.items() if not k.startswith(HEAD)})
    report = load_checkpoint(model, golden_folder)
    assert report.loaded.keys() == report.source.keys() == model.state_dict().keys()
    skipped = {name for name, reason in report.skipped.items() if "no classifier head" in reason}
    head = {"final_layer_norm/gamma", "final_layer_norm/beta", "logits_head/kernel"}
    assert skipped == {f"moat/{name}" for name in head | {"logits_head/bias"}}


def test_parameters_keep_their_dtype(golden_folder: Path, state_dict: StateDict) -> None:
    name = "stem.conv_0.weight"
    model = module_with(state_dict | {name: state_dict[name].bfloat16()})
    load_checkpoint(model, golden_folder)
    assert torch.equal(model.state_dict()[name], state_dict[name].bfloat16())


def resized_head(state_dict: StateDict) -> StateDict:
    resized = {"logits_head.weight": torch.zeros(7, 96), "logits_head.bias": torch.zeros(7)}
    return state_dict | resized


def one_wrong_shape(state_dict: StateDict) -> StateDict:
    return state_dict | {"stem.conv_1.bias": torch.zeros(17)}


def one_integer(state_dict: StateDict) -> StateDict:
    return state_dict | {"stem.conv_1.bias": torch.zeros(16, dtype=torch.int64)}


def one_more(state_dict: StateDict) -> StateDict:
    return state_dict | {"stages.2.2.pre_norm.weight": torch.zeros(64)}


def without_last_stage(state_dict: StateDict) -> StateDict:
    return {name: tensor for name, tensor in state_dict.items() if "stages.3" not in name}


def without_embeddings(state_dict: StateDict) -> StateDict:
    return {name: tensor for name, tensor in state_dict.items() if EMBEDDING not in name}


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (
            resized_head,
            r"logits_head\.weight is \[10, 96\] in the file, \[7, 96\] in the model; .*"
            r"num_classes=10, or without head \(features_only=True\), or load with fine_tune=True",
        ),
        (one_wrong_shape, r"stem\.conv_1\.bias is \[16\] in the file, \[17\] in the model$"),
        (one_integer, r"stem\.conv_1\.bias is torch\.float32 in the file, torch\.int64 in the"),
        (one_more, r"missing in the file: stages\.2\.2\.pre_norm\.weight; not in the model: noth"),
        (without_last_stage, r"not in the model: stages\.3\.0\.\S+, .* and \d+ more"),
        (without_embeddings, r"has position embeddings .* build it with position_embedding=True"),
    ],
)
def test_files_that_do_not_fit_leave_the_model_untouched(
    golden_folder: Path, state_dict: StateDict, change: Change, complaint: str
) -> None:
    model = module_with(change(state_dict))
    with pytest.raises(CheckpointError, match=rf"model\.ckpt-1234: .*{complaint}"):
        load_checkpoint(model, golden_folder)
    assert is_untouched(model)


def without_head(state_dict: StateDict) -> StateDict:
    return {name: tensor for name, tensor in state_dict.items() if not name.startswith(HEAD)}


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (without_embeddings, "has no position embeddings .* position_embedding=False"),
        (without_head, "has no classifier head .* features_only=True or num_classes=0"),
    ],
)
def test_files_that_lack_a_part_of_the_model(
    tmp_path: Path, state_dict: StateDict, change: Change, complaint: str
) -> None:
    path, model = tmp_path / "part.safetensors", module_with(state_dict)
    save_safetensors(change(state_dict), path)
    with pytest.raises(CheckpointError, match=rf"part\.safetensors: {complaint}"):
        load_checkpoint(model, path)
    assert is_untouched(model)


def test_damaged_data_leaves_the_model_untouched(golden_copy: Path, state_dict: StateDict) -> None:
    path = golden_copy.with_name("model.ckpt-1234.data-00000-of-00001")
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    model = module_with(state_dict)
    with pytest.raises(CheckpointError, match=r"data-00000-of-00001: the checksum of 'moat/"):
        load_checkpoint(model, golden_copy)
    assert is_untouched(model)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\x89PNG\r\n\x1a\n",
        pickle.dumps({}, protocol=2),
        b"\x80\x02" + b"]" * 1000,
        b"PK\x03\x04 and no more",
        random.Random(0).randbytes(999),
    ],
    ids=["empty", "png", "pickle", "endless", "zip", "random"],
)
@pytest.mark.parametrize("name", ["bad.pth", "bad.safetensors", "bad.ckpt"])
def test_foreign_files(tmp_path: Path, state_dict: StateDict, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(CheckpointError, match=f"{name}: "):
        load_checkpoint(module_with(state_dict), tmp_path / name)


@pytest.mark.parametrize("name", ["none.safetensors", "none.pt", "none"])
def test_files_that_do_not_exist(tmp_path: Path, state_dict: StateDict, name: str) -> None:
    with pytest.raises(CheckpointError, match=f"{name}: no such"):
        load_checkpoint(module_with(state_dict), tmp_path / name)


def test_averages_are_for_tensorflow_files(tmp_path: Path, state_dict: StateDict) -> None:
    save_safetensors(state_dict, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match="ema=True is for TensorFlow checkpoints only"):
        load_checkpoint(module_with(state_dict), tmp_path / "model.safetensors", ema=True)


def test_create_model_loads_the_golden_checkpoint(
    golden_folder: Path, state_dict: StateDict
) -> None:
    model = moat_kernels.create_model(
        "tiny_moat_0",
        num_classes=10,
        stem_width=16,
        widths=(16, 32, 64, 96),
        depths=(1, 2, 2, 1),
        checkpoint=golden_folder,
    )
    assert model.state_dict().keys() == state_dict.keys()
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, state_dict[name]), name


@pytest.mark.parametrize("name", ["x.bin", "x.ckpt", "x.pth.tar", "x.th", "x", "x.safetensors"])
@pytest.mark.parametrize("write", ["zip", "legacy", "safetensors"])
def test_the_content_tells_what_a_file_is(tmp_path: Path, name: str, write: str) -> None:
    path, state_dict = tmp_path / name, {"layer.weight": torch.rand(2, 3)}
    if write == "safetensors":
        save_safetensors(state_dict, path)
    else:
        torch.save(state_dict, path, _use_new_zipfile_serialization=write == "zip")
    model = module_with(state_dict)
    load_checkpoint(model, path)
    assert torch.equal(model.state_dict()["layer.weight"], state_dict["layer.weight"])


def test_a_file_is_preferred_to_the_tensorflow_checkpoint_beside_it(
    golden_copy: Path, state_dict: StateDict
) -> None:
    """PREFIX is no file of a TensorFlow V2 checkpoint, so one that is there is meant."""
    torch.save({"x": torch.ones(1)}, golden_copy)
    model = module_with({"x": torch.zeros(1)})
    load_checkpoint(model, golden_copy)
    assert model.state_dict()["x"] == 1
    golden_copy.write_bytes(b"V1")
    load_checkpoint(module_with(state_dict), golden_copy)


@pytest.mark.parametrize("kind", SPECIAL_FILES)
def test_only_regular_files_are_opened(
    tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_special_file(kind, tmp_path / "x.pt", monkeypatch)
    complaint = "no file 'checkpoint' says" if kind == "folder" else SPECIAL_FILES[kind]
    with pytest.raises(CheckpointError, match=rf"x\.pt: {complaint}"):
        load_checkpoint(module_with(WEIGHTS), tmp_path / "x.pt")
