"""The official variable names and layouts of MOAT, and the parameters of ours they correspond to.

One table, :data:`BLOCK` with :data:`STEM` and :data:`HEAD`, drives both directions. See ``rules``
for what its entries mean.
"""

from __future__ import annotations

import re

from .errors import CheckpointError
from .rules import (
    Naming,
    Place,
    Rule,
    Section,
    attention,
    batch_norm,
    bias,
    convolution,
    convolution_kernel,
    depthwise_kernel,
    find,
    layer_norm,
    pointwise_kernel,
    same,
    weight,
)

#: Scopes the official names begin with: a whole model or a MOAT block, and a single MBConv block.
SCOPES = ("moat", "mbconv")

STEM = Section(
    required=(
        *convolution("conv_0", "conv_0", 3, "image_channels", "width"),
        *batch_norm("norm_0", "norm_0", "width"),
        *convolution("conv_1", "conv_1", 3, "width", "channels"),
    ),
    optional={},
)

BLOCK = Section(
    required=(
        weight(
            "expand_conv", "expand_conv/kernel", (1, 1, "in_channels", "inner"), convolution_kernel
        ),
        *batch_norm("pre_norm", "pre_norm", "in_channels"),
        *batch_norm("expand_norm", "expand_norm", "inner"),
        weight(
            "depthwise_conv",
            "depthwise_conv/depthwise_kernel",
            (3, 3, "inner", 1),
            depthwise_kernel,
        ),
        *batch_norm("depthwise_norm", "depthwise_norm", "inner"),
        *convolution("shrink_conv", "shrink_conv", 1, "inner", "channels"),
    ),
    optional={
        "shortcut_conv": convolution(
            "shortcut_conv", "shortcut_conv", 1, "in_channels", "channels"
        ),
        "se": (
            *convolution("se.reduce", "se/reduce_conv2d", 1, "inner", "reduced"),
            *convolution("se.expand", "se/expand_conv2d", 1, "reduced", "inner"),
        ),
        "attention": attention("attention_norm", "head_dim"),
        "position_embedding": (
            Rule(
                "attention.relative_position_embedding",
                ("attention/relative_position_embedding",),
                ("heads", "extent", "extent"),
                same,
            ),
        ),
    },
)

HEAD = Section(
    required=(
        *layer_norm("final_layer_norm", "final_layer_norm", "channels"),
        weight(
            "logits_head",
            "logits_head/kernel",
            (1, 1, "channels", "classes"),
            pointwise_kernel,
        ),
        bias("logits_head", "logits_head/bias", "classes"),
    ),
    optional={},
)

OFFICIAL = Naming(
    sections={"stem": STEM, "block": BLOCK, "head": HEAD, "single": BLOCK},
    prefixes={
        "stem": "stem/",
        "block": "block_{stage:02d}_{index:02d}/",
        "head": "",
        "single": "",
    },
    pattern=re.compile(r"(?:(stem)/|block_(\d{1,4})_(\d{1,4})/)?(.+)"),
)

_RULES_BY_PARAMETER = {
    kind: {rule.parameter: rule for rule in section.rules}
    for kind, section in OFFICIAL.sections.items()
}
_PARAMETER_PATTERN = re.compile(r"(?:(stem)\.|stages\.(\d{1,4})\.(\d{1,4})\.)?(.+)")


def official_names(parameter: str, scope: str = "moat") -> tuple[str, ...]:
    """The official variables that ``parameter`` of a model, or of a single block, is made of.

    >>> official_names("stages.2.1.expand_conv.weight")
    ('moat/block_02_01/expand_conv/kernel',)
    >>> official_names("attention.qkv.bias")
    ('moat/attention/q/bias', 'moat/attention/k/bias', 'moat/attention/v/bias')

    ``num_batches_tracked`` of a batch norm has no official counterpart: an empty tuple.

    Raises:
        CheckpointError: MOAT has no parameter of this name.
    """
    place, rule = find_parameter(parameter)
    return tuple(f"{scope}/{place.variable_prefix}{variable}" for variable in rule.variables)


def find_parameter(name: str) -> tuple[Place, Rule]:
    """The place and rule of a parameter of ours."""
    found = find(name, _PARAMETER_PATTERN, _RULES_BY_PARAMETER, OFFICIAL)
    if found is None or not name.startswith(found[0].parameter_prefix):
        raise CheckpointError(f"MOAT has no parameter {name!r}")
    return found
