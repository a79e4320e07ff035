"""State_dicts within what training scripts save, under the names of wrapped models."""

from __future__ import annotations

import argparse
import collections
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints.small_models import (
    WEIGHTS,
    StateDict,
    has_weights,
    is_untouched,
    module_with,
    saved,
)

from moat_kernels.checkpoints import CheckpointError, load_checkpoint, save_safetensors

OTHERS = {name: -tensor for name, tensor in WEIGHTS.items()}
OPTIMIZER = {"state": {0: {"exp_avg": torch.ones(2)}, "a": {"exp_avg": torch.ones(2)}}}


def prefixed(prefix: str, state_dict: StateDict = WEIGHTS) -> StateDict:
    return {prefix + name: tensor for name, tensor in state_dict.items()}


@pytest.mark.parametrize(
    ("content", "skipped"),
    [
        ({"model": WEIGHTS, "epoch": 3}, {"epoch"}),
        ({"state_dict": WEIGHTS, "optimizer": OPTIMIZER}, {"optimizer"}),
        ({"model_ema": WEIGHTS, "args": argparse.Namespace(lr=0.1)}, {"args"}),
        ({"ema": {"state_dict": WEIGHTS, "decay": 0.9}, "n": 1}, {"ema.decay", "n"}),
        ({"model": WEIGHTS, "state_dict": WEIGHTS}, {"state_dict"}),
        ({"model": WEIGHTS, "loss": torch.ones(()), 3: None}, {"loss", "3"}),
        ({"model": WEIGHTS, "head": {"stem.bias": torch.ones(2)}}, {"head"}),
        ({"model": prefixed("module.") | {"n_averaged": torch.tensor(7)}}, {"n_averaged"}),
        (collections.OrderedDict(prefixed("module.")), set()),
        (prefixed("model."), set()),
        (prefixed("_orig_mod."), set()),
        (prefixed("module._orig_mod.model."), set()),
        ({"state_dict": prefixed("model._orig_mod."), "hyper_parameters": {"lr": 1}}, None),
        ({"model": {name: torch.nn.Parameter(WEIGHTS[name]) for name in WEIGHTS}}, set()),
    ],
)
def test_wrapped_state_dicts(tmp_path: Path, content: Any, skipped: set[str] | None) -> None:
    model = module_with(WEIGHTS)
    report = load_checkpoint(model, saved(tmp_path, content))
    assert has_weights(model)
    assert report.loaded.keys() == report.source.keys() == WEIGHTS.keys()
    assert report.skipped.keys() == ({"hyper_parameters"} if skipped is None else skipped)


def test_a_dict_within_itself(tmp_path: Path) -> None:
    content: dict[str, Any] = {"model": WEIGHTS}
    content["self"] = content
    model = module_with(WEIGHTS)
    load_checkpoint(model, saved(tmp_path, content))
    assert has_weights(model)


def test_wrapped_models(tmp_path: Path) -> None:
    model = module_with(prefixed("module._orig_mod."))
    load_checkpoint(model, saved(tmp_path, {"model": prefixed("model.")}))
    assert has_weights(model.get_submodule("module._orig_mod"))


def test_prefixes_that_not_all_names_carry_stay(tmp_path: Path) -> None:
    content = {"module.stem.weight": WEIGHTS["stem.weight"], "stem.bias": WEIGHTS["stem.bias"]}
    with pytest.raises(CheckpointError, match=r"not in the model: module\.stem\.weight"):
        load_checkpoint(module_with(WEIGHTS), saved(tmp_path, content))


def test_several_state_dicts_are_chosen_from(tmp_path: Path) -> None:
    averaged = {"model": prefixed("module.")}
    path = saved(tmp_path, {"model": OTHERS, "ema": averaged, "optimizer": OPTIMIZER})
    model = module_with(WEIGHTS)
    complaint = (
        r"x\.ckpt: which state_dict to take is not clear, there is 'model' \(2 tensors\), "
        r"'ema\.model' \(2 tensors\); choose one by load_checkpoint\(model, path, key='model'\)"
    )
    with pytest.raises(CheckpointError, match=complaint):
        load_checkpoint(model, path)
    assert is_untouched(model)
    report = load_checkpoint(model, path, key="ema.model")
    assert has_weights(model)
    assert report.skipped.keys() == {"model", "optimizer"}
    assert report.loaded["stem.bias"] == ("module.stem.bias",)
    with pytest.raises(CheckpointError, match=r"no state_dict at key='ema'; there is 'model' \(2"):
        load_checkpoint(model, path, key="ema")
    model = module_with(WEIGHTS)
    report = load_checkpoint(model, path, prefer=("model_ema", "ema.model", "model"))
    assert has_weights(model) and report.skipped.keys() == {"model", "optimizer"}
    load_checkpoint(model, saved(tmp_path, {"model": WEIGHTS}), prefer=("ema",))


def test_a_key_is_for_torch_files(tmp_path: Path, golden_folder: Path) -> None:
    save_safetensors(WEIGHTS, tmp_path / "x.safetensors")
    for path in (tmp_path / "x.safetensors", golden_folder):
        with pytest.raises(CheckpointError, match=r"key='model' is for files of torch\.save"):
            load_checkpoint(module_with(WEIGHTS), path, key="model")
