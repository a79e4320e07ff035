"""Weights tell what configuration they were made for, and another one is adapted to, or refused."""

from __future__ import annotations

import copy
import io
import json
import warnings

import pytest
import torch
from support.small_model import make_model
from torch import nn

from moat_kernels.checkpoints import (
    CheckpointError,
    load_checkpoint,
    load_safetensors,
    save_safetensors,
)

OTHER_POOL = r"pool_size is 2 for these weights, 3 in the model.*build it with pool_size=2"


def test_a_state_dict_has_no_more_names_than_its_tensors() -> None:
    model = make_model(torch.float32)
    expected = {name for name, _ in (*model.named_parameters(), *model.named_buffers())}
    assert set(model.state_dict()) == expected


def through_torch_save(state_dict):
    file = io.BytesIO()
    torch.save(state_dict, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.mark.parametrize(
    "carry", [lambda state_dict: state_dict, copy.deepcopy, through_torch_save]
)
def test_another_pool_is_refused_and_nothing_loaded(carry) -> None:
    state_dict = carry(make_model(torch.float32).state_dict())
    for wrap in (lambda model: model, lambda model: nn.Sequential(nn.Identity(), model)):
        source = nn.Sequential(nn.Identity(), make_model(torch.float32)).state_dict()
        model = make_model(torch.float32, pool_size=3, num_classes=5)
        with torch.no_grad():
            model.stem.conv_0.weight.zero_()
        whole = wrap(model)
        with pytest.raises(RuntimeError, match=OTHER_POOL):
            whole.load_state_dict(state_dict if whole is model else source)
        assert not model.stem.conv_0.weight.any()
    model.load_state_dict(dict(state_dict))  # the tensors alone
    assert model.stem.conv_0.weight.any()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"window_size": (None, None, 2, None)}, r"window_size was .* is \(None, None, \(2, 2\)"),
        ({"global_attention_at_end": True}, "global_attention_at_end was False, is True"),
        ({"output_stride": 16}, "output_stride was 32, is 16: the model's strides are used"),
    ],
    ids=str,
)
def test_what_is_computed_otherwise_is_told(options: dict, message: str) -> None:
    state_dict = make_model(torch.float32).state_dict()
    with pytest.warns(UserWarning, match=message):
        make_model(torch.float32, **options).load_state_dict(state_dict)


def test_the_same_configuration_is_silent() -> None:
    options = {"window_size": (None, None, 2, (1, 2)), "pool_size": 3}
    state_dict = through_torch_save(make_model(torch.float32, **options).state_dict())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        make_model(torch.float32, fused=False, **options).load_state_dict(state_dict)


@pytest.mark.parametrize("suffix", ["pt", "safetensors"])
def test_files_carry_it(tmp_path, suffix: str) -> None:
    path = tmp_path / f"weights.{suffix}"
    wrapped = nn.Sequential()
    wrapped.add_module("module", make_model(torch.float32))
    save = torch.save if suffix == "pt" else save_safetensors
    save(wrapped.state_dict(), path)
    with pytest.raises(CheckpointError, match=OTHER_POOL):
        load_checkpoint(make_model(torch.float32, pool_size=3), path)
    model = make_model(torch.float32, pool_size=3, window_size=(None, None, 2, None))
    report = load_checkpoint(model, path, fine_tune=True)
    assert [line.split(" was ")[0] for line in report.adapted] == ["window_size", "pool_size"]
    assert "adapted: pool_size was 2, is 3" in str(report)


def test_safetensors_load_with_their_configuration(tmp_path) -> None:
    save_safetensors(make_model(torch.float32).state_dict(), tmp_path / "x.safetensors")
    with pytest.raises(RuntimeError, match=OTHER_POOL):
        make_model(torch.float32, pool_size=3).load_state_dict(
            load_safetensors(tmp_path / "x.safetensors")
        )


def test_fine_tuning_keeps_a_classifier_for_other_classes(tmp_path) -> None:
    torch.save(make_model(torch.float32).state_dict(), tmp_path / "five.pt")
    model = make_model(torch.float32, num_classes=7)
    own = copy.deepcopy(model.logits_head)
    with pytest.raises(CheckpointError, match="or load with fine_tune=True"):
        load_checkpoint(model, tmp_path / "five.pt")
    report = load_checkpoint(model, tmp_path / "five.pt", fine_tune=True)
    assert torch.equal(model.logits_head.weight, own.weight)
    assert report.skipped["logits_head.weight"] == "it is for other classes"
    assert report.adapted == ["the model's own logits_head.bias, logits_head.weight stay"]
    assert torch.equal(model.stem.conv_0.weight, make_model(torch.float32).stem.conv_0.weight)


def test_a_setting_of_a_newer_version_is_refused() -> None:
    model = make_model(torch.float32)
    state_dict = model.state_dict()
    state_dict._metadata[""]["moat"]["rotation"] = 90
    with pytest.raises(RuntimeError, match=r"rotation=90, which this version .* does not know"):
        model.load_state_dict(state_dict)


@pytest.mark.parametrize(
    "text", ["", "[]", '{"": 3}', "{", "[" * 100_000, "x" * 70_000], ids=lambda text: text[:8]
)
def test_damaged_configurations_are_errors(tmp_path, text: str) -> None:
    path = tmp_path / "x.safetensors"
    save_safetensors({"x": torch.ones(1)}, path, {"moat_kernels": text})
    with pytest.raises(CheckpointError, match=r"x\.safetensors: its configuration (is|has)"):
        load_safetensors(path)


def test_what_is_kept_in_a_file_is_plain_json(tmp_path) -> None:
    path = tmp_path / "x.safetensors"
    save_safetensors(make_model(torch.float32, pool_size=3).state_dict(), path)
    header = path.read_bytes()[8:]
    metadata = json.JSONDecoder().raw_decode(header.decode("utf-8", "ignore"))[0]["__metadata__"]
    assert json.loads(metadata["moat_kernels"])[""]["pool_size"] == 3
