"""Apple's MOAT for its neural engine (ml-vision-transformers-ane)."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from moat_kernels.adapters.base import (
    AttentionAdapter,
    AttentionReading,
    MBConvAdapter,
)
from moat_kernels.adapters.reading import (
    Bottleneck,
    NotCovered,
    class_name,
    read_bottleneck,
    read_gate,
    read_pointwise,
    refuse_dropout,
)
from moat_kernels.ops.window_attention import WindowAttentionDescription


class MBConvBlock(MBConvAdapter):
    implementation = "Apple ANE MOAT"
    class_name = "MBConvBlock"
    children = ("_depthwise_conv", "_bn1", "_project_conv", "_bn2", "_swish")
    optional = (
        *("pre_norm_layer", "_expand_conv", "_bn0", "_se_reduce", "_se_expand", "dropout"),
        *("shortcut_pool", "shortcut_conv"),
    )
    covers = "everything that MOAT builds: norm after the projection, eps of each norm"
    leaves = "expand_ratio 1; in training: dropout"

    def read(self, block: Any) -> Bottleneck:
        arguments = block._block_args
        if arguments.expand_ratio == 1:
            raise NotCovered("expand_ratio 1")
        if arguments.stride not in (1, 2):
            raise NotCovered(f"stride {arguments.stride}")
        same_channels = arguments.input_filters == arguments.output_filters
        if arguments.id_skip and arguments.stride == 1 and same_channels and block.drop_rate:
            refuse_dropout(block.dropout, "the residual")
        gate = None
        if block.has_se:
            gate = read_gate(block._se_reduce, block._swish, block._se_expand, None)
        return read_bottleneck(
            pre_norm=block.pre_norm_layer if block.pre_norm else None,
            expand=block._expand_conv,
            expand_norm=block._bn0,
            expand_activation=block._swish,
            depthwise=block._depthwise_conv,
            depthwise_norm=block._bn1,
            depthwise_activation=block._swish,
            gate=gate,
            project=block._project_conv,
            project_norm=block._bn2,
            residual=bool(arguments.id_skip),
            pool=block.shortcut_pool if arguments.id_skip and arguments.stride == 2 else None,
            shortcut=block.shortcut_conv if arguments.id_skip else None,
        )


class WindowAttention(AttentionAdapter):
    """Its three projections become one matrix product, on weights that are joined at each call."""

    implementation = "Apple ANE MOAT"
    class_name = "WindowAttention"
    children = ("q_proj", "k_proj", "v_proj", "proj", "softmax", "attn_drop", "proj_drop")
    optional = ("LePE_for_Value",)
    tensors = ("relative_position_bias_table", "abs_pe")
    covers = "PEType.SINGLE_HEAD_RPE (one table for all heads), and no position encoding"
    leaves = "local position encoding (LePE_ADD, its default); in training: dropout"

    def read(self, module: Any) -> AttentionReading:
        if hasattr(module, "LePE_for_Value") or hasattr(module, "abs_pe"):
            raise NotCovered("local position encoding (LePE)")
        for dropout, what in ((module.attn_drop, "weights"), (module.proj_drop, "projection")):
            refuse_dropout(dropout, f"the attention {what}")
        if class_name(module.softmax) != "Softmax" or module.softmax.dim != 1:
            raise NotCovered(f"attention weights by {module.softmax}")
        heads, window = module.num_heads, tuple(module.window_size)
        description = WindowAttentionDescription(
            heads, module.dim // heads, None, float(module.scale)
        )
        table = getattr(module, "relative_position_bias_table", None)
        if table is None:
            return AttentionReading(description, None)
        if table.shape != (2 * window[0] - 1, 2 * window[1] - 1, 1):
            raise NotCovered(f"a bias table {tuple(table.shape)} for windows of {window}")
        if heads > 1 and module.pe_type.name != "SINGLE_HEAD_RPE":
            raise NotCovered(f"PEType.{module.pe_type.name} with a table of one head")
        # Its scores are [key, query], so that its order is the op's: key - query.
        return AttentionReading(description, table.permute(2, 0, 1).expand(heads, -1, -1))

    def compute(
        self, module: Any, attention: AttentionReading, *inputs: Any, **options: Any
    ) -> Tensor:
        (x,) = inputs  # [windows, tokens, C]
        window = tuple(module.window_size)
        if x.shape[1] != window[0] * window[1]:
            raise NotCovered(f"{x.shape[1]} tokens for windows of {window}")
        parts = [read_pointwise(proj) for proj in (module.q_proj, module.k_proj, module.v_proj)]
        weight = torch.cat([part[0].flatten(1) for part in parts])
        biases = [part[1] for part in parts if part[1] is not None]
        if len(biases) not in (0, 3):
            raise NotCovered("projections with and without bias")
        qkv = F.linear(x, weight, torch.cat(biases) if biases else None)
        rows = attention.attend(qkv.unflatten(1, window)).flatten(1, 2)
        weight, bias = read_pointwise(module.proj)
        return F.linear(rows, weight.flatten(1), bias)

    def example(self, module: Any) -> tuple[Tensor, ...]:
        tokens = module.window_size[0] * module.window_size[1]
        return (torch.randn(2, tokens, module.dim, dtype=torch.float64),)


ADAPTERS = (MBConvBlock(), WindowAttention())
