"""DeepLabv3+ (arXiv 1802.02611) on a MOAT, as the MOAT paper has it for ADE20K (section 3.3)."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import moat_kernels

OUTPUT_STRIDE = 16
RATES = (6, 12, 18)  # dilations of the pyramid's 3x3 convolutions at output stride 16
WIDTH = 256
LOW_WIDTH = 48  # of the low-level features: enough for edges, too few to outvote the pyramid
LOW, HIGH = 1, 4  # levels of the backbone: maps at stride 4 and at the output stride


def deeplab(model: str, num_classes: int, window: int | None = None, **options: Any) -> DeepLab:
    """DeepLabv3+ on the backbone called `model`, of random weights.

    window: tokens on a side of the windows that the last two stages attend in; None: all of a map.
    options: of `moat_kernels.create_model`.
    """
    backbone = moat_kernels.create_model(
        model,
        features_only=True,
        out_indices=(LOW, HIGH),
        output_stride=OUTPUT_STRIDE,
        window_size=(None, None, window, window),
        pool_size=3,
        **options,
    )
    return DeepLab(backbone, num_classes)


class DeepLab(nn.Module):
    """Images [B, 3, H, W] of any size -> logits [B, num_classes, H, W].

    backbone: gives two maps, at stride 4 and at OUTPUT_STRIDE.

    Images are padded to a multiple of the output stride and 1, as the paper's 641 is. TensorFlow's
    SAME padding is symmetric for those alone: there place i of a map is pixel i * stride of the
    image. For other sizes maps lie some pixels beside, by how much depends on the size, and what
    was learned from crops would be misplaced in whole images.
    """

    def __init__(self, backbone: moat_kernels.MOAT, num_classes: int) -> None:
        super().__init__()
        low, high = backbone.channels()
        self.backbone = backbone
        self.pyramid = Pyramid(high)
        self.low = conv_norm_relu(low, LOW_WIDTH, 1)
        self.refine = nn.Sequential(
            separable_conv(WIDTH + LOW_WIDTH, WIDTH), separable_conv(WIDTH, WIDTH)
        )
        self.classifier = nn.Conv2d(WIDTH, num_classes, 1)

    def forward(self, x: Tensor) -> Tensor:
        height, width = x.shape[2:]
        x = F.pad(x, (0, (1 - width) % OUTPUT_STRIDE, 0, (1 - height) % OUTPUT_STRIDE))
        low, high = self.backbone(x)
        low = self.low(low)
        merged = torch.cat([_resized(self.pyramid(high), low), low], 1)
        logits = _resized(self.classifier(self.refine(merged)), x)
        return logits[..., :height, :width]

    def parameter_groups(self, *, lr: float, weight_decay: float) -> list[dict[str, Any]]:
        """Groups for an optimiser: weights with weight decay, norms and biases without."""
        decoder = [
            parameter
            for name, parameter in self.named_parameters()
            if not name.startswith("backbone.")
        ]
        return [
            *self.backbone.parameter_groups(lr=lr, weight_decay=weight_decay),
            {
                "params": [one for one in decoder if one.dim() > 1],
                "lr": lr,
                "weight_decay": weight_decay,
            },
            {"params": [one for one in decoder if one.dim() <= 1], "lr": lr, "weight_decay": 0.0},
        ]


class Pyramid(nn.Module):
    """Atrous spatial pyramid pooling: [B, channels, H, W] -> [B, WIDTH, H, W].

    Each place is seen alone, at three scales, and together with the whole map.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.branches = nn.ModuleList(
            [
                conv_norm_relu(channels, WIDTH, 1),
                *(separable_conv(channels, WIDTH, dilation) for dilation in RATES),
            ]
        )
        self.whole = conv_norm_relu(channels, WIDTH, 1)
        self.project = conv_norm_relu((len(self.branches) + 1) * WIDTH, WIDTH, 1)

    def forward(self, x: Tensor) -> Tensor:
        whole = self.whole(x.mean((2, 3), keepdim=True)).expand(-1, -1, *x.shape[2:])
        return self.project(torch.cat([*(branch(x) for branch in self.branches), whole], 1))


def conv_norm_relu(
    in_channels: int, out_channels: int, size: int, *, dilation: int = 1, groups: int = 1
) -> nn.Sequential:
    """A convolution that keeps the size of the map, batch norm and ReLU."""
    conv = nn.Conv2d(
        in_channels,
        out_channels,
        size,
        padding=dilation * (size // 2),
        dilation=dilation,
        groups=groups,
        bias=False,
    )
    return nn.Sequential(conv, nn.BatchNorm2d(out_channels), nn.ReLU(inplace=True))


def separable_conv(in_channels: int, out_channels: int, dilation: int = 1) -> nn.Sequential:
    """3x3 for each channel alone, then 1x1: both with batch norm and ReLU."""
    return nn.Sequential(
        conv_norm_relu(in_channels, in_channels, 3, dilation=dilation, groups=in_channels),
        conv_norm_relu(in_channels, out_channels, 1),
    )


def _resized(maps: Tensor, like: Tensor) -> Tensor:
    """The first and the last places of both are the same."""
    return F.interpolate(maps, like.shape[2:], mode="bilinear", align_corners=True)
