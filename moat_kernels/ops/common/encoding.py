"""Descriptions as text: operator schemas carry strings, not objects."""

from __future__ import annotations

import ast
from functools import cache
from typing import Any

import torch

from moat_kernels.ops.common.symbols import settled


def encode(description: Any) -> str:
    """A frozen dataclass of numbers, strings, tuples and such dataclasses as a Python literal."""
    # torch.compile follows plain string operations; a cache it would only warn about.
    return _literal(description) if torch.compiler.is_compiling() else _cached(description)


def decode_fields(text: str) -> dict[str, Any]:
    """The fields of an encoded dataclass by name; nested dataclasses are dicts too."""
    return ast.literal_eval(text)


def _literal(value: Any) -> str:
    if isinstance(value, tuple):
        return "(" + "".join([_literal(part) + ", " for part in value]) + ")"
    names = getattr(type(value), "__dataclass_fields__", None)
    if names is not None:
        return (
            "{" + ", ".join([f"{name!r}: {_literal(getattr(value, name))}" for name in names]) + "}"
        )
    # A symbol has no text.
    return repr(settled(value))


_cached = cache(_literal)
