"""Keras MOATs to state_dicts: names, layouts, gaps, and what the weights do not tell."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from checkpoints.keras_writer import (
    SMALL_KERAS,
    SUFFIX,
    attribute,
    graph_of,
    keras_shapes,
    object_graph,
    saved_model_keys,
    slot,
    write_metadata,
    write_object_bundle,
    write_saved_model,
)

import moat_kernels
from moat_kernels.checkpoints import CheckpointError, ConvertedCheckpoint, load_tensorflow
from moat_kernels.checkpoints.keras_names import KERAS
from moat_kernels.checkpoints.rules import Place

Variables = dict[str, np.ndarray]


def converted(folder: Path, variables: Variables, **options: Any) -> ConvertedCheckpoint:
    return load_tensorflow(write_saved_model(folder / "saved", variables), **options)


def test_layouts(tmp_path: Path, keras: Variables) -> None:
    state_dict = converted(tmp_path, keras).state_dict
    expected = {
        "stem.conv_1.weight": keras["root_conv2d_02/kernel"].transpose(3, 2, 0, 1),
        "stem.norm_0.running_var": keras["root_bn/moving_variance"],
        "stages.1.1.pre_norm.weight": keras["stage1_block1_mb_bn_01/gamma"],
        "stages.1.1.expand_conv.weight": keras["stage1_block1_mb_conv2d_01/kernel"].T,
        "stages.1.1.expand_norm.bias": keras["stage1_block1_mb_bn_02/beta"],
        "stages.1.1.depthwise_norm.running_mean": keras["stage1_block1_mb_bn_03/moving_mean"],
        "stages.1.1.se.reduce.weight": keras["stage1_block1_mb_se_dense_01/kernel"].T,
        "stages.1.1.se.expand.weight": keras["stage1_block1_mb_se_dense_02/kernel"].T,
        "stages.1.1.se.expand.bias": keras["stage1_block1_mb_se_dense_02/bias"],
        "stages.1.1.shrink_conv.bias": keras["stage1_block1_mb_conv2d_03/bias"],
        "stages.2.0.shortcut_conv.weight": keras["stage2_block0_mb_shortcut_conv/kernel"].T,
        "stages.2.0.attention_norm.bias": keras["stage2_block0_ln/beta"],
        "final_layer_norm.weight": keras["predictions_norm/gamma"],
        "logits_head.weight": keras["predictions_dense/kernel"].T,
    }
    for name, array in expected.items():
        shape = state_dict[name].shape
        np.testing.assert_array_equal(state_dict[name].numpy(), array.reshape(shape))
    depthwise = keras["stage3_block0_mb_conv2d_02/depthwise_kernel"]
    assert state_dict["stages.3.0.depthwise_conv.weight"][99, 0, 2, 1] == depthwise[2, 1, 99, 0]
    weight = state_dict["stages.3.0.attention.qkv.weight"].view(3, 3, 32, 96)
    for index, projection in enumerate("qkv"):
        kernel = keras[f"stage3_block0_attention/{projection}/weight"]
        np.testing.assert_array_equal(weight[index].numpy(), kernel.transpose(1, 2, 0))


def test_a_state_dict_has_the_names_and_shapes_of_the_model(
    tmp_path: Path, keras: Variables
) -> None:
    state_dict = converted(tmp_path, keras).state_dict
    stem_width, widths, depths, classes = SMALL_KERAS
    model = moat_kernels.create_model(
        "tiny_moat_0",
        num_classes=classes,
        position_embedding=False,
        stem_width=stem_width,
        widths=widths,
        depths=depths,
    )
    expected = {name: tensor.shape for name, tensor in model.state_dict().items()}
    assert {name: tensor.shape for name, tensor in state_dict.items()} == expected


def test_every_variable_is_used_once(tmp_path: Path, keras: Variables) -> None:
    report = converted(tmp_path, keras).report
    used = [name for names in report.loaded.values() for name in names]
    assert sorted(used) == sorted(keras)
    assert report.skipped == {}
    assert report.origin == str(tmp_path / "saved" / "variables" / "variables")


def test_names_in_both_directions() -> None:
    for place in (Place("stem", KERAS), Place("block", KERAS, 2, 13), Place("head", KERAS)):
        for rule in place.section.rules:
            for variable in rule.variables:
                assert KERAS.find_variable(place.variable_prefix + variable) == (place, rule)
    for name in ("", "root_", "stage02_block0_ln/gamma", "stage0_ln/gamma", "predictions_x/bias"):
        assert KERAS.find_variable(name) is None


@pytest.mark.parametrize(
    "path", ["", "variables", "variables/variables", "variables/variables.index"]
)
def test_paths_of_a_saved_model(tmp_path: Path, keras: Variables, path: str) -> None:
    write_saved_model(tmp_path, keras, resolution=320)
    loaded = load_tensorflow(tmp_path / path)
    assert loaded.configuration and loaded.configuration["preprocessing"]["resolution"] == 320


def test_weights_alone_have_other_keys(tmp_path: Path, keras: Variables) -> None:
    """``save_weights`` names attention's by its layer; the graph tells, not the key."""
    keys = {name: f"layer_with_weights-{i}/_q_proj{SUFFIX}" for i, name in enumerate(keras)}
    tensors = {keys[name]: array for name, array in keras.items()}
    prefix = write_object_bundle(tmp_path / "ckpt", tensors, graph_of(keys))
    (tmp_path / "checkpoint").write_text('model_checkpoint_path: "ckpt"\n')
    expected = converted(tmp_path, keras).state_dict
    for path in (tmp_path, prefix):
        state_dict = load_tensorflow(path).state_dict
        assert all(torch.equal(state_dict[name], expected[name]) for name in expected)


def test_several_shards(tmp_path: Path, keras: Variables) -> None:
    loaded = load_tensorflow(write_saved_model(tmp_path / "three", keras, shards=3))
    expected = converted(tmp_path, keras)
    assert all(torch.equal(t, loaded.state_dict[name]) for name, t in expected.state_dict.items())


def test_optimizers_metrics_and_counters_are_skipped(tmp_path: Path, keras: Variables) -> None:
    keys = saved_model_keys(keras)
    others = {
        "Adam/m/root_bn/gamma": f"optimizer/_variables/1{SUFFIX}",
        "root_bn/gamma/v": f"layer_with_weights-1/gamma/.OPTIMIZER_SLOT/optimizer/v{SUFFIX}",
        "root_bn/gamma/momentum": f"elsewhere/1{SUFFIX}",
        "marked": f"elsewhere/2{SUFFIX}",
        "save_counter": f"save_counter{SUFFIX}",
        "total": f"keras_api/metrics/0/total{SUFFIX}",
    }
    named = keys | others
    nodes = [attribute(name, key) for name, key in named.items()]
    marked = list(named).index("marked")
    # Two metrics have variables of one name, and a layer has counters of random numbers.
    second, counter = f"keras_api/metrics/1/total{SUFFIX}", f"layer_with_weights-9/state{SUFFIX}"
    nodes += [attribute("total", second), attribute("StateVar", counter), slot(0, marked)]
    tensors = {keys[name]: array for name, array in keras.items()}
    tensors |= dict.fromkeys([*others.values(), second], np.zeros(2, np.float32))
    tensors |= {counter: np.zeros(3, np.int64), f"nameless{SUFFIX}": np.zeros(1, np.float32)}
    report = load_tensorflow(
        write_object_bundle(tmp_path / "ckpt", tensors, object_graph(nodes))
    ).report
    slots = {
        key: "optimizer slot"
        for name, key in others.items()
        if not name.startswith(("save", "total"))
    }
    strays = [others["save_counter"], others["total"], second, counter]
    assert report.skipped == {
        **slots,
        **dict.fromkeys(strays, "not a variable of MOAT"),
        f"nameless{SUFFIX}": "no object has it",
    }


@pytest.mark.parametrize(
    "removed",
    [
        "root_conv2d_01/kernel",
        "root_bn/moving_mean",
        "stage0_block0_mb_se_dense_01/bias",
        "stage1_block0_mb_conv2d_01/kernel",
        "stage2_block0_mb_shortcut_conv/bias",
        "stage2_block1_attention/k/bias",
        "stage3_block0_ln/gamma",
        "predictions_norm/beta",
        "predictions_dense/kernel",
    ],
)
def test_a_missing_variable_is_named(tmp_path: Path, keras: Variables, removed: str) -> None:
    del keras[removed]
    with pytest.raises(CheckpointError, match=f"variables: {removed} is missing"):
        converted(tmp_path, keras)


@pytest.mark.parametrize(
    ("name", "complaint"),
    [
        ("stage2_block0_mb_bn_04/gamma", "is not a variable that a Keras MOAT is known to have"),
        ("root_conv2d_03/kernel", "is not a variable that a Keras MOAT is known to have"),
        ("extra_dense/kernel", "is in a layer that no Keras MOAT is known to have"),
        ("stage4_block0_ln/gamma", "MOAT has only 4 stages"),
        (
            "stage2_block0_attention/relative_position_embedding",
            r"relative position embeddings \(use_pe=True\) are not supported",
        ),
    ],
)
def test_unknown_weights_are_refused(
    tmp_path: Path, keras: Variables, name: str, complaint: str
) -> None:
    keras[name] = np.ones((3, 3), np.float32)
    with pytest.raises(CheckpointError, match=rf"{name[:14]}.*{complaint}"):
        converted(tmp_path, keras)


@pytest.mark.parametrize(
    ("name", "shape", "expected"),
    [
        ("root_conv2d_01/kernel", (5, 5, 3, 16), r"\[3, 3, image_channels, width\]"),
        ("stage0_block0_mb_se_dense_02/kernel", (5, 64), r"\[reduced=4, inner=64\]"),
        ("stage1_block1_mb_conv2d_02/depthwise_kernel", (3, 3, 1, 128), r"\[3, 3, inner=128, 1\]"),
        # No shape of ours would tell these heads from four of 16.
        ("stage2_block0_attention/q/weight", (64, 4, 16), r"\[channels=64, heads, 32\]"),
        ("stage2_block0_attention/o/bias", (32,), r"\[channels=64\]"),
        ("predictions_dense/kernel", (7, 96), r"\[channels=96, classes\]"),
    ],
)
def test_wrong_shapes(
    tmp_path: Path, keras: Variables, name: str, shape: tuple[int, ...], expected: str
) -> None:
    keras[name] = np.zeros(shape, np.float32)
    with pytest.raises(CheckpointError, match=rf"{name} has shape .*, expected {expected}"):
        converted(tmp_path, keras)


def test_configuration(tmp_path: Path, keras: Variables) -> None:
    loaded = converted(tmp_path, keras, resolution=320, channel_order="rgb", window_size=5)
    assert loaded.configuration == {
        "stem_width": 16,
        "widths": (16, 32, 64, 96),
        "depths": (1, 2, 2, 1),
        "in_chans": 3,
        "output_stride": 32,
        "window_size": (None, None, (5, 5), None),
        "global_attention_at_end": False,
        "pool_size": 3,
        "position_embedding": False,
        "se_activation": "gelu",
        "layer_norm_eps": 1e-3,
        "pixel_scaling": True,
        "channel_order": "rgb",
        "preprocessing": {
            "resolution": 320,
            "crop_mode": "border",
            "crop_pct": 1.0,
            "interpolation": "bicubic",
        },
    }
    assert len(loaded.report.assumed) == 1, "what the layout's code does remains"


def test_what_is_assumed_is_told(tmp_path: Path, keras: Variables) -> None:
    loaded = converted(tmp_path, keras)
    assert loaded.configuration and loaded.configuration["window_size"][2] == (14, 14)
    assert loaded.configuration["channel_order"] == "bgr"
    text = str(loaded.report)
    assert "assumed: resolution 448: neither given nor in keras_metadata.pb" in text
    assert "assumed: windows of 14x14 tokens in stage 3, a quarter of its map at 448" in text
    assert "assumed: channel_order 'bgr': it was not given" in text


@pytest.mark.parametrize(
    ("options", "window"),
    [
        ({"resolution": 320}, (10, 10)),
        ({"window_size": None}, None),
        ({"window_size": 7, "resolution": 300}, (7, 7)),
    ],
)
def test_windows(
    tmp_path: Path,
    keras: Variables,
    options: dict[str, Any],
    window: tuple[int, int] | None,
) -> None:
    loaded = converted(tmp_path, keras, **options)
    assert loaded.configuration and loaded.configuration["window_size"] == (
        None,
        None,
        window,
        None,
    )


@pytest.mark.parametrize(
    "metadata",
    [
        None,
        b"no JSON at all",
        [None, None, None, 3],
        [None, 320, 448, 3],
        [None, 320, 320, 4],
        [None, 0, 0, 3],
        [None, 99999, 99999, 3],
    ],
    ids=str,
)
def test_odd_metadata_are_ignored(
    tmp_path: Path, keras: Variables, metadata: bytes | list[int | None] | None
) -> None:
    folder = write_saved_model(tmp_path, keras)
    if metadata is None:
        (folder / "keras_metadata.pb").mkdir()
    elif isinstance(metadata, bytes):
        (folder / "keras_metadata.pb").write_bytes(metadata)
    else:
        write_metadata(folder, metadata)
    loaded = load_tensorflow(folder)
    assert loaded.configuration and loaded.configuration["preprocessing"]["resolution"] == 448
    assert any(line.startswith("resolution 448") for line in loaded.report.assumed)


def test_the_metadata_give_way_to_the_argument(tmp_path: Path, keras: Variables) -> None:
    folder = write_saved_model(tmp_path, keras, resolution=384)
    assert "12x12" in str(load_tensorflow(folder).report)
    assert "10x10" in str(load_tensorflow(folder, resolution=320).report)


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"resolution": 0}, "resolution must be an integer from 1 to 16384, got 0"),
        ({"resolution": 320.0}, "resolution must be an integer"),
        ({"resolution": 300}, "300 pixels is no multiple of 32, .* give window_size"),
        ({"window_size": "all"}, "window_size must be an integer from 1 to .*, got 'all'"),
        ({"window_size": True}, "window_size must be an integer"),
        ({"channel_order": "grb"}, "channel_order must be one of rgb, bgr, got 'grb'"),
        ({"ema": True}, "ema=True, but it has no exponential moving averages"),
    ],
)
def test_wrong_options(
    tmp_path: Path, keras: Variables, options: dict[str, Any], complaint: str
) -> None:
    with pytest.raises(CheckpointError, match=complaint):
        converted(tmp_path, keras, **options)


def test_options_are_for_keras_models(golden_folder: Path) -> None:
    with pytest.raises(CheckpointError, match=r"ckpt-1234: an official checkpoint; resolution, "):
        load_tensorflow(golden_folder, resolution=320)


def test_what_is_certain_of_an_official_model(golden_folder: Path) -> None:
    assert load_tensorflow(golden_folder).configuration == {
        "stem_width": 16,
        "widths": (16, 32, 64, 96),
        "depths": (1, 2, 2, 1),
        "in_chans": 3,
        "position_embedding": True,
        "se_activation": "silu",
        "layer_norm_eps": 1e-5,
    }


def test_images_of_other_channels(tmp_path: Path) -> None:
    shapes = keras_shapes(*SMALL_KERAS, in_chans=1)
    loaded = converted(
        tmp_path, {name: np.ones(shape, np.float32) for name, shape in shapes.items()}
    )
    assert loaded.configuration and loaded.configuration["in_chans"] == 1
    assert loaded.configuration["channel_order"] == "rgb"


def test_another_object_checkpoint(tmp_path: Path) -> None:
    folder = write_saved_model(
        tmp_path, {"dense/bias": np.ones(3, np.float32)}, keys={"dense/bias": f"a{SUFFIX}"}
    )
    complaint = r"no variable of a Keras MOAT .* among its 1, which begin with \['dense/bias'\]"
    with pytest.raises(CheckpointError, match=complaint):
        load_tensorflow(folder)
