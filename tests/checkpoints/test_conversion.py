"""Official variables to state_dicts: layouts, averages, gaps and wrong shapes."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from support.golden import variable_values

from moat_kernels.checkpoints import (
    CheckpointError,
    convert_parameter,
    convert_variables,
    official_names,
)

AVERAGE = "/ExponentialMovingAverage"
NORM_LEAVES = ("gamma", "beta", "moving_mean", "moving_variance")


def block_variables(
    scope: str,
    in_channels: int = 32,
    channels: int = 64,
    attention: bool = False,
    heads: int = 2,
    head_dim: int = 32,
) -> dict[str, np.ndarray]:
    """The variables of a single block, with values that depend on their names."""
    inner, reduced = 4 * channels, channels // 4
    shapes = {
        "expand_conv/kernel": (1, 1, in_channels, inner),
        "depthwise_conv/depthwise_kernel": (3, 3, inner, 1),
        "shrink_conv/kernel": (1, 1, inner, channels),
        "shrink_conv/bias": (channels,),
    }
    for norm, size in (("pre", in_channels), ("expand", inner), ("depthwise", inner)):
        shapes |= {f"{norm}_norm/{leaf}": (size,) for leaf in NORM_LEAVES}
    if in_channels != channels:
        shapes["shortcut_conv/kernel"] = (1, 1, in_channels, channels)
        shapes["shortcut_conv/bias"] = (channels,)
    if attention:
        for projection in "qkv":
            shapes[f"attention/{projection}/weight"] = (channels, heads, head_dim)
            shapes[f"attention/{projection}/bias"] = (heads, head_dim)
        shapes["attention/o/weight"] = (heads, head_dim, channels)
        shapes["attention/o/bias"] = (channels,)
        shapes["attention/relative_position_embedding"] = (heads, 13, 13)
        shapes["attention_norm/gamma"] = shapes["attention_norm/beta"] = (channels,)
    else:
        shapes["se/reduce_conv2d/kernel"] = (1, 1, inner, reduced)
        shapes["se/reduce_conv2d/bias"] = (reduced,)
        shapes["se/expand_conv2d/kernel"] = (1, 1, reduced, inner)
        shapes["se/expand_conv2d/bias"] = (inner,)
    names = {f"{scope}/{name}": shape for name, shape in shapes.items()}
    return {name: variable_values(name, shape, 0) for name, shape in names.items()}


def test_layouts_of_a_convolution_block() -> None:
    variables = block_variables("mbconv")
    state_dict = convert_variables(variables).state_dict
    expand = variables["mbconv/expand_conv/kernel"]
    depthwise = variables["mbconv/depthwise_conv/depthwise_kernel"]
    reduce = variables["mbconv/se/reduce_conv2d/kernel"]
    assert state_dict["expand_conv.weight"].shape == (256, 32, 1, 1)
    assert state_dict["depthwise_conv.weight"].shape == (256, 1, 3, 3)
    assert state_dict["se.reduce.weight"].shape == (16, 256, 1, 1)
    assert state_dict["expand_conv.weight"][200, 7] == expand[0, 0, 7, 200]
    assert state_dict["se.reduce.weight"][3, 100] == reduce[0, 0, 100, 3]
    for row, column in itertools.product(range(3), range(3)):
        assert state_dict["depthwise_conv.weight"][99, 0, row, column] == depthwise[row, column, 99]
    for leaf, ours in zip(
        NORM_LEAVES, ("weight", "bias", "running_mean", "running_var"), strict=True
    ):
        expected = variables[f"mbconv/expand_norm/{leaf}"]
        np.testing.assert_array_equal(state_dict[f"expand_norm.{ours}"].numpy(), expected)


def test_layouts_of_attention() -> None:
    """[C, heads, head_dim] is packed as (q/k/v, heads, head_dim) rows."""
    variables = block_variables("moat", channels=96, heads=3, attention=True)
    state_dict = convert_variables(variables).state_dict
    weight = state_dict["attention.qkv.weight"].view(3, 3, 32, 96)
    bias = state_dict["attention.qkv.bias"].view(3, 3, 32)
    output = state_dict["attention.proj.weight"].view(96, 3, 32)
    for index, projection in enumerate("qkv"):
        kernel = variables[f"moat/attention/{projection}/weight"]
        np.testing.assert_array_equal(weight[index].numpy(), kernel.transpose(1, 2, 0))
        np.testing.assert_array_equal(
            bias[index].numpy(), variables[f"moat/attention/{projection}/bias"]
        )
    np.testing.assert_array_equal(
        output.numpy(), variables["moat/attention/o/weight"].transpose(2, 0, 1)
    )


def test_the_packed_projection_computes_what_the_official_one_does() -> None:
    variables = block_variables("moat", attention=True)
    state_dict = convert_variables(variables).state_dict
    x = np.random.default_rng(0).normal(size=(5, 64)).astype(np.float32)
    packed = torch.nn.functional.linear(
        torch.from_numpy(x), state_dict["attention.qkv.weight"], state_dict["attention.qkv.bias"]
    )
    for index, projection in enumerate("qkv"):
        name = f"moat/attention/{projection}"
        expected = (
            np.einsum("nc,chd->nhd", x, variables[f"{name}/weight"]) + variables[f"{name}/bias"]
        )
        torch.testing.assert_close(packed.view(5, 3, 2, 32)[:, index], torch.from_numpy(expected))


def test_whole_model(variables: dict[str, np.ndarray]) -> None:
    converted = convert_variables(variables)
    state_dict, report = converted.state_dict, converted.report
    assert next(iter(state_dict)) == "stem.conv_0.weight"
    assert list(state_dict)[-1] == "logits_head.bias"
    kernel = variables["moat/logits_head/kernel"]
    np.testing.assert_array_equal(state_dict["logits_head.weight"].numpy(), kernel[0, 0].T)
    # A parameter comes from the variables that its own name says; all but one variable is used.
    for parameter, names in report.loaded.items():
        assert names == official_names(parameter)
    assert set(itertools.chain(*report.loaded.values())) == variables.keys() - {"global_step"}
    assert report.skipped == {"global_step": "not a variable of MOAT"}
    counters = [name for name in state_dict if name.endswith("num_batches_tracked")]
    assert len(counters) == 1 + 3 * 6
    assert all(state_dict[name] == 0 and report.source[name] == "initial" for name in counters)
    assert {report.source[name] for name in state_dict.keys() - set(counters)} == {"raw"}


def test_tensors_are_contiguous_and_independent_of_the_arrays(
    variables: dict[str, np.ndarray],
) -> None:
    before = variables["moat/stem/conv_0/bias"]
    bias = variables["moat/stem/conv_0/bias"] = before.copy()
    state_dict = convert_variables(variables).state_dict
    bias += 1
    np.testing.assert_array_equal(state_dict["stem.conv_0.bias"].numpy(), before)
    assert all(tensor.is_contiguous() for tensor in state_dict.values())


def test_a_model_without_head_and_without_position_embeddings(
    variables: dict[str, np.ndarray],
) -> None:
    for name in list(variables):
        if name.startswith(("moat/final_", "moat/logits_")) or "relative_position" in name:
            del variables[name]
    state_dict = convert_variables(variables).state_dict
    assert not [name for name in state_dict if "head" in name or "relative_position" in name]


def test_eager_names_and_other_float_types(variables: dict[str, np.ndarray]) -> None:
    renamed = {f"{name}:0": array.astype(">f8") for name, array in variables.items()}
    converted = convert_variables(renamed)
    assert converted.state_dict["stem.conv_1.bias"].dtype == torch.float64
    np.testing.assert_array_equal(
        converted.state_dict["stem.conv_1.bias"].numpy(), variables["moat/stem/conv_1/bias"]
    )
    assert converted.report.loaded["stem.conv_1.bias"] == ("moat/stem/conv_1/bias:0",)


def test_averages(variables: dict[str, np.ndarray]) -> None:
    averaged = {name for name in variables if name.startswith("moat/") and "moving" not in name}
    variables |= {name + AVERAGE: variables[name] + 1 for name in averaged}
    raw = convert_variables(variables)
    assert raw.report.skipped.keys() == {name + AVERAGE for name in averaged} | {"global_step"}
    ema = convert_variables(variables, ema=True)
    assert ema.report.skipped.keys() == averaged | {"global_step"}
    for name, tensor in raw.state_dict.items():
        expected = tensor + 1 if ema.report.source[name] == "ema" else tensor
        assert torch.equal(ema.state_dict[name], expected)
    assert ema.report.source["stages.3.0.attention.qkv.weight"] == "ema"
    assert ema.report.source["stem.norm_0.running_mean"] == "raw"


def test_averaged_moving_statistics(variables: dict[str, np.ndarray]) -> None:
    name = "moat/stem/norm_0/moving_variance"
    variables[name + AVERAGE] = variables[name] * 2
    converted = convert_variables(variables, ema=True)
    assert converted.report.source["stem.norm_0.running_var"] == "ema"
    np.testing.assert_array_equal(
        converted.state_dict["stem.norm_0.running_var"].numpy(), variables[name] * 2
    )


def test_one_parameter_is_never_half_averaged(variables: dict[str, np.ndarray]) -> None:
    name = "moat/block_02_01/attention/q/weight"
    variables[name + AVERAGE] = variables[name]
    with pytest.raises(CheckpointError, match=f"{name}.*, which form one parameter, some have"):
        convert_variables(variables, ema=True)


@pytest.mark.parametrize(
    "scope_and_attention", [("mbconv", False), ("moat", True)], ids=["mbconv", "moat"]
)
def test_every_missing_variable_is_named(scope_and_attention: tuple[str, bool]) -> None:
    scope, attention = scope_and_attention
    variables = block_variables(scope, attention=attention)
    for name in variables:
        if name.endswith("relative_position_embedding"):
            continue
        with pytest.raises(CheckpointError, match=f"variables: {name} is missing"):
            convert_variables({other: variables[other] for other in variables if other != name})


@pytest.mark.parametrize(
    ("removed", "named"),
    [
        ("moat/stem/", "moat/stem/conv_0/kernel"),
        ("moat/block_01_00/", "moat/block_01_00/expand_conv/kernel"),
        ("moat/block_02_", "moat/block_02_00/expand_conv/kernel"),
        ("moat/block_03_", "moat/block_03_00/expand_conv/kernel"),
        ("moat/final_layer_norm/", "moat/final_layer_norm/gamma"),
        ("moat/logits_head/bias", "moat/logits_head/bias"),
        ("moat/block_02_00/shortcut_conv/", "moat/block_02_00/shortcut_conv/kernel"),
        (
            "moat/block_02_01/attention/relative_position_embedding",
            "moat/block_02_01/attention/relative_position_embedding",
        ),
    ],
)
def test_gaps_in_a_model(variables: dict[str, np.ndarray], removed: str, named: str) -> None:
    remaining = {name: array for name, array in variables.items() if not name.startswith(removed)}
    with pytest.raises(CheckpointError, match=f"{named} is missing"):
        convert_variables(remaining)


@pytest.mark.parametrize(
    ("name", "shape", "expected"),
    [
        ("stem/conv_0/kernel", (1, 3, 3, 16), r"\[3, 3, image_channels, width\]"),
        ("stem/conv_0/kernel", (16, 3), r"\[3, 3, image_channels, width\]"),
        ("stem/norm_0/beta", (1, 16), r"\[width=16\] to fit moat/stem/conv_0/kernel"),
        ("block_00_00/expand_conv/kernel", (1, 1, 17, 64), r"\[1, 1, in_channels=16, inner\]"),
        (
            "block_01_00/depthwise_conv/depthwise_kernel",
            (3, 3, 128, 2),
            r"\[3, 3, inner=128, 1\] to fit moat/block_01_00/expand_conv/kernel",
        ),
        ("block_01_01/shrink_conv/bias", (), r"\[channels=32\]"),
        ("block_02_00/attention/k/weight", (64, 4, 16), r"\[channels=64, heads=2, head_dim=32\]"),
        ("block_02_00/attention/relative_position_embedding", (2, 27, 13), r"\[heads=2, extent, "),
        ("logits_head/kernel", (1, 1, 64, 10), r"\[1, 1, channels=96, classes\]"),
        ("logits_head/bias", (0,), r"\[classes=10\] to fit moat/logits_head/kernel"),
    ],
)
def test_wrong_shapes(
    variables: dict[str, np.ndarray], name: str, shape: tuple[int, ...], expected: str
) -> None:
    name = f"moat/{name}"
    variables[name] = np.zeros(shape, dtype=np.float32)
    complaint = rf"^file: {name} has shape \[{', '.join(map(str, shape))}\], expected {expected}"
    with pytest.raises(CheckpointError, match=complaint):
        convert_variables(variables, origin="file")


def test_empty_tensors_are_no_weights(variables: dict[str, np.ndarray]) -> None:
    variables["moat/logits_head/kernel"] = np.zeros((1, 1, 96, 0), dtype=np.float32)
    with pytest.raises(CheckpointError, match=r"logits_head/kernel has shape \[1, 1, 96, 0\]"):
        convert_variables(variables)


@pytest.mark.parametrize("dtype", [np.int32, np.complex64, np.longdouble, object])
def test_weights_are_floats(variables: dict[str, np.ndarray], dtype: Any) -> None:
    variables["moat/stem/conv_0/bias"] = variables["moat/stem/conv_0/bias"].astype(dtype)
    with pytest.raises(CheckpointError, match=r"stem/conv_0/bias has dtype .*, expected float16"):
        convert_variables(variables)


def test_parts_that_do_not_belong_together() -> None:
    variables = block_variables("moat", attention=True) | block_variables("moat")
    with pytest.raises(CheckpointError, match="both squeeze-and-excitation and attention"):
        convert_variables(variables)
    variables = block_variables("mbconv", in_channels=32, channels=32)
    variables["mbconv/shortcut_conv/kernel"] = np.zeros((1, 1, 32, 32), dtype=np.float32)
    variables["mbconv/shortcut_conv/bias"] = np.zeros(32, dtype=np.float32)
    with pytest.raises(CheckpointError, match="the block keeps its 32 channels"):
        convert_variables(variables)


def test_convert_parameter(variables: dict[str, np.ndarray]) -> None:
    state_dict = convert_variables(variables).state_dict
    for parameter, tensor in state_dict.items():
        arrays = [variables[name] for name in official_names(parameter)]
        assert torch.equal(convert_parameter(parameter, arrays), tensor)
    with pytest.raises(
        CheckpointError, match=r"'attention\.qkv\.bias' is made of 3 arrays, 1 were"
    ):
        convert_parameter("attention.qkv.bias", [np.zeros((1, 32))])
