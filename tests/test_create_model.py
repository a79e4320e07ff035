"""Models made by their checkpoint alone, and what is known of how their images are prepared."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from support.golden import GOLDEN
from support.keras import make_pixels
from support.small_model import make_model
from support.tolerances import BACKEND_OUTPUT, assert_close

import moat_kernels as mk
from moat_kernels.checkpoints import CheckpointError, load_checkpoint, save_safetensors
from moat_kernels.configuration import KERAS
from moat_kernels.preprocessing import Preprocessing
from moat_kernels.variants import VARIANTS

OPTIONS = {**KERAS, "window_size": (None, None, (2, 3), None), "global_attention_at_end": True}


def saved(model: mk.MOAT, path: Path) -> Path:
    save = save_safetensors if path.suffix == ".safetensors" else torch.save
    save(model.state_dict(), path)
    return path


@pytest.mark.parametrize("fused", [False, True], ids=["plain", "fused"])
@pytest.mark.parametrize("name", ["x.safetensors", "x.pth"])
def test_a_file_tells_all_of_its_model(name: str, fused: bool, tmp_path: Path) -> None:
    model = make_model(torch.float32, **OPTIONS).eval()
    again = mk.create_model(checkpoint=saved(model, tmp_path / name), fused=fused).eval()
    assert again.configuration == model.configuration
    x = make_pixels(2, 3, 40, 33)
    with torch.no_grad():
        assert_close(again(x), model(x), BACKEND_OUTPUT[torch.float32])


@pytest.mark.parametrize("wrap", [lambda s: {"state_dict": s}, lambda s: {"model": s, "epoch": 3}])
@pytest.mark.parametrize("name", ["x.bin", "x.pth.tar", "x.ckpt", "x.th"])
def test_state_dicts_within_dicts_under_any_name(name: str, wrap, tmp_path: Path) -> None:
    model = make_model(torch.float32)
    prefixed = {f"module.{key}": tensor for key, tensor in model.state_dict().items()}
    torch.save(wrap(prefixed), tmp_path / name)
    again = mk.create_model(checkpoint=tmp_path / name)
    assert again.configuration == model.configuration  # by its shapes, and official otherwise
    for key, tensor in model.state_dict().items():
        assert torch.equal(again.state_dict()[key], tensor), key


def test_official_checkpoints() -> None:
    model = mk.create_model(checkpoint=GOLDEN / "ckpt_small")
    assert model.num_classes == 10
    assert model.configuration["position_embedding"]
    assert model.get_classifier().weight.any()


def test_what_is_given_goes_before_what_the_file_tells(tmp_path: Path) -> None:
    path = saved(make_model(torch.float32, **OPTIONS), tmp_path / "x.safetensors")
    windows = (None, None, 3, None)
    model = mk.create_model(checkpoint=path, in_chans=5, window_size=windows, output_stride=16)
    assert model.configuration["window_size"] == (None, None, (3, 3), None)
    assert model(torch.rand(1, 5, 32, 32)).shape == (1, 5)
    with pytest.raises(CheckpointError, match="build it with pool_size=3"):
        mk.create_model(checkpoint=path, pool_size=2)
    with pytest.raises(CheckpointError, match=r"x\.safetensors: num_classes must be an integer"):
        mk.create_model(checkpoint=path, num_classes=-1)


def test_backbones_of_classifiers_and_of_backbones(tmp_path: Path) -> None:
    maps = {"features_only": True, "out_indices": (1, 3)}
    classifier = saved(make_model(torch.float32, **OPTIONS), tmp_path / "classifier.pth")
    backbone = mk.create_model(checkpoint=classifier, **maps)
    assert backbone.channels() == [8, 32]
    path = saved(backbone, tmp_path / "backbone.safetensors")  # without the last stage
    again = mk.create_model(checkpoint=path, **maps)
    assert again.configuration == backbone.configuration
    with pytest.raises(CheckpointError, match="does not fit the model"):
        mk.create_model(checkpoint=path, features_only=True)
    torch.save(dict(backbone.state_dict()), tmp_path / "bare.pth")
    with pytest.raises(CheckpointError, match="3 of a MOAT's 4 stages and tells no widths"):
        mk.create_model(checkpoint=tmp_path / "bare.pth", **maps)


def test_channels_are_turned_for_models_of_the_other_order(tmp_path: Path) -> None:
    model = make_model(torch.float32, **OPTIONS).eval()
    path = saved(model, tmp_path / "x.safetensors")
    rgb = mk.create_model(checkpoint=path, channel_order="rgb").eval()
    by_state_dict = make_model(torch.float32, **{**OPTIONS, "channel_order": "rgb"}).eval()
    with pytest.warns(UserWarning, match="channel_order was 'bgr', is 'rgb': the channels of"):
        by_state_dict.load_state_dict(model.state_dict())
    x = make_pixels(2, 3, 40, 33)
    with torch.no_grad():
        for turned in (rgb, by_state_dict):
            assert_close(turned(x.flip(1)), model(x), BACKEND_OUTPUT[torch.float32])
    report = load_checkpoint(by_state_dict, path)
    assert report.adapted == [
        "channel_order was 'bgr', is 'rgb': the channels of the first convolution are turned round"
    ]


@pytest.mark.parametrize("option", ["se_activation", "layer_norm_eps", "pixel_scaling"])
def test_other_functions_are_refused(option: str, tmp_path: Path) -> None:
    path = saved(make_model(torch.float32, **OPTIONS), tmp_path / "x.safetensors")
    official = {**OPTIONS, option: make_model().configuration[option]}
    model = make_model(torch.float32, **official)
    complaint = f"{option} is .* for these weights.*build it with {option}={OPTIONS[option]!r}"
    with pytest.raises(CheckpointError, match=complaint):
        load_checkpoint(model, path)
    report = load_checkpoint(model, path, fine_tune=True)
    assert report.adapted[0].startswith(
        f"{option} was {OPTIONS[option]!r}, is {official[option]!r}"
    )


def test_files_that_say_nothing_of_these_options_are_official(tmp_path: Path) -> None:
    state_dict = make_model(torch.float32).state_dict()
    for option in ("se_activation", "layer_norm_eps", "pixel_scaling", "channel_order"):
        del state_dict._metadata[""]["moat"][option]
    save_safetensors(state_dict, tmp_path / "x.safetensors")
    assert mk.create_model(checkpoint=tmp_path / "x.safetensors").configuration == (
        make_model().configuration
    )
    other = make_model(torch.float32, se_activation="gelu")
    with pytest.raises(CheckpointError, match="build it with se_activation='silu'"):
        load_checkpoint(other, tmp_path / "x.safetensors")


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (lambda s: s.pop("stem.conv_0.weight"), r"stem.conv_0.weight \[width, channels, 3, 3\] is"),
        (lambda s: s.update({"stem.conv_1.weight": torch.zeros(9, 8, 3, 3)}), r"is \[9, 8, 3, 3\]"),
        (
            lambda s: s.update({"stages.0.0.shrink_conv.weight": torch.zeros(())}),
            r"stages.0.0.shrink_conv.weight \[.*\] is \[\]",
        ),
        (lambda s: s.update({"logits_head.weight": torch.zeros(5, 63)}), r"is \[5, 63\]"),
        (lambda s: s.pop("stages.1.0.shrink_conv.weight"), "1 of a MOAT's 4 stages"),
        (
            lambda s: s.pop("stages.3.0.expand_conv.weight"),
            "missing in the file: stages.3.0.expand",
        ),
    ],
)
def test_weights_that_are_no_moats(change, complaint: str, tmp_path: Path) -> None:
    state_dict = dict(make_model(torch.float32).state_dict())
    change(state_dict)
    torch.save(state_dict, tmp_path / "x.pth")
    with pytest.raises(CheckpointError, match=complaint):
        mk.create_model(checkpoint=tmp_path / "x.pth")


@pytest.mark.parametrize(
    "told",
    [
        {"window_size": 3},
        {"window_size": [None, None, "a", None]},
        {"layer_norm_eps": "small"},
        {"se_activation": []},
        {"output_stride": 7},
        {"pool_size": None},
        {"preprocessing": {"resolution": -3}},
        {"preprocessing": {"colour": "blue"}},
        {"preprocessing": 448},
        {"preprocessing": {"mean": [0, 0], "resolution": 3}},
        {"rotation": 90},
    ],
    ids=str,
)
def test_files_that_tell_what_cannot_be(told: dict, tmp_path: Path) -> None:
    state_dict = make_model(torch.float32).state_dict()
    state_dict._metadata[""]["moat"].update(told)
    save_safetensors(state_dict, tmp_path / "x.safetensors")
    with pytest.raises(CheckpointError, match=r"x\.safetensors: "):
        mk.create_model(checkpoint=tmp_path / "x.safetensors")


def test_neither_name_nor_checkpoint() -> None:
    with pytest.raises(ValueError, match="name must be given, or a checkpoint"):
        mk.create_model(num_classes=3)


def test_preprocessing_travels_with_the_weights(tmp_path: Path) -> None:
    model = make_model(torch.float32, **OPTIONS)
    told = replace(mk.get_preprocessing(model), resolution=448, crop_mode="border", crop_pct=1.0)
    model.describe_images(told)
    path = saved(model, tmp_path / "x.safetensors")
    again = mk.create_model(checkpoint=path)
    assert mk.get_preprocessing(again) == told
    assert (told.mean, told.std, told.channel_order) == ((0,) * 3, (1 / 255,) * 3, "bgr")
    assert mk.get_preprocessing(mk.create_model(checkpoint=path, channel_order="rgb")) == replace(
        told, channel_order="rgb"
    )


def test_preprocessing_of_variants_and_of_nothing_known(tmp_path: Path) -> None:
    name = "tiny_moat_0"
    official = mk.get_preprocessing(name)
    assert mk.get_preprocessing(mk.create_model(name)) == official
    assert (official.resolution, official.channel_order) == (256, "rgb")
    bgr = mk.get_preprocessing(mk.create_model(name, channel_order="bgr"))
    assert (bgr.mean, bgr.std) == (official.mean[::-1], official.std[::-1])
    torch.save(dict(mk.create_model(name).state_dict()), tmp_path / "official.pth")
    again = mk.create_model(checkpoint=tmp_path / "official.pth")  # the sizes of a variant
    assert mk.get_preprocessing(again) == official
    torch.save(dict(make_model().state_dict()), tmp_path / "unknown.pth")
    with pytest.raises(ValueError, match="must be the name of a variant, or a MOAT that was made"):
        mk.get_preprocessing(mk.create_model(checkpoint=tmp_path / "unknown.pth"))


@pytest.mark.parametrize(
    "odd",
    [{"crop_mode": "squash"}, {"mean": (0.5,), "std": (0.5,)}, {"input_size": (3, None, None)}],
    ids=str,
)
def test_other_words_for_preprocessing_harm_nothing_else(odd: dict) -> None:
    model = mk.create_model("tiny_moat_0", depths=(1, 1, 1, 1))
    model.pretrained_cfg.update(odd)
    with pytest.raises(ValueError, match="must be"):
        mk.get_preprocessing(model)
    assert "preprocessing" not in model.state_dict()._metadata[""]["moat"]


@pytest.mark.parametrize(
    "field",
    [
        {"mean": (0.5, 0.5)},
        {"std": (0.5, 0.5, 0.0)},
        {"mean": (0.5, 0.5, float("nan"))},
        {"resolution": 0},
        {"channel_order": "grb"},
        {"crop_mode": "squash"},
        {"crop_pct": 1.5},
        {"interpolation": "nearest"},
    ],
    ids=str,
)
def test_preprocessing_that_cannot_be(field: dict) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(field))} must be"):
        Preprocessing(**{"mean": (0.5,) * 3, "std": (0.5,) * 3, "resolution": 224, **field})


@pytest.mark.parametrize("in_chans", [1, 4, 13])
@pytest.mark.parametrize("name", VARIANTS)
def test_any_number_of_channels(name: str, in_chans: int) -> None:
    with torch.device("meta"):
        model = mk.create_model(name, in_chans=in_chans)
    assert model.stem.conv_0.weight.shape[1] == in_chans
