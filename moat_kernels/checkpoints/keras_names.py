"""The variable names and layouts of Keras MOATs, and the parameters of ours they correspond to.

These are the names of the layers (``stage2_block0_mb_conv2d_01/kernel``), which an object
checkpoint has beside its keys. Squeeze-and-excitation and the classifier are dense layers. See
``rules`` for what the entries mean.
"""

from __future__ import annotations

import re

from .rules import (
    Naming,
    Section,
    attention,
    batch_norm,
    bias,
    convolution,
    convolution_kernel,
    dense_kernel,
    dense_kernel_of_convolution,
    depthwise_kernel,
    layer_norm,
    weight,
)

#: What all names of a Keras MOAT begin with.
SCOPE = re.compile(r"(?:root|stage\d+_block\d+|predictions)_")
#: Only attention with ``use_pe=True`` has it.
POSITION_EMBEDDING = "relative_position_embedding"
# Fixed in these models; without a position embedding no shape of ours tells it.
_HEAD_DIM = 32

STEM = Section(
    required=(
        *convolution("conv_0", "conv2d_01", 3, "image_channels", "width"),
        *batch_norm("norm_0", "bn", "width"),
        *convolution("conv_1", "conv2d_02", 3, "width", "channels"),
    ),
    optional={},
)

BLOCK = Section(
    required=(
        *batch_norm("pre_norm", "mb_bn_01", "in_channels"),
        weight(
            "expand_conv",
            "mb_conv2d_01/kernel",
            (1, 1, "in_channels", "inner"),
            convolution_kernel,
        ),
        *batch_norm("expand_norm", "mb_bn_02", "inner"),
        weight(
            "depthwise_conv",
            "mb_conv2d_02/depthwise_kernel",
            (3, 3, "inner", 1),
            depthwise_kernel,
        ),
        *batch_norm("depthwise_norm", "mb_bn_03", "inner"),
        *convolution("shrink_conv", "mb_conv2d_03", 1, "inner", "channels"),
    ),
    optional={
        "shortcut_conv": convolution(
            "shortcut_conv", "mb_shortcut_conv", 1, "in_channels", "channels"
        ),
        "se": (
            weight(
                "se.reduce",
                "mb_se_dense_01/kernel",
                ("inner", "reduced"),
                dense_kernel_of_convolution,
            ),
            bias("se.reduce", "mb_se_dense_01/bias", "reduced"),
            weight(
                "se.expand",
                "mb_se_dense_02/kernel",
                ("reduced", "inner"),
                dense_kernel_of_convolution,
            ),
            bias("se.expand", "mb_se_dense_02/bias", "inner"),
        ),
        "attention": attention("ln", _HEAD_DIM),
    },
)

HEAD = Section(
    required=(
        *layer_norm("final_layer_norm", "predictions_norm", "channels"),
        weight("logits_head", "predictions_dense/kernel", ("channels", "classes"), dense_kernel),
        bias("logits_head", "predictions_dense/bias", "classes"),
    ),
    optional={},
)

KERAS = Naming(
    sections={"stem": STEM, "block": BLOCK, "head": HEAD},
    prefixes={"stem": "root_", "block": "stage{stage}_block{index}_", "head": ""},
    pattern=re.compile(r"(?:(root)_|stage(\d{1,4})_block(\d{1,4})_)?(.+)"),
)
