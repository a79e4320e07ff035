"""A small whole classifier of every implementation that `fuse` knows, without random parts.

timm, torchvision and vit-pytorch as installed; twins (support/twins) of what no registry carries.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from support.fusing import randomize
from support.peers import import_peer
from support.small_model import CLASSES
from support.twins import apple, changzy00, rookichenn

RESOLUTION = 64


def _timm(name: str) -> nn.Module:
    settings = {"img_size": RESOLUTION, "embed_dim": (32, 32, 64, 64), "depths": (1, 1, 1, 1)}
    return import_peer("timm").create_model(name, num_classes=CLASSES, **settings)


def _torchvision() -> nn.Module:
    maxvit = import_peer("torchvision.models.maxvit")
    return maxvit.MaxVit((64, 64), 16, 2, [32, 64], [1, 2], 16, 0.0, num_classes=CLASSES)


def _vit_pytorch() -> nn.Module:
    max_vit = import_peer("vit_pytorch.max_vit")
    settings = {"dim": 32, "depth": (1, 2), "window_size": 4, "dropout": 0.0}
    return max_vit.MaxViT(num_classes=CLASSES, **settings)


def _rookichenn() -> nn.Module:
    settings = {"channels": (32, 32, 64, 64), "embedding_channels": 32, "depths": (1, 1, 1, 1)}
    return rookichenn.MOAT((RESOLUTION, RESOLUTION), num_classes=CLASSES, **settings)


class _LastMap(nn.Module):
    """Apple's MOAT returns feature maps; the mean of the last one's first channels."""

    def forward(self, maps: list[Tensor]) -> Tensor:
        return maps[-1].mean((2, 3))[:, :CLASSES]


def _apple() -> nn.Module:
    settings = {"stem_size": 16, "hidden_size": (16, 32, 64, 64), "num_blocks": (1, 1, 1, 1)}
    pe_type = apple.PEType.SINGLE_HEAD_RPE
    features = apple.MOAT((RESOLUTION, RESOLUTION), pe_type=pe_type, **settings)
    return nn.Sequential(features, _LastMap())


def _changzy00() -> nn.Module:
    return changzy00.MOAT(16, (16, 32, 64, 64), (1, 1, 1, 1), num_classes=CLASSES)


# name -> (how it is made, how many of its modules are fused)
MODELS: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "timm coatnet": (lambda: _timm("coatnet_0_224"), 4),
    "timm maxvit tf": (lambda: _timm("maxvit_tiny_tf_224"), 12),
    "torchvision maxvit": (_torchvision, 9),
    "vit-pytorch maxvit": (_vit_pytorch, 9),
    "RooKichenn": (_rookichenn, 6),
    "Apple": (_apple, 6),
    "changzy00": (_changzy00, 6),
}


def make_foreign_model(name: str) -> nn.Module:
    """The same stock model, in float64, at every call; skips where its package is missing."""
    torch.manual_seed(0)
    return randomize(MODELS[name][0]())
