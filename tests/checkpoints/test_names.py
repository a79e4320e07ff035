"""Official names and ours: both directions of the one table."""

from __future__ import annotations

import pytest

from moat_kernels.checkpoints import CheckpointError, official_names
from moat_kernels.checkpoints.names import OFFICIAL, find_parameter
from moat_kernels.checkpoints.rules import Place


@pytest.mark.parametrize(
    ("parameter", "names"),
    [
        ("stem.conv_0.weight", ["moat/stem/conv_0/kernel"]),
        ("stem.norm_0.running_var", ["moat/stem/norm_0/moving_variance"]),
        ("stages.0.0.se.reduce.bias", ["moat/block_00_00/se/reduce_conv2d/bias"]),
        ("stages.1.0.shortcut_conv.weight", ["moat/block_01_00/shortcut_conv/kernel"]),
        ("stages.1.0.pre_norm.num_batches_tracked", []),
        ("stages.2.13.depthwise_conv.weight", ["moat/block_02_13/depthwise_conv/depthwise_kernel"]),
        ("stages.3.1.attention_norm.bias", ["moat/block_03_01/attention_norm/beta"]),
        ("stages.3.1.attention.qkv.bias", [f"moat/block_03_01/attention/{x}/bias" for x in "qkv"]),
        ("stages.3.1.attention.proj.weight", ["moat/block_03_01/attention/o/weight"]),
        ("final_layer_norm.weight", ["moat/final_layer_norm/gamma"]),
        ("logits_head.bias", ["moat/logits_head/bias"]),
        ("expand_norm.weight", ["moat/expand_norm/gamma"]),
    ],
)
def test_official_names(parameter: str, names: list[str]) -> None:
    assert list(official_names(parameter)) == names


def test_official_names_of_a_single_block() -> None:
    assert official_names("se.expand.weight", scope="mbconv") == ("mbconv/se/expand_conv2d/kernel",)


@pytest.mark.parametrize(
    "parameter",
    ["", "stem.pre_norm.weight", "stages.1.pre_norm.weight", "stages.01.0.pre_norm.weight", "head"],
)
def test_unknown_parameters(parameter: str) -> None:
    with pytest.raises(CheckpointError, match=f"no parameter '{parameter}'"):
        official_names(parameter)


def test_both_directions_agree_for_every_rule() -> None:
    places = [Place(kind, OFFICIAL) for kind in ("stem", "head", "single")]
    for place in (*places, Place("block", OFFICIAL, 2, 13)):
        for rule in place.section.rules:
            assert find_parameter(place.parameter_prefix + rule.parameter) == (place, rule)
            for variable in rule.variables:
                assert OFFICIAL.find_variable(place.variable_prefix + variable) == (place, rule)


@pytest.mark.parametrize(
    "variable", ["", "stem", "block_2_1/pre_norm/gamma", "block_00_00/nothing", "stem/se/x", "a\nb"]
)
def test_unknown_variables(variable: str) -> None:
    assert OFFICIAL.find_variable(variable) is None
