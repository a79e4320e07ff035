"""Twin of RooKichenn's MOAT (pytorch-MOAT, classification/moat.py) on timm 0.6's modules.

Filters before it expands, has no activation after the expansion, expands half as much where it
strides, pools the shortcut by maximum; `num_heads` is the width of a head; the layer norm, the
residual and drop path of attention are inside the windows; `attn_drop` is never applied; the index
of the position bias is in the state_dict.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def drop_path(x: Tensor, drop_prob: float, training: bool) -> Tensor:
    if drop_prob == 0.0 or not training:
        return x
    keep = 1 - drop_prob
    mask = x.new_empty((x.shape[0],) + (1,) * (x.dim() - 1)).bernoulli_(keep)
    return x * mask.div_(keep)


class DropPath(nn.Module):
    def __init__(self, drop_prob: float) -> None:
        super().__init__()
        self.drop_prob = drop_prob

    def forward(self, x: Tensor) -> Tensor:
        return drop_path(x, self.drop_prob, self.training)


class BatchNormAct2d(nn.BatchNorm2d):
    """A batch norm with its activation inside."""

    def __init__(self, num_features: int, act: nn.Module) -> None:
        super().__init__(num_features)
        self.drop = nn.Identity()
        self.act = act

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.drop(super().forward(x)))


class DepthwiseSeparableConv(nn.Module):
    def __init__(self, in_chs: int, out_chs: int, stride: int, drop_path_rate: float) -> None:
        super().__init__()
        self.has_skip = stride == 1 and in_chs == out_chs
        self.conv_dw = nn.Conv2d(in_chs, in_chs, 3, stride, 1, groups=in_chs, bias=False)
        self.bn1 = BatchNormAct2d(in_chs, nn.GELU())
        self.se = nn.Identity()
        self.conv_pw = nn.Conv2d(in_chs, out_chs, 1, bias=False)
        self.bn2 = BatchNormAct2d(out_chs, nn.Identity())
        self.drop_path = DropPath(drop_path_rate) if drop_path_rate else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        y = self.se(self.bn1(self.conv_dw(x)))
        y = self.bn2(self.conv_pw(y))
        return self.drop_path(y) + x if self.has_skip else y


class SqueezeExcite(nn.Module):
    def __init__(self, in_chs: int) -> None:
        super().__init__()
        self.conv_reduce = nn.Conv2d(in_chs, round(in_chs * 0.25), 1)
        self.act1 = nn.ReLU(inplace=True)
        self.conv_expand = nn.Conv2d(round(in_chs * 0.25), in_chs, 1)
        self.gate = nn.Sigmoid()

    def forward(self, x: Tensor) -> Tensor:
        mean = x.mean((2, 3), keepdim=True)
        return x * self.gate(self.conv_expand(self.act1(self.conv_reduce(mean))))


class MBConvBlock(nn.Module):
    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        downscale: bool = False,
        drop_path: float = 0.0,
        use_se: bool = False,
    ) -> None:
        super().__init__()
        self.drop_path_rate = drop_path
        wide = out_channels * 4 // (2 if downscale else 1)
        self.main_path = nn.Sequential(
            nn.BatchNorm2d(in_channels),
            DepthwiseSeparableConv(in_channels, wide, 2 if downscale else 1, drop_path),
            SqueezeExcite(wide) if use_se else nn.Identity(),
            nn.Conv2d(wide, out_channels, 1),
        )
        self.skip_path: nn.Module = nn.Identity()
        if downscale:
            pool = nn.MaxPool2d((2, 2), (2, 2))
            self.skip_path = nn.Sequential(pool, nn.Conv2d(in_channels, out_channels, 1))

    def forward(self, input: Tensor) -> Tensor:
        output = self.main_path(input)
        if self.drop_path_rate > 0.0:
            output = drop_path(output, self.drop_path_rate, self.training)
        return output + self.skip_path(input)


class RelativeSelfAttention(nn.Module):
    def __init__(
        self, in_channels: int, num_heads: int, window_size: tuple[int, int], attn_drop: float
    ) -> None:
        super().__init__()
        self.in_channels = in_channels
        self.num_heads = in_channels // num_heads
        self.window_size = window_size
        self.scale = num_heads**-0.5
        self.attn_area = window_size[0] * window_size[1]
        self.qkv_mapping = nn.Linear(in_channels, 3 * in_channels)
        self.attn_drop = nn.Dropout(attn_drop)
        self.proj = nn.Linear(in_channels, in_channels)
        self.proj_drop = nn.Dropout(0.0)
        self.softmax = nn.Softmax(-1)
        offsets = (2 * window_size[0] - 1) * (2 * window_size[1] - 1)
        self.relative_position_bias_table = nn.Parameter(torch.zeros(offsets, self.num_heads))
        nn.init.normal_(self.relative_position_bias_table, std=0.02)
        rows, columns = (axis.flatten() for axis in torch.meshgrid(
            torch.arange(window_size[0]), torch.arange(window_size[1]), indexing="ij"
        ))  # fmt: skip
        row_offset = rows[:, None] - rows[None, :] + window_size[0] - 1  # query - key
        column_offset = columns[:, None] - columns[None, :] + window_size[1] - 1
        index = row_offset * (2 * window_size[1] - 1) + column_offset
        self.register_buffer("relative_position_index", index)

    def forward(self, input: Tensor) -> Tensor:
        qkv = self.qkv_mapping(input).unflatten(-1, (3, self.num_heads, -1))
        query, key, value = qkv.permute(2, 0, 3, 1, 4).unbind()
        bias = self.relative_position_bias_table[self.relative_position_index.view(-1)]
        bias = bias.view(self.attn_area, self.attn_area, -1).permute(2, 0, 1)
        weights = self.softmax((query * self.scale) @ key.transpose(-2, -1) + bias)
        return self.proj_drop(self.proj((weights @ value).transpose(1, 2).flatten(2)))


class MOATAttnetion(nn.Module):
    """The name is the original's."""

    def __init__(
        self,
        in_channels: int,
        img_size: tuple[int, int],
        window_size: tuple[int, int] | None,
        attn_drop: float,
        drop_path: float,
    ) -> None:
        super().__init__()
        self.use_window = window_size is not None
        self.window_size = window_size or img_size
        self.norm_1 = nn.LayerNorm(in_channels)
        self.attention = RelativeSelfAttention(in_channels, 32, self.window_size, attn_drop)
        self.drop_path = DropPath(drop_path) if drop_path > 0.0 else nn.Identity()

    def forward(self, input: Tensor) -> Tensor:
        batch, channels, height, width = input.shape
        rows, columns = self.window_size
        windows = F.unfold(input, self.window_size, stride=self.window_size)
        windows = windows.unflatten(1, (channels, rows * columns))
        windows = windows.permute(0, 3, 2, 1).reshape(-1, rows * columns, channels)
        windows = windows + self.drop_path(self.attention(self.norm_1(windows)))
        windows = windows.view(batch, -1, rows * columns, channels).permute(0, 3, 2, 1)
        return F.fold(
            windows.flatten(1, 2), (height, width), self.window_size, stride=self.window_size
        )


class MOATBlock(nn.Module):
    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        downscale: bool,
        img_size: tuple[int, int],
        window_size: tuple[int, int] | None,
        attn_drop: float,
        drop_path: float,
    ) -> None:
        super().__init__()
        self.mb_conv = MBConvBlock(in_channels, out_channels, downscale, drop_path)
        self.moat_attention = MOATAttnetion(
            out_channels, img_size, window_size, attn_drop, drop_path
        )

    def forward(self, input: Tensor) -> Tensor:
        return self.moat_attention(self.mb_conv(input))


class MOAT(nn.Module):
    def __init__(
        self,
        img_size: tuple[int, int] = (224, 224),
        channels: tuple[int, ...] = (96, 192, 384, 768),
        embedding_channels: int = 64,
        depths: tuple[int, ...] = (2, 3, 7, 2),
        window_size: tuple[int, int] | None = None,
        num_classes: int = 1000,
        attn_drop: float = 0.0,
        drop_path: float = 0.0,
    ) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(3, embedding_channels, 3, 2, 1),
            nn.GELU(),
            nn.Conv2d(embedding_channels, embedding_channels, 3, 1, 1),
        )
        stages = []
        in_channels = embedding_channels
        for stage, (width, depth) in enumerate(zip(channels, depths, strict=True)):
            map_size = (img_size[0] >> (stage + 2), img_size[1] >> (stage + 2))
            blocks = []
            for index in range(depth):
                down = index == 0
                if stage < 2:
                    blocks.append(MBConvBlock(in_channels, width, down, drop_path, use_se=True))
                else:
                    blocks.append(
                        MOATBlock(
                            in_channels, width, down, map_size, window_size, attn_drop, drop_path
                        )
                    )
                in_channels = width
            stages.append(nn.Sequential(*blocks))
        self.stages = nn.ModuleList(stages)
        self.head = nn.Linear(in_channels, num_classes)

    def forward(self, input: Tensor) -> Tensor:
        output = self.stem(input)
        for stage in self.stages:
            output = stage(output)
        return self.head(output.mean((2, 3)))
