"""A MOAT as a backbone: which maps, at which strides, of how many input channels."""

from __future__ import annotations

import pytest
import torch
from support.small_model import make_model
from support.tolerances import BACKEND_MODEL_OUTPUT, BACKEND_OUTPUT, assert_close

import moat_kernels as mk
from moat_kernels.checkpoints import load_checkpoint
from moat_kernels.memory import saved_bytes

IMAGE = (2, 3, 70, 64)
WIDTHS = [8, 8, 16, 32, 64]


@pytest.mark.parametrize("frozen", [False, True], ids=["as made", "frozen"])
@pytest.mark.parametrize("out_indices", [(1, 4), (0,), (2, 1, -3)], ids=str)
def test_only_the_maps_asked_for_in_their_order(out_indices: tuple, frozen: bool) -> None:
    whole = make_model(torch.float32, features_only=True).eval()
    model = make_model(torch.float32, features_only=True, out_indices=out_indices).eval()
    model.load_state_dict(whole.state_dict(), strict=False)
    levels = [index % 5 for index in out_indices]
    assert len(model.stages) == max(levels)
    model = mk.freeze(model) if frozen else model
    assert model.channels() == [WIDTHS[level] for level in levels]
    assert model.strides() == [2 ** (level + 1) for level in levels]
    for memory_format in (torch.contiguous_format, torch.channels_last):
        x = torch.randn(IMAGE).contiguous(memory_format=memory_format)
        with torch.no_grad():
            endpoints, maps = whole(x), model(x)
        assert len(maps) == len(levels)
        for level, found in zip(levels, maps, strict=True):
            assert_close(found, endpoints[f"res{level + 1}"], BACKEND_OUTPUT[torch.float32])
            assert found.is_contiguous(memory_format=memory_format)


@pytest.mark.parametrize("output_stride", [8, 16])
def test_output_stride(output_stride: int) -> None:
    """Stages beyond it keep the size of their map, without dilation, as official code does."""
    options = {
        "features_only": True,
        "out_indices": range(5),
        "output_stride": output_stride,
        "window_size": (None, None, 3, 4),
    }
    reference, fused = (make_model(fused=fused, **options) for fused in (False, True))
    strides = [min(2 ** (level + 1), output_stride) for level in range(5)]
    assert fused.strides() == strides
    assert fused.stages[3][0].depthwise_conv.dilation == (1, 1)
    x = torch.randn(IMAGE, dtype=torch.float64)
    for stride, found, expected in zip(strides, fused(x), reference(x), strict=True):
        assert found.shape[2:] == (-(-70 // stride), -(-64 // stride))
        assert_close(found, expected, BACKEND_OUTPUT[torch.float64])


@pytest.mark.parametrize("in_chans", [1, 4, 13])
def test_images_of_other_channels(in_chans: int) -> None:
    plain = make_model(torch.float32, in_chans=in_chans, fused=False)
    fused = make_model(torch.float32, in_chans=in_chans)
    x = torch.randn(2, in_chans, 33, 40)
    exact = make_model(in_chans=in_chans, fused=False)
    assert_close(fused(x), exact(x.double()).float(), BACKEND_MODEL_OUTPUT)
    plain.eval(), fused.eval(), exact.eval()
    with torch.no_grad():
        expected = exact(x.double()).float()
        assert_close(fused(x), expected, BACKEND_MODEL_OUTPUT)
        assert_close(mk.freeze(fused)(x), expected, BACKEND_MODEL_OUTPUT)
    with pytest.raises(ValueError, match=rf"x must be \[B, {in_chans}, H, W\], got \(1, 3, 8, 8\)"):
        fused(torch.zeros(1, 3, 8, 8))


@pytest.mark.parametrize("in_chans", [1, 4, 13])
def test_pretrained_first_convolutions_see_a_grey_image_as_before(in_chans: int, tmp_path) -> None:
    pretrained = make_model(torch.float32).eval()
    torch.save(pretrained.state_dict(), tmp_path / "rgb.pt")
    model = make_model(torch.float32, in_chans=in_chans).eval()
    report = load_checkpoint(model, tmp_path / "rgb.pt")
    assert report.adapted[0].startswith("stem.conv_0.weight is for RGB")
    grey = torch.randn(1, 1, 33, 40)
    with torch.no_grad():
        # 4 and 13 channels are no whole number of RGBs: one of the three counts once more.
        weight, own = pretrained.stem.conv_0.weight, model.stem.conv_0.weight
        assert own.shape[1] == in_chans
        if in_chans == 1:
            expected = pretrained(grey.expand(-1, 3, -1, -1))
            assert_close(model(grey), expected, BACKEND_OUTPUT[torch.float32])
        else:
            assert torch.equal(own[:, 3], weight[:, 0] * (3 / in_chans))
            assert torch.equal(own[:, 1], weight[:, 1] * (3 / in_chans))


def test_backbones_load_classifiers(tmp_path) -> None:
    torch.save(make_model(torch.float32).state_dict(), tmp_path / "classifier.pt")
    model = make_model(torch.float32, features_only=True, out_indices=(2,))
    reasons = set(load_checkpoint(model, tmp_path / "classifier.pt").skipped.values())
    assert reasons == {
        "the model has no classifier head",
        "the model has no such stage (out_indices)",
    }


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"out_indices": (1,)}, r"out_indices=\(1,\) needs features_only=True"),
        ({"features_only": True, "out_indices": (5,)}, r"levels from 0 .* to 4 .*, got \(5,\)"),
        ({"features_only": True, "out_indices": ()}, r"out_indices must be levels"),
        ({"features_only": True, "out_indices": 3}, r"out_indices must be levels"),
        ({"output_stride": 4}, r"output_stride must be one of \(8, 16, 32\), got 4"),
        ({"in_chans": 0}, "in_chans must be a positive integer"),
    ],
    ids=str,
)
def test_bad_arguments_are_named(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_model(**options)


@pytest.mark.parametrize("fused", [False, True], ids=["plain", "fused"])
def test_intermediates_are_the_maps_of_out_indices(fused: bool) -> None:
    model = make_model(fused=fused).eval()
    maps = make_model(fused=fused, features_only=True, out_indices=range(5)).eval()
    maps.load_state_dict(model.state_dict(), strict=False)
    x = torch.randn(IMAGE, dtype=torch.float64)
    computed: list[str] = []
    for path, module in model.named_modules():
        if path.startswith("stages.") and path.count(".") == 2:
            module.register_forward_hook(lambda *_, path=path: computed.append(path))
    with torch.no_grad():
        expected = maps(x)
        for indices, levels in ((None, range(5)), (2, (3, 4)), ((-1, 1), (4, 1))):
            last, found = model.forward_intermediates(x, indices)
            assert torch.equal(model.forward_head(last), model(x))
            assert len(found) == len(levels)
            for level, one in zip(levels, found, strict=True):
                assert torch.equal(one, expected[level])
        computed.clear()
        last, _ = model.forward_intermediates(x, (0, 2), stop_early=True)
        assert computed == ["stages.0.0", "stages.1.0"]
        (found,) = model.forward_intermediates(x, [2], intermediates_only=True)
        assert torch.equal(found, torch.nn.functional.gelu(last))
    for options, message in (
        ({"indices": (5,)}, r"indices must be levels from 0 \(stem\) to 4"),
        ({"indices": 6}, "indices must be levels"),
        ({"output_fmt": "NLC"}, "output_fmt must be 'NCHW', got 'NLC'"),
    ):
        with pytest.raises(ValueError, match=message):
            model.forward_intermediates(x, **options)


def test_pruned_models_compute_what_is_left() -> None:
    model, pruned = make_model(torch.float32).eval(), make_model(torch.float32).eval()
    assert pruned.prune_intermediate_layers((1, -3)) == [1, 2]
    assert (len(pruned.stages), pruned.num_features, pruned.num_classes) == (2, 16, 0)
    x = torch.randn(IMAGE)
    with torch.no_grad():
        expected = model.forward_intermediates(x, (1, 2), intermediates_only=True)
        found = pruned.forward_intermediates(x, (1, 2), intermediates_only=True)
        assert all(map(torch.equal, found, expected))
        features = model.forward_stages(x)[2].mean((2, 3))
        assert torch.equal(pruned(x), features)
        assert torch.allclose(mk.freeze(pruned)(x), features, atol=1e-5)
        pruned.reset_classifier(7)
        assert pruned(x).shape == (2, 7)
    with pytest.raises(ValueError, match="made with features_only"):
        make_model(features_only=True).prune_intermediate_layers(1)
    assert make_model().prune_intermediate_layers(5, prune_head=False) == [0, 1, 2, 3, 4]


def test_the_head_in_parts() -> None:
    model = make_model().eval()
    x = torch.randn(IMAGE, dtype=torch.float64)
    features = model.forward_features(x)
    pooled = model.forward_head(features, pre_logits=True)
    assert torch.equal(model.get_classifier()(pooled), model(x))
    model.reset_classifier(3, "avg")
    assert (model.num_classes, model(x).shape) == (3, (2, 3))
    with pytest.raises(ValueError, match="global_pool must be 'avg', got 'max'"):
        model.reset_classifier(3, "max")
    with pytest.raises(RuntimeError, match="no head"):
        make_model(features_only=True).forward_head(features)


@pytest.mark.parametrize("fused", [False, True], ids=["plain", "fused"])
def test_checkpointed_gradients(fused: bool) -> None:
    """The same numbers, moving statistics included, in less memory; and back again."""
    options = {"fused": fused, "depths": (1, 2, 2, 1)}
    options |= {"recompute": "none"} if fused else {}
    stored, model = make_model(**options), make_model(**options)
    x = torch.randn(IMAGE, dtype=torch.float64)
    settings = [getattr(module, "recompute", None) for module in model.modules()]
    for enable, again in ((True, True), (False, False), (True, False)):
        model.set_grad_checkpointing(enable)
        model.set_grad_checkpointing(again)
    assert [getattr(module, "recompute", None) for module in model.modules()] == settings
    model.set_grad_checkpointing()
    kept = [saved_bytes(lambda m=m: m(x), [*m.parameters(), *m.buffers()]) for m in (stored, model)]
    assert kept[1] < 0.5 * kept[0]
    stored, model = make_model(**options), make_model(**options)
    model.set_grad_checkpointing()
    for each in (stored, model):
        each(x).square().sum().backward()
    for expected, found in zip(stored.parameters(), model.parameters(), strict=True):
        assert_close(found.grad, expected.grad, BACKEND_OUTPUT[torch.float64])
    for expected, found in zip(stored.buffers(), model.buffers(), strict=True):
        assert_close(found, expected, BACKEND_OUTPUT[torch.float64])
