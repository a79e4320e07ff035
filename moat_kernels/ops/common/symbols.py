"""Sizes and settings that may be symbols to compilers and exporters.

What is computed may not depend on a question about sizes that has another answer at another size:
`is_certain` asks without deciding. Settings, of which a module has one, are made numbers again.
"""

from __future__ import annotations

from typing import TypeVar

from torch import Tensor
from torch.fx.experimental.symbolic_shapes import guard_scalar, statically_known_true

Setting = TypeVar("Setting")


def is_certain(condition: bool) -> bool:
    """Whether a condition on sizes holds: of symbols, whether it holds at every size."""
    if condition is True or condition is False:
        return condition
    if isinstance(condition, Tensor):  # torch.jit.trace has tensors for sizes
        return bool(condition)
    return statically_known_true(condition)


def settled(value: Setting) -> Setting:
    """A number, or what else a setting may be, as it is now: what is compiled holds for it alone.

    With dynamic=True torch.compile makes symbols of numbers that modules hold. It learns late that
    operators cannot take them, and then does everything once more.
    """
    return guard_scalar(value) if isinstance(value, int | float) else value  # type: ignore[return-value]
