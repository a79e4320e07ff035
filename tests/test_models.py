"""The family: sizes, endpoints, schedules, groups, and the ways to change a model."""

from __future__ import annotations

import pytest
import torch
from support.tolerances import BACKEND_OUTPUT, assert_close

import moat_kernels as mk
from moat_kernels.models import MOAT

# Trainable parameters with and without position embedding, 1000 classes: official moat_test.py.
PARAMETERS = {
    "moat_0": (27_846_892, 27_777_544),
    "moat_1": (41_598_448, 41_467_864),
    "moat_2": (73_422_408, 73_248_296),
    "moat_3": (189_958_040, 189_536_280),
    "moat_4": (483_214_184, 482_539_368),
    "tiny_moat_0": (3_355_348, 3_332_232),
    "tiny_moat_1": (5_122_895, 5_094_000),
    "tiny_moat_2": (9_772_741, 9_732_288),
    "tiny_moat_3": (19_534_390, 19_476_600),
}
SMALL = {"stem_width": 8, "widths": (8, 16, 32, 64), "depths": (1, 2, 2, 1)}


def small_model(**options) -> MOAT:
    return mk.create_model("tiny_moat_0", **{**SMALL, "num_classes": 10, **options})


def test_list_models() -> None:
    assert mk.list_models() == list(PARAMETERS)


@pytest.mark.parametrize("position_embedding", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("name", PARAMETERS)
def test_official_parameter_counts(name: str, position_embedding: bool) -> None:
    with torch.device("meta"):
        model = mk.create_model(name, position_embedding=position_embedding)
    count = sum(parameter.numel() for parameter in model.parameters())
    assert count == PARAMETERS[name][0 if position_embedding else 1]


def test_endpoints() -> None:
    model = small_model(features_only=True).eval()
    with torch.no_grad():
        endpoints = model(torch.randn(2, 3, 70, 64))
    names = [f"{kind}{number}" for number in range(1, 6) for kind in ("stage", "res")]
    assert list(endpoints) == names
    sizes = {1: (8, 35, 32), 2: (8, 18, 16), 3: (16, 9, 8), 4: (32, 5, 4), 5: (64, 3, 2)}
    for number, size in sizes.items():
        assert endpoints[f"stage{number}"].shape == (2, *size)
        gelu = torch.nn.functional.gelu(endpoints[f"stage{number}"])
        assert torch.equal(endpoints[f"res{number}"], gelu)


def test_endpoints_have_the_memory_format_of_the_input() -> None:
    model = small_model(features_only=True).eval()
    x = torch.randn(2, 3, 64, 64)
    for memory_format in (torch.contiguous_format, torch.channels_last):
        for output in model(x.contiguous(memory_format=memory_format)).values():
            assert output.is_contiguous(memory_format=memory_format)


@pytest.mark.parametrize(
    "options",
    [
        {"window_size": (None, None, 3, (2, 1))},
        {"window_size": (None, None, (5, 7), 2), "global_attention_at_end": True},
        {"position_embedding": False, "pool_size": 3},
    ],
    ids=["windows", "mixed windows", "no bias"],
)
def test_fused_equals_reference_on_any_size(options: dict) -> None:
    reference, fused = (small_model(fused=fused, **options).double() for fused in (False, True))
    fused.load_state_dict(reference.state_dict())
    x = torch.randn(2, 3, 75, 90, dtype=torch.float64)
    assert_close(fused(x), reference(x), BACKEND_OUTPUT[torch.float64])
    reference.eval(), fused.eval()
    assert_close(fused(x), reference(x), BACKEND_OUTPUT[torch.float64])


def test_global_attention_at_end() -> None:
    model = small_model(window_size=(None, None, 4, 2), global_attention_at_end=True)
    windows = [
        [block.attention.description.window_size for block in stage] for stage in model.stages[2:]
    ]
    assert windows == [[(4, 4), None], [None]]


def test_drop_path_schedule() -> None:
    """Block i of n survives with 1 - rate * i / n: moat_0 ends at 1 - 0.2 * 13 / 14 = 0.8143."""
    with torch.device("meta"):
        model = mk.create_model("moat_0")
    rates = [block.drop_path.probability for stage in model.stages for block in stage]
    assert rates == [pytest.approx(0.2 * index / 14) for index in range(14)]
    assert 1 - rates[-1] == pytest.approx(0.8143, abs=1e-4)


def test_drop_path_drops_samples_and_keeps_the_mean() -> None:
    block = mk.FusedMBConv(8, 8, drop_path=0.5)
    x = torch.randn(1, 8, 4, 4).expand(2000, -1, -1, -1)
    residual = block(x) - x
    dropped = (residual == 0).flatten(1).all(1)
    assert 0.45 < float(dropped.float().mean()) < 0.55
    kept = residual[~dropped]
    block.drop_path.probability = 0.0
    assert_close(kept / 2, (block(x) - x)[~dropped], 1e-4)


def test_initialisation_is_a_plain_normal() -> None:
    model = mk.create_model("tiny_moat_0", fused=True)
    weights = torch.cat([p.flatten() for p in model.parameters() if p.dim() > 1])
    assert weights.std().item() == pytest.approx(0.02, rel=1e-2)
    assert weights.abs().max().item() > 4 * 0.02  # not truncated
    block = model.stages[2][0]
    assert not block.shrink_conv.bias.any() and not block.attention.qkv.bias.any()
    assert torch.equal(block.expand_norm.weight, torch.ones(512))


def test_official_settings() -> None:
    model = mk.create_model("tiny_moat_0")
    assert model.final_layer_norm.eps == 1e-5
    block = model.stages[3][0]
    assert block.attention_norm.eps == 1e-5
    assert (block.expand_norm.eps, block.expand_norm.momentum) == (1e-3, 0.01)
    assert block.attention.relative_position_embedding.shape == (8, 13, 13)
    assert model.stages[0][0].se.reduce.out_channels == 8  # a quarter of the output width
    assert block.se is None


def test_preprocessing() -> None:
    small, large = mk.get_preprocessing("tiny_moat_1"), mk.get_preprocessing("moat_3")
    assert (small.mean, small.resolution) == ((0.485, 0.456, 0.406), 256)
    assert (large.mean, large.std, large.resolution) == ((0.5,) * 3, (0.5,) * 3, 512)


def test_reset_classifier() -> None:
    model = small_model().double()
    x = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    model.reset_classifier(7)
    assert model(x).shape == (2, 7)
    assert model.get_classifier().out_features == 7
    model.reset_classifier(0)
    assert model(x).shape == (2, 64)
    with pytest.raises(ValueError, match="features_only"):
        small_model(features_only=True).reset_classifier(3)


def test_parameter_groups() -> None:
    model = small_model()
    groups = model.parameter_groups(lr=1.0, weight_decay=0.05, layer_decay=0.5)
    names = [name for group in groups for name in group["names"]]
    assert sorted(names) == sorted(name for name, _ in model.named_parameters())
    rates = {name: group["lr"] for group in groups for name in group["names"]}
    assert rates["logits_head.weight"] == 1.0
    assert rates["stages.3.0.expand_conv.weight"] == 0.5
    assert rates["stem.conv_0.weight"] == 0.5**5
    undecayed = {n for group in groups if group["weight_decay"] == 0 for n in group["names"]}
    assert undecayed == model.no_weight_decay()
    assert "stages.2.0.attention.relative_position_embedding" in undecayed
    assert "stages.2.0.attention.qkv.weight" not in undecayed
    torch.optim.AdamW(groups)


@pytest.mark.parametrize("recompute", ["none", "expand", "block"])
def test_recompute_reaches_every_block(recompute: str) -> None:
    model = small_model(recompute=recompute)
    assert {block.recompute for stage in model.stages for block in stage} == {recompute}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"widths": (8, 16)}, "widths must have 4 entries"),
        ({"depths": (1, 0, 1, 1)}, "depths must be a positive integer"),
        ({"window_size": 7}, "window_size must be None or have one entry per stage"),
        ({"window_size": (7, None, 7, 7)}, r"window_size\[0\] must be None, got 7"),
        ({"drop_path_rate": 1.0}, "drop_path_rate must be within"),
        ({"num_classes": -1}, "num_classes must be an integer >= 0"),
        ({"recompute": "most"}, "recompute must be one of"),
    ],
)
def test_bad_arguments_are_named(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        small_model(**options)


def test_unknown_names_and_inputs() -> None:
    with pytest.raises(ValueError, match=r"name must be one of moat_0, .*, got 'moat_9'"):
        mk.create_model("moat_9")
    with pytest.raises(ValueError, match=r"x must be \[B, 3, H, W\], got \(2, 1, 64, 64\)"):
        small_model()(torch.zeros(2, 1, 64, 64))
