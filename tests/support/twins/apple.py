"""Twin of Apple's MOAT for its neural engine (ml-vision-transformers-ane, vision_transformers).

A batch norm after the projection; the norm before the block has PyTorch's eps, the three inside
have 1e-3; the width of squeeze-and-excitation follows the input; one bias table, for one head,
serves all heads, and scores are [key, query]; the default position encoding is a depthwise
convolution of the values (LePE) beside an absolute one that is added in place.
"""

from __future__ import annotations

import enum
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn


class BlockArgs(NamedTuple):
    kernel_size: int
    input_filters: int
    output_filters: int
    expand_ratio: int
    id_skip: bool
    stride: int
    se_ratio: float | None


class PEType(enum.Enum):
    LePE_ADD = 0
    LePE_FUSED = 1
    RPE = 2
    SINGLE_HEAD_RPE = 3


class Swish(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(x)


class MBConvBlock(nn.Module):
    def __init__(
        self,
        block_args: BlockArgs,
        drop_rate: float | None = None,
        pre_norm: bool = True,
        activation: str = "gelu",
    ) -> None:
        super().__init__()
        self._block_args = block_args
        self.has_se = block_args.se_ratio is not None
        self.drop_rate = drop_rate
        self.pre_norm = pre_norm
        narrow, out = block_args.input_filters, block_args.output_filters
        wide = narrow * block_args.expand_ratio
        inner = {"eps": 1e-3, "momentum": 0.01}
        if pre_norm:
            self.pre_norm_layer = nn.BatchNorm2d(narrow)
        if block_args.expand_ratio != 1:
            self._expand_conv = nn.Conv2d(narrow, wide, 1, bias=False)
            self._bn0 = nn.BatchNorm2d(wide, **inner)
        stride = block_args.stride
        self._depthwise_conv = nn.Conv2d(
            wide,
            wide,
            block_args.kernel_size,
            stride,
            "same" if stride == 1 else 1,
            groups=wide,
            bias=False,
        )
        self._bn1 = nn.BatchNorm2d(wide, **inner)
        if block_args.se_ratio is not None:
            squeezed = max(1, int(narrow * block_args.se_ratio))
            self._se_reduce = nn.Conv2d(wide, squeezed, 1)
            self._se_expand = nn.Conv2d(squeezed, wide, 1)
        self._project_conv = nn.Conv2d(wide, out, 1, padding="same", bias=False)
        self._bn2 = nn.BatchNorm2d(out, **inner)
        self._swish = {"swish": Swish, "gelu": nn.GELU, "relu": nn.ReLU}[activation]()
        if drop_rate is not None:
            self.dropout = nn.Dropout(drop_rate)
        if stride == 2:
            self.shortcut_pool = nn.AvgPool2d(2, 2)
        self.shortcut_conv = None
        if narrow != out:
            self.shortcut_conv = nn.Conv2d(narrow, out, 1, padding="same")

    def forward(self, inputs: Tensor) -> Tensor:
        arguments = self._block_args
        x = self.pre_norm_layer(inputs) if self.pre_norm else inputs
        if arguments.expand_ratio != 1:
            x = self._swish(self._bn0(self._expand_conv(x)))
        x = self._swish(self._bn1(self._depthwise_conv(x)))
        if self.has_se:
            mean = x.mean((2, 3), keepdim=True)
            x = torch.sigmoid(self._se_expand(self._swish(self._se_reduce(mean)))) * x
        x = self._bn2(self._project_conv(x))
        if not arguments.id_skip:
            return x
        if arguments.stride == 1 and arguments.input_filters == arguments.output_filters:
            return (self.dropout(x) if self.drop_rate else x) + inputs
        shortcut = self.shortcut_pool(inputs) if arguments.stride == 2 else inputs
        return x + (shortcut if self.shortcut_conv is None else self.shortcut_conv(shortcut))


class WindowAttention(nn.Module):
    def __init__(
        self,
        dim: int,
        window_size: tuple[int, int],
        num_heads: int,
        pe_type: PEType = PEType.LePE_ADD,
        attn_drop: float = 0.0,
    ) -> None:
        super().__init__()
        self.dim, self.window_size, self.num_heads = dim, window_size, num_heads
        self.scale = (dim // num_heads) ** -0.5
        self.pe_type = pe_type
        height, width = window_size
        if pe_type in (PEType.RPE, PEType.SINGLE_HEAD_RPE):
            self.rpe_num_heads = 1
            shape = (2 * height - 1, 2 * width - 1, 1)
            self.relative_position_bias_table = nn.Parameter(0.02 * torch.randn(shape))
            rows, columns = np.divmod(np.arange(height * width), width)
            row_offset = rows[:, None] - rows[None, :] + height - 1
            column_offset = columns[:, None] - columns[None, :] + width - 1
            # An array, not a buffer: it is in no state_dict.
            self.relative_position_index = row_offset * (2 * width - 1) + column_offset
        elif pe_type == PEType.LePE_ADD:
            self.LePE_for_Value = nn.Conv2d(dim, dim, 3, padding="same", groups=dim)
            self.abs_pe = nn.Parameter(torch.zeros(1, height * width, dim))
        self.q_proj = nn.Conv2d(dim, dim, 1)
        self.k_proj = nn.Conv2d(dim, dim, 1)
        self.v_proj = nn.Conv2d(dim, dim, 1)
        self.proj = nn.Conv2d(dim, dim, 1)
        self.softmax = nn.Softmax(dim=1)
        self.attn_drop = nn.Dropout(attn_drop)
        self.proj_drop = nn.Dropout(0.0)

    def forward(self, x: Tensor) -> Tensor:
        if self.pe_type == PEType.LePE_ADD:
            x += self.abs_pe
        tokens = x.shape[1]
        rows = x.transpose(1, 2)[:, :, None]  # [B, C, 1, tokens]
        query, key = self.q_proj(rows), self.k_proj(rows).permute(0, 3, 2, 1)
        value_map = self.v_proj(x.transpose(1, 2).unflatten(2, self.window_size))
        head_dim = self.dim // self.num_heads
        heads = zip(
            query.split(head_dim, 1),
            key.split(head_dim, 3),
            value_map.flatten(2)[:, :, None].split(head_dim, 1),
            strict=True,
        )
        results = []
        for head_query, head_key, head_value in heads:
            scores = torch.einsum("bchq,bkhc->bkhq", head_query, head_key) * self.scale
            if hasattr(self, "relative_position_bias_table"):
                index = torch.as_tensor(self.relative_position_index.reshape(-1))
                bias = self.relative_position_bias_table.reshape(-1)[index]
                scores = scores + bias.view(tokens, 1, tokens)  # [key, 1, query]
            weights = self.attn_drop(self.softmax(scores))
            results.append(torch.einsum("bkhq,bchk->bchq", weights, head_value))
        joined = torch.cat(results, 1)
        if self.pe_type == PEType.LePE_ADD:
            joined = joined + self.LePE_for_Value(value_map).flatten(2)[:, :, None]
        return self.proj_drop(self.proj(joined)).squeeze(2).transpose(1, 2)


class MOATBlock(nn.Module):
    def __init__(
        self,
        block_args: BlockArgs,
        window_size: tuple[int, int],
        attention_mode: str,
        pe_type: PEType,
        attn_drop: float,
    ) -> None:
        super().__init__()
        dim = block_args.output_filters
        self._mbconv = MBConvBlock(block_args)
        self._attn_norm = nn.LayerNorm(dim, eps=1e-5)
        self._window_attention = WindowAttention(dim, window_size, dim // 32, pe_type, attn_drop)
        self.window_size = window_size
        self.attention_mode = attention_mode

    def forward(self, inputs: Tensor) -> Tensor:
        shortcut = self._mbconv(inputs)
        batch, channels, height, width = shortcut.shape
        rows = self._attn_norm(shortcut.permute(0, 2, 3, 1))
        if self.attention_mode == "global":
            result = self._window_attention(rows.reshape(batch, height * width, channels))
            result = result.reshape(batch, height, width, channels)
        else:
            window_height, window_width = self.window_size
            cut = rows.unflatten(2, (-1, window_width)).unflatten(1, (-1, window_height))
            cut = cut.transpose(2, 3)  # [B, rows, columns, height, width, C]
            result = self._window_attention(cut.reshape(-1, window_height * window_width, channels))
            result = result.reshape(cut.shape).transpose(2, 3).reshape(rows.shape)
        return shortcut + result.permute(0, 3, 1, 2)


class MOAT(nn.Module):
    def __init__(
        self,
        image_size: tuple[int, int] = (224, 224),
        stem_size: int = 32,
        hidden_size: tuple[int, ...] = (32, 64, 128, 256),
        num_blocks: tuple[int, ...] = (2, 3, 7, 2),
        local_window_size: tuple[int, int] | None = None,
        pe_type: PEType = PEType.LePE_ADD,
        attn_drop: float = 0.0,
    ) -> None:
        super().__init__()
        self._stem = nn.Sequential(
            nn.Conv2d(3, stem_size, 3, 2, 1),
            nn.GELU(),
            nn.BatchNorm2d(stem_size),
            nn.Conv2d(stem_size, stem_size, 3, padding="same"),
        )
        self._blocks = nn.ModuleList()
        filters = stem_size
        for stage, (width, depth) in enumerate(zip(hidden_size, num_blocks, strict=True)):
            blocks = nn.ModuleList()
            for index in range(depth):
                stride, se_ratio = 2 if index == 0 else 1, 0.25 if stage < 2 else None
                arguments = BlockArgs(3, filters, width, 4, True, stride, se_ratio)
                map_size = (image_size[0] >> (stage + 2), image_size[1] >> (stage + 2))
                if stage < 2:
                    blocks.append(MBConvBlock(arguments))
                else:
                    mode = "global" if local_window_size is None else "local"
                    blocks.append(
                        MOATBlock(
                            arguments, local_window_size or map_size, mode, pe_type, attn_drop
                        )
                    )
                filters = width
            self._blocks.append(blocks)

    def forward(self, inputs: Tensor) -> list[Tensor]:
        output, stages = self._stem(inputs), []
        for blocks in self._blocks:
            for block in blocks:
                output = block(output)
            stages.append(output)
        return stages
