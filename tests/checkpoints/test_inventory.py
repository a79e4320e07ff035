"""Which names in a checkpoint are used, which are skipped and why, and which are refused."""

from __future__ import annotations

import time

import pytest

from moat_kernels.checkpoints import CheckpointError
from moat_kernels.checkpoints.inventory import Inventory, find_places, take_inventory
from moat_kernels.checkpoints.names import OFFICIAL
from moat_kernels.checkpoints.rules import Place

AVERAGE = "/ExponentialMovingAverage"
GAMMA = "moat/stem/norm_0/gamma"


def take(*names: str, ema: bool = False) -> Inventory:
    return take_inventory(names, ema=ema, origin="file")


def test_every_name_is_used_or_skipped_with_a_reason() -> None:
    inventory = take(
        GAMMA,
        GAMMA + AVERAGE,
        GAMMA + "/Adam_1",
        GAMMA + "/Momentum" + AVERAGE,
        "global_step",
        "decoder/conv/kernel",
    )
    assert inventory.raw == {"stem/norm_0/gamma": GAMMA}
    assert inventory.skipped == {
        GAMMA + AVERAGE: "average, the raw value is taken",
        GAMMA + "/Adam_1": "optimizer slot",
        GAMMA + "/Momentum" + AVERAGE: "optimizer slot",
        "global_step": "not a variable of MOAT",
        "decoder/conv/kernel": "not a variable of MOAT",
    }


def test_averages_are_taken_where_they_exist() -> None:
    inventory = take(GAMMA, GAMMA + AVERAGE, "moat/stem/norm_0/beta", ema=True)
    assert inventory.key("stem/norm_0/gamma") == GAMMA + AVERAGE
    assert inventory.key("stem/norm_0/beta") == "moat/stem/norm_0/beta"
    assert inventory.key("stem/norm_0/moving_mean") is None
    assert inventory.skipped == {GAMMA: "raw value, the average is taken"}


def test_a_suffix_of_eager_names_is_ignored() -> None:
    inventory = take(GAMMA + ":0", GAMMA + AVERAGE + ":0")
    assert inventory.raw == {"stem/norm_0/gamma": GAMMA + ":0"}
    assert inventory.averages == {"stem/norm_0/gamma": GAMMA + AVERAGE + ":0"}


def test_a_missing_raw_value_points_to_its_average() -> None:
    with pytest.raises(CheckpointError, match=f"file: {GAMMA} is missing .only its average exists"):
        take(GAMMA + AVERAGE).required_key("stem/norm_0/gamma")


@pytest.mark.parametrize(
    ("names", "complaint"),
    [
        (["global_step", "layer/kernel"], "no variable of MOAT .* among its 2 names"),
        ([], "no variable of MOAT"),
        ([GAMMA, GAMMA + ":0"], f"{GAMMA} and {GAMMA}:0 are the same variable"),
        ([GAMMA, "mbconv/pre_norm/gamma"], "mbconv/pre_norm/gamma is there beside .* moat/"),
        ([GAMMA, "moat/stem/norm_1/gamma"], "norm_1/gamma is not a variable that MOAT"),
        (
            ["model/stem/.ATTRIBUTES/VARIABLE_VALUE"],
            "of an object-based TensorFlow 2 checkpoint, .* load_tensorflow reads",
        ),
    ],
)
def test_names_that_are_no_checkpoint_of_moat(names: list[str], complaint: str) -> None:
    with pytest.raises(CheckpointError, match=f"^file: .*{complaint}"):
        take(*names)


def test_a_name_of_many_parts_costs_no_time() -> None:
    start = time.process_time()
    with pytest.raises(CheckpointError, match="is not a variable that MOAT is known to have"):
        take(f"moat/{'a/' * 200_000}kernel")
    assert time.process_time() - start < 1


def test_averages_that_do_not_exist_cannot_be_asked_for() -> None:
    with pytest.raises(
        CheckpointError, match="ema=True, but it has no exponential moving averages"
    ):
        take(GAMMA, ema=True)


def test_places_of_a_model_include_what_must_be_there() -> None:
    inventory = take("moat/block_01_02/pre_norm/gamma", "moat/logits_head/bias")
    blocks = [
        Place("block", OFFICIAL, stage, index) for stage, index in [(0, 0), (1, 0), (1, 1), (1, 2)]
    ]
    last_stages = [Place("block", OFFICIAL, stage, 0) for stage in (2, 3)]
    assert find_places(inventory) == [
        Place("stem", OFFICIAL),
        *blocks,
        *last_stages,
        Place("head", OFFICIAL),
    ]


def test_places_of_a_single_block() -> None:
    assert find_places(take("mbconv/pre_norm/gamma")) == [Place("single", OFFICIAL)]


def test_a_fifth_stage_and_mixtures_are_refused() -> None:
    with pytest.raises(CheckpointError, match="moat/block_04_00/: MOAT has only 4 stages"):
        find_places(take("moat/block_04_00/pre_norm/gamma"))
    with pytest.raises(CheckpointError, match="whole model beside those of a single block"):
        find_places(take(GAMMA, "moat/pre_norm/gamma"))
