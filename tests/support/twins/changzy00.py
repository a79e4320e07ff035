"""Twin of changzy00's MOAT (pytorch-attention, vision_transformers/moat.py).

Every convolution has a bias, also before a norm; there is no shortcut where the shape changes, and
`out += x` is in place; attention has eight heads over the whole map, no qkv bias, no position bias.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


class SELayer(nn.Module):
    def __init__(self, channel: int, reduction: int) -> None:
        super().__init__()
        self.avg_pool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Sequential(
            nn.Linear(channel, channel // reduction, bias=False),
            nn.ReLU(inplace=True),
            nn.Linear(channel // reduction, channel, bias=False),
            nn.Sigmoid(),
        )

    def forward(self, x: Tensor) -> Tensor:
        gate = self.fc(self.avg_pool(x).flatten(1))
        return x * gate[:, :, None, None]


class MBConv(nn.Module):
    def __init__(
        self, inplanes: int, planes: int, stride: int = 1, expand_ratio: int = 4, use_se=False
    ) -> None:
        super().__init__()
        wide = inplanes * expand_ratio
        self.bn = nn.BatchNorm2d(inplanes)
        self.conv1 = nn.Conv2d(inplanes, wide, 1)
        self.bn1 = nn.BatchNorm2d(wide)
        self.act = nn.GELU()
        self.conv2 = nn.Conv2d(wide, wide, 3, stride=stride, padding=1, groups=wide)
        self.bn2 = nn.BatchNorm2d(wide)
        self.use_se = use_se
        if use_se:
            self.se = SELayer(wide, 4)
        self.conv3 = nn.Conv2d(wide, planes, 1)
        self.shortcut = stride == 1 and inplanes == planes

    def forward(self, x: Tensor) -> Tensor:
        out = self.act(self.bn1(self.conv1(self.bn(x))))
        out = self.act(self.bn2(self.conv2(out)))
        if self.use_se:
            out = self.se(out)
        out = self.conv3(out)
        if self.shortcut:
            out += x
        return out


class Attention(nn.Module):
    def __init__(self, dim: int, num_heads: int = 8, attn_drop: float = 0.0) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.scale = (dim // num_heads) ** -0.5
        self.qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.attn_drop = nn.Dropout(attn_drop)
        self.proj = nn.Linear(dim, dim)
        self.proj_drop = nn.Dropout(0.0)

    def forward(self, x: Tensor) -> Tensor:
        qkv = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        query, key, value = qkv.unbind()
        weights = self.attn_drop((query @ key.transpose(-1, -2) * self.scale).softmax(-1))
        return self.proj_drop(self.proj((weights @ value).transpose(1, 2).flatten(2)))


class MOATBlock(nn.Module):
    def __init__(self, inplanes: int, planes: int, stride: int, attn_drop: float) -> None:
        super().__init__()
        self.mbconv = MBConv(inplanes, planes, stride)
        self.layernorm = nn.LayerNorm(planes)
        self.attn = Attention(planes, attn_drop=attn_drop)

    def forward(self, x: Tensor) -> Tensor:
        x = self.mbconv(x)
        rows = x.flatten(2).transpose(1, 2)
        rows = rows + self.attn(self.layernorm(rows))
        return rows.transpose(1, 2).reshape(x.shape)


class MOAT(nn.Module):
    def __init__(
        self,
        stem_dim: int = 64,
        embed_dims: tuple[int, ...] = (96, 192, 384, 768),
        depths: tuple[int, ...] = (2, 3, 7, 2),
        num_classes: int = 1000,
        attn_drop: float = 0.0,
    ) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, stem_dim, 3, stride=2, padding=1)
        inplanes = stem_dim
        for stage, (planes, depth) in enumerate(zip(embed_dims, depths, strict=True)):
            blocks: list[nn.Module] = []
            for index in range(depth):
                stride = 2 if index == 0 else 1
                if stage < 2:
                    blocks.append(MBConv(inplanes, planes, stride, use_se=True))
                else:
                    blocks.append(MOATBlock(inplanes, planes, stride, attn_drop))
                inplanes = planes
            setattr(self, f"layer{stage + 1}", nn.Sequential(*blocks))
        self.head = nn.Linear(inplanes, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for layer in (self.layer1, self.layer2, self.layer3, self.layer4):
            x = layer(x)
        return self.head(torch.mean(x, (2, 3)))
