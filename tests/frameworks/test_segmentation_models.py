"""segmentation_models_pytorch's decoders on a MOAT, by the names of timm ("tu-...")."""

from __future__ import annotations

import pytest
import torch
from support.peers import import_peer
from support.small_model import make_model

import moat_kernels as mk

import_peer("moat_kernels.timm")
segmentation = import_peer("segmentation_models_pytorch")

SMALL = {"stem_width": 8, "widths": (8, 16, 32, 64), "depths": (1, 1, 1, 1)}


@pytest.mark.parametrize(
    ("decoder", "options", "size"),
    [
        ("Unet", {}, 64),
        ("FPN", {}, 64),
        ("DeepLabV3Plus", {"encoder_output_stride": 16}, 64),
        ("PAN", {}, 128),
        ("UPerNet", {"in_channels": 4}, 64),
        ("Unet", {"encoder_depth": 3, "decoder_channels": (8, 8, 8)}, 64),
        ("UnetPlusPlus", {}, 64),
        ("MAnet", {}, 64),
        ("Linknet", {}, 64),
        ("PSPNet", {}, 64),
        ("DeepLabV3", {"encoder_output_stride": 16}, 64),
        ("Segformer", {}, 64),
        ("DPT", {"decoder_readout": "ignore"}, 64),
    ],
    ids=str,
)
def test_decoders(decoder: str, options: dict, size: int) -> None:
    make = getattr(segmentation, decoder)
    model = make("tu-tiny_moat_0", encoder_weights=None, classes=5, **SMALL, **options)
    assert type(model.encoder.model) is mk.MOAT
    images = torch.randn(2, options.get("in_channels", 3), size, size)
    logits = model(images)
    assert logits.shape == (2, 5, size, size)
    logits.square().mean().backward()
    idle = {name.split(".")[1] for name, p in model.encoder.named_parameters() if p.grad is None}
    # DPT takes maps from a classifier, whose head it does not need.
    assert idle == ({"final_layer_norm", "logits_head"} if decoder == "DPT" else set())


def test_weights(tmp_path) -> None:
    source = make_model(torch.float32)
    torch.save(source.state_dict(), tmp_path / "moat.pth")
    overlay = {"file": str(tmp_path / "moat.pth")}
    options = {"pretrained_cfg_overlay": overlay, "encoder_weights": True, **SMALL}
    encoder = segmentation.Unet("tu-tiny_moat_0", **options).encoder.model
    expected = source.state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in encoder.state_dict().items())
    with pytest.raises(RuntimeError, match="no weights of tiny_moat_0 to download"):
        segmentation.Unet("tu-tiny_moat_0", encoder_weights=True, **SMALL)
