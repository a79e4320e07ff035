"""transformers' segmenters and detectors on a MOAT, by its TimmBackbone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.peers import import_peer

import moat_kernels as mk

import_peer("moat_kernels.timm")
transformers = import_peer("transformers")

WIDTHS = [32, 64, 128, 256]  # of tiny_moat_0's stages
DETECTOR = {
    **{"d_model": 16, "decoder_layers": 1, "decoder_ffn_dim": 16, "encoder_ffn_dim": 16},
    **{"num_queries": 5, "encoder_attention_heads": 2, "decoder_attention_heads": 2},
}
BOXES = {"class_labels": torch.tensor([1]), "boxes": torch.tensor([[0.5, 0.5, 0.2, 0.2]])}


def backbone(*out_indices: int, **options: Any) -> Any:
    return transformers.TimmBackboneConfig(
        backbone="tiny_moat_0", out_indices=out_indices, use_pretrained_backbone=False, **options
    )


def test_backbone() -> None:
    model = transformers.TimmBackbone(backbone(1, 3, freeze_batch_norm_2d=True))
    assert type(model._backbone) is mk.MOAT and model.channels == [32, 128]
    x = torch.randn(1, 3, 64, 64)
    maps = model(x).feature_maps
    torch.testing.assert_close(list(maps), model._backbone.eval()(x))
    maps[-1].sum().backward()


def upernet() -> Any:
    config = transformers.UperNetConfig(
        backbone_config=backbone(1, 2, 3, 4),
        hidden_size=16,
        auxiliary_in_channels=WIDTHS[2],
        auxiliary_channels=8,
    )
    model = transformers.UperNetForSemanticSegmentation(config)
    return model, {"labels": torch.zeros(2, 64, 64, dtype=torch.long)}


def mask2former() -> Any:
    config = transformers.Mask2FormerConfig(
        backbone_config=backbone(1, 2, 3, 4),
        **{"hidden_dim": 32, "feature_size": 32, "mask_feature_size": 32},
        **{"encoder_layers": 1, "decoder_layers": 2, "num_attention_heads": 2},
        **{"encoder_feedforward_dim": 16, "dim_feedforward": 16, "num_queries": 5},
        train_num_points=16,
    )
    model = transformers.Mask2FormerForUniversalSegmentation(config)
    masks = {"mask_labels": [torch.ones(1, 64, 64)] * 2, "class_labels": [torch.tensor([1])] * 2}
    return model, masks


def detr() -> Any:
    config = transformers.DetrConfig(backbone_config=backbone(4), encoder_layers=1, **DETECTOR)
    return transformers.DetrForObjectDetection(config), {"labels": [BOXES] * 2}


def rt_detr() -> Any:
    config = transformers.RTDetrConfig(
        backbone_config=backbone(2, 3, 4),
        encoder_in_channels=WIDTHS[1:],
        encoder_hidden_dim=16,
        decoder_in_channels=[16, 16, 16],
        num_denoising=0,
        **DETECTOR,
    )
    return transformers.RTDetrForObjectDetection(config), {"labels": [BOXES] * 2}


@pytest.mark.parametrize("make", [upernet, mask2former, detr, rt_detr])
@pytest.mark.filterwarnings("ignore")  # transformers' own, of what it will change
def test_models(make) -> None:
    model, targets = make()
    assert [type(module) for module in model.modules()].count(mk.MOAT) == 1
    loss = model(torch.randn(2, 3, 64, 64), **targets).loss
    loss.backward()
    (moat,) = (module for module in model.modules() if isinstance(module, mk.MOAT))
    assert all(parameter.grad is not None for parameter in moat.stages.parameters())
