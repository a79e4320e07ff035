"""Edits that people make to models, drawn at random, to be made alike to a plain and a fused one.

A draw takes a `random.Random` and the module as it is, and returns an Edit or, where nothing fits,
None. What an edit needs at random it draws from a seed of its own: both modules get the same.
"""

from __future__ import annotations

from collections.abc import Callable
from random import Random

from torch import nn

from support.edits.making import Edit as Edit
from support.edits.making import Impossible as Impossible
from support.edits.order import (
    converted,
    copied,
    fused_again,
    part_in_another_mode,
    pickled,
    unfused,
)
from support.edits.patched import (
    hooked,
    hooked_and_unhooked,
    patched_method,
    subclass_without_change,
    watched,
)
from support.edits.replaced import (
    replaced_block,
    replaced_convolution,
    replaced_norm,
    replaced_other_part,
    replaced_part_of_attention,
    setting_of_a_model,
)
from support.edits.settings import (
    moved_stride,
    setting_of_a_block,
    setting_of_a_convolution,
    setting_of_a_layer_norm,
    setting_of_a_norm,
    setting_of_an_attention,
)
from support.edits.tensors import (
    another_dtype,
    another_tensor,
    frozen_parameters,
    parametrized,
    shared,
    something_else_inside,
)

Draw = Callable[[Random, nn.Module], Edit | None]

# How often each is drawn.
DRAWS: dict[Draw, int] = {
    setting_of_a_convolution: 10,
    moved_stride: 1,
    setting_of_a_norm: 8,
    setting_of_a_layer_norm: 3,
    setting_of_an_attention: 4,
    setting_of_a_block: 6,
    setting_of_a_model: 2,
    replaced_convolution: 8,
    replaced_norm: 6,
    replaced_part_of_attention: 6,
    replaced_other_part: 4,
    replaced_block: 4,
    patched_method: 10,
    subclass_without_change: 2,
    hooked: 8,
    watched: 3,
    hooked_and_unhooked: 1,
    parametrized: 8,
    another_tensor: 8,
    something_else_inside: 2,
    frozen_parameters: 4,
    another_dtype: 2,
    shared: 6,
    part_in_another_mode: 6,
    copied: 3,
    pickled: 3,
    fused_again: 3,
    unfused: 2,
    converted: 3,
}
