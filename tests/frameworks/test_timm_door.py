"""timm.create_model("moat_0") and its like: moat_kernels' own models, as timm wants them."""

from __future__ import annotations

import argparse
import copy
import importlib
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from support.peers import import_peer
from support.small_model import make_model
from torch import Tensor, nn

import moat_kernels as mk
from moat_kernels.variants import VARIANTS

timm = import_peer("timm")
import_peer("timm.optim")
import_peer("moat_kernels.timm")

SMALL = {"stem_width": 8, "widths": (8, 16, 32, 64), "depths": (1, 2, 2, 1)}
IMAGE = (1, 3, 64, 64)
OFFICIAL = Path(__file__).parents[1] / "golden" / "ckpt_small"


def make(name: str = "tiny_moat_0", seed: int = 0, **options) -> mk.MOAT:
    torch.manual_seed(seed)
    return timm.create_model(name, **{**SMALL, **options})


def same_weights(one: nn.Module, other: nn.Module) -> bool:
    names, others = one.state_dict(), other.state_dict()
    return names.keys() == others.keys() and all(
        torch.equal(names[name], others[name]) for name in names
    )


def test_both_doors_lead_to_the_same_model() -> None:
    assert timm.list_models("*moat*") == mk.list_models()
    model = make("moat_0", num_classes=7, drop_path_rate=0.3, in_chans=1, drop_rate=0.0)
    torch.manual_seed(0)
    own = mk.create_model("moat_0", **SMALL, num_classes=7, drop_path_rate=0.3, in_chans=1)
    assert type(model) is type(own) is mk.MOAT
    assert (model.num_classes, model.in_chans, model.num_features) == (7, 1, 64)
    assert same_weights(model, own)
    assert model.stages[3][0].drop_path.probability == own.stages[3][0].drop_path.probability > 0
    x = torch.randn(1, 1, 64, 64)
    assert torch.equal(model.eval()(x), own.eval()(x))


@pytest.mark.parametrize("name", VARIANTS)
def test_images_are_prepared_as_the_official_ones(name: str) -> None:
    preprocessing = mk.get_preprocessing(name)
    size = preprocessing.resolution
    for features_only in (False, True):
        by_timm, own = make(name, features_only=features_only), mk.create_model(name, **SMALL)
        for model in (by_timm, own, mk.freeze(own.eval())):
            found = timm.data.resolve_model_data_config(model)
            assert found == timm.data.resolve_data_config({}, model=model)
            assert (found["mean"], found["std"]) == (preprocessing.mean, preprocessing.std)
            assert found["input_size"] == (3, size, size)
            assert (found["crop_pct"], found["interpolation"]) == (0.875, "bicubic")
    cfg = timm.get_pretrained_cfg(name)
    assert (cfg.first_conv, cfg.classifier, cfg.url) == ("stem.conv_0", "logits_head", None)
    assert not cfg.fixed_input_size and not timm.is_model_pretrained(name)


@pytest.mark.parametrize("out_indices", [(1, 3), (-1, 0), 2, None], ids=str)
def test_features(out_indices) -> None:
    model = make(features_only=True, out_indices=out_indices, output_stride=16).eval()
    levels = {None: [0, 1, 2, 3, 4], 2: [3, 4], (1, 3): [1, 3], (-1, 0): [4, 0]}[out_indices]
    assert type(model) is mk.MOAT and len(model.stages) == max(levels)
    info, strides = model.feature_info, [2, 4, 8, 16, 16]
    assert info.channels() == model.channels() == [[8, 8, 16, 32, 64][level] for level in levels]
    assert info.reduction() == model.strides() == [strides[level] for level in levels]
    assert info.module_name() == [f"stages.{level - 1}" if level else "stem" for level in levels]
    assert [entry["index"] for entry in info.get_dicts()] == levels == list(info.out_indices)
    assert (model.num_classes, model.pretrained_cfg["architecture"]) == (0, "tiny_moat_0")
    torch.manual_seed(0)
    options = {"features_only": True, "out_indices": levels, "output_stride": 16}
    own = mk.create_model("tiny_moat_0", **SMALL, **options).eval()
    x = torch.randn(IMAGE)
    with torch.no_grad():
        assert all(map(torch.equal, model(x), own(x)))
        frozen = mk.freeze(model)
        maps: list[Tensor] = frozen(x)
    assert frozen.feature_info.channels() == [each.shape[1] for each in maps]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"pretrained": True},
            "no weights of tiny_moat_0 .* pretrained_cfg_overlay.* checkpoint_path",
        ),
        ({"global_pool": "max"}, "global_pool must be 'avg', got 'max'"),
        ({"drop_rate": 0.1}, "drop_rate must be 0"),
        ({"features_only": True, "feature_cls": "hook"}, "feature_cls must be None.* got 'hook'"),
        ({"features_only": True, "out_indices": (5,)}, "out_indices must be levels from 0"),
        ({"features_only": True, "out_indices": 6}, "out_indices must be levels from 0"),
        ({"output_stride": 4}, "output_stride must be one of"),
    ],
    ids=str,
)
def test_what_it_has_not_is_said(options: dict, message: str) -> None:
    with pytest.raises((ValueError, RuntimeError), match=message):
        make(**options)


@pytest.mark.parametrize("form", ["pth", "safetensors"])
def test_checkpoints(form: str, tmp_path) -> None:
    source = make_model(torch.float32, depths=SMALL["depths"], num_classes=1000)
    path = tmp_path / f"moat.{form}"
    if form == "pth":
        torch.save({"state_dict": source.state_dict(), "epoch": 3}, path)
    else:
        mk.checkpoints.save_safetensors(source.state_dict(), path)
    given = {"pretrained": True, "pretrained_cfg_overlay": {"file": str(path)}}
    assert same_weights(make(checkpoint_path=path), source)
    assert same_weights(make(**given), source)
    assert same_weights(make(checkpoint=path), source)
    other = make(**given, num_classes=7, in_chans=1)
    assert other.logits_head.weight.shape[0] == 7
    assert torch.equal(
        other.stages[3][0].attention.qkv.weight, source.stages[3][0].attention.qkv.weight
    )
    grey = source.stem.conv_0.weight.sum(1, keepdim=True)
    assert torch.equal(other.stem.conv_0.weight, grey)
    backbone = make(**given, features_only=True, out_indices=(1, 2))
    assert torch.equal(
        backbone.stages[1][0].expand_conv.weight, source.stages[1][0].expand_conv.weight
    )
    with pytest.raises(mk.checkpoints.CheckpointError, match="pool_size is 2 for these weights"):
        make(**given, pool_size=3)


@pytest.mark.parametrize("averages", [False, True], ids=["alone", "with averages"])
def test_checkpoints_of_its_train_script(averages: bool, tmp_path) -> None:
    """By its saver; of a model and its moving average timm takes the average, and so do we."""
    utils = import_peer("timm.utils")
    model = make(num_classes=5)
    average = utils.ModelEmaV3(make(num_classes=5, seed=1)) if averages else None
    saver = utils.CheckpointSaver(
        model,
        timm.optim.create_optimizer_v2(model, "adamw", lr=0.1),
        args=argparse.Namespace(model="tiny_moat_0", lr=0.1),
        model_ema=average,
        checkpoint_dir=str(tmp_path),
        recovery_dir=str(tmp_path),
    )
    saver.save_checkpoint(epoch=0, metric=1.0)
    path = str(tmp_path / "last.pth.tar")
    expected = average.module if average else model
    given = {"pretrained": True, "pretrained_cfg_overlay": {"file": path, "num_classes": -1}}
    assert same_weights(make(**given, num_classes=5), expected)
    assert same_weights(make(checkpoint_path=path, num_classes=5), expected)
    other = make(**given, num_classes=7)
    assert torch.equal(other.stem.conv_0.weight, expected.stem.conv_0.weight)


def test_official_checkpoints() -> None:
    expected = mk.checkpoints.load_tensorflow(OFFICIAL).state_dict
    shape = {"stem_width": 16, "widths": (16, 32, 64, 96), "depths": (1, 2, 2, 1)}
    given = {"pretrained": True, "pretrained_cfg_overlay": {"file": str(OFFICIAL)}}
    for options in ({"num_classes": 10}, {"features_only": True}):
        found = make(**shape, **given, **options).state_dict()
        assert all(torch.equal(tensor, expected[name]) for name, tensor in found.items())


@pytest.mark.parametrize("options", [{}, {"features_only": True, "out_indices": (0, 2)}], ids=str)
def test_what_timm_saves_it_loads(options: dict, tmp_path) -> None:
    hub = import_peer("timm.models")
    saved = make(num_classes=7)
    hub.save_for_hf(saved, tmp_path, safe_serialization=True)
    loaded = timm.create_model(f"local-dir:{tmp_path}", pretrained=True, **options)
    expected = saved.state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in loaded.state_dict().items())
    assert timm.data.resolve_model_data_config(loaded)["input_size"] == (3, 256, 256)
    weights = {name: tensor for name, tensor in expected.items() if "conv_1" not in name}
    overlay = {"state_dict": weights, "num_classes": 7}
    with pytest.raises(RuntimeError, match="the weights lack 2 tensors of the model"):
        make(pretrained=True, pretrained_cfg_overlay=overlay, **options)


@pytest.mark.parametrize("in_chans", [1, 2, 4, 13])
def test_first_convolutions_are_adapted_as_timm_does(in_chans: int, tmp_path) -> None:
    source = make(num_classes=7)
    torch.save(source.state_dict(), tmp_path / "x.pth")
    adapted = make(checkpoint=tmp_path / "x.pth", num_classes=7, in_chans=in_chans)
    expected = import_peer("timm.models").adapt_input_conv(in_chans, source.stem.conv_0.weight)
    torch.testing.assert_close(adapted.stem.conv_0.weight, expected)


def test_what_timm_knows_of_models_that_scale_pixels(tmp_path) -> None:
    keras = {"num_classes": 7, "pixel_scaling": True, "channel_order": "bgr"}
    model = make(**keras)
    config = timm.data.resolve_model_data_config(model)
    assert (config["mean"], config["std"]) == ((0.0,) * 3, (1 / 255,) * 3)
    assert mk.get_preprocessing(model).channel_order == "bgr"
    official = mk.get_preprocessing("tiny_moat_0")
    assert mk.get_preprocessing(make(channel_order="bgr")).mean == official.mean[::-1]
    told = replace(mk.get_preprocessing(model), resolution=128, crop_mode="border")
    model.describe_images(told)
    path = tmp_path / "x.safetensors"
    mk.checkpoints.save_safetensors(model.state_dict(), path)
    given = {"pretrained": True, "pretrained_cfg_overlay": {"file": str(path)}}
    assert mk.get_preprocessing(make(**given, **keras)) == told  # as the file says
    given["pretrained_cfg_overlay"]["crop_mode"] = "center"  # as the user says
    assert mk.get_preprocessing(make(**given, **keras)) == replace(told, crop_mode="center")
    given["pretrained_cfg_overlay"]["crop_mode"] = "squash"  # for which there is no word here
    assert make(**given, **keras).pretrained_cfg["crop_mode"] == "squash"
    other = timm.create_model("test_resnet")
    assert mk.get_preprocessing(other).mean == other.pretrained_cfg["mean"]
    import_peer("timm.models").save_for_hf(model, tmp_path, safe_serialization=True)
    again = timm.create_model(f"local-dir:{tmp_path}", pretrained=True, **keras)
    assert same_weights(again, model)


def test_layer_decay() -> None:
    """Each block has its rate, deeper ones the larger; the head has the full one."""
    model = make(num_classes=7)
    optimizer = timm.optim.create_optimizer_v2(
        model, "adamw", lr=0.1, weight_decay=0.05, layer_decay=0.5
    )
    scale, decay = {}, {}
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            scale[parameter], decay[parameter] = group["lr_scale"], group["weight_decay"]
    order = ["stem", "stages.0.0", "stages.1.0", "stages.1.1", "stages.2.0", "stages.2.1"]
    order += ["stages.3.0", "final_layer_norm", "logits_head"]
    depths = [*range(8), 7]  # norm and classifier are the head
    undecayed = model.no_weight_decay()
    for name, parameter in model.named_parameters():
        (depth,) = (d for part, d in zip(order, depths, strict=True) if name.startswith(f"{part}."))
        assert scale[parameter] == 0.5 ** (7 - depth)
        assert decay[parameter] == (0.0 if name in undecayed else 0.05)
    coarse = import_peer("timm.models").group_parameters(model, model.group_matcher(coarse=True))
    assert [len(names) for names in coarse.values()] == [
        len([name for name, _ in model.named_parameters() if name.startswith(part)])
        for part in ("stem", "stages.0", "stages.1", "stages.2", "stages.3", ("final", "logits"))
    ]


@pytest.mark.parametrize("options", [{}, {"features_only": True, "out_indices": (1,)}], ids=str)
def test_device_and_dtype(options: dict) -> None:
    """As timm's distillation makes its teacher."""
    model = make(**options, device=torch.device("meta"), dtype=torch.bfloat16)
    kinds = {(tensor.device.type, tensor.dtype) for tensor in model.parameters()}
    assert kinds == {("meta", torch.bfloat16)}
    model = make(**options, device="cpu", dtype=torch.float64)
    torch.testing.assert_close(model.state_dict(), make(**options).double().state_dict())


@pytest.mark.parametrize("task", ["LogitDistillationTask", "FeatureDistillationTask"])
def test_distillation(task: str, tmp_path) -> None:
    """A MOAT is student and, by its name and a file, teacher."""
    teacher, path = mk.create_model("tiny_moat_0", num_classes=5), tmp_path / "teacher.pth"
    torch.save(teacher.state_dict(), path)
    student = make(num_classes=5)
    training = getattr(import_peer("timm.task"), task)(
        student, "tiny_moat_0", teacher_pretrained_path=str(path), verbose=False
    )
    assert same_weights(training.teacher.model, teacher)
    result = training(torch.randn(2, 3, 64, 64), torch.tensor([0, 1]))
    result["loss"].backward()
    assert result["kd_loss"] > 0
    assert all(parameter.grad is not None for parameter in student.parameters())


@pytest.mark.parametrize("fused", [False, True], ids=["plain", "fused"])
def test_a_training_loop_as_timm_writes_it(fused: bool) -> None:
    """Its train script's parts: task, EMA, scaler, clipping, schedule, meters, checkpointing."""
    task, utils = import_peer("timm.task"), import_peer("timm.utils")
    schedules = import_peer("timm.scheduler")
    model = make(num_classes=5, fused=fused, drop_path_rate=0.1)
    model.set_grad_checkpointing(enable=True)
    average = utils.ModelEmaV3(model, decay=0.5)  # which begins at the third step
    before = copy.deepcopy(model)
    optimizer = timm.optim.create_optimizer_v2(
        model, "adamw", lr=0.01, weight_decay=0.05, layer_decay=0.75
    )
    schedule, _ = schedules.create_scheduler_v2(optimizer, "cosine", num_epochs=2, warmup_epochs=0)
    scaler = utils.NativeScaler(device="cpu")
    training = task.ClassificationTask(model, criterion_kwargs={"smoothing": 0.1}, verbose=False)
    training.train()
    images, labels = torch.randn(4, 3, 64, 64), torch.tensor([0, 1, 2, 3])
    losses, correct = utils.AverageMeter(), utils.AverageMeter()
    for step in range(3):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            result = training(images, labels)
        optimizer.zero_grad()
        scaler(
            result["loss"],
            optimizer,
            clip_grad=1.0,
            parameters=timm.models.model_parameters(model),
        )
        average.update(model, step=step)
        losses.update(result["loss"].item(), len(images))
        correct.update(utils.accuracy(result["output"], labels, topk=(1,))[0].item(), len(images))
        schedule.step(step + 1)
    assert losses.count == 12 and 0 < losses.avg < 10
    assert not same_weights(average.module, model) and not same_weights(average.module, before)
    with torch.no_grad():
        assert average.module.eval()(images).isfinite().all()


def test_without_timm_the_door_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)
    monkeypatch.setitem(sys.modules, "timm.models", None)
    monkeypatch.delitem(sys.modules, "moat_kernels.timm")
    with pytest.raises(ImportError, match=r"moat_kernels.timm needs timm, which is missing: pip"):
        importlib.import_module("moat_kernels.timm")
