"""Checks of tensor arguments that all ops share."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

FLOATING = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def check_tensor(name: str, x: object, shape: str) -> None:
    """`x` must be a 4-dimensional floating-point tensor; `shape` says what the axes are."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(x).__name__}")
    if x.dtype not in FLOATING:
        raise TypeError(f"{name} must be float64, float32, float16 or bfloat16, got {x.dtype}")
    if x.dim() != 4:
        raise ValueError(f"{name} must be {shape}, got shape {tuple(x.shape)}")


def check_positive_integer(name: str, value: object) -> None:
    """Raise ValueError naming the argument if it is not a positive integer."""
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{name} must be a positive integer, got {value!r}")


def check_positive_integers(**arguments: object) -> None:
    """The same of several arguments."""
    for name, value in arguments.items():
        check_positive_integer(name, value)


def check_choice(name: str, value: object, choices: tuple[object, ...]) -> None:
    """Raise ValueError naming the argument if it is none of `choices`."""
    if value not in choices:
        supported = ", ".join(repr(choice) for choice in choices)
        raise ValueError(f"{name} must be one of {supported}, got {value!r}")


def check_devices(op: str, x: Tensor, tensors: Mapping[str, Tensor | None]) -> None:
    """All must be on x's device. RuntimeError, as of stock's layers.

    Some of those return memory that nobody wrote where x is on a CPU and the weight on meta.
    """
    for name, tensor in tensors.items():
        if tensor is not None and tensor.device != x.device:
            raise RuntimeError(
                f"{op}: {name} is on {tensor.device} but x is on {x.device}; "
                "all tensors must be on one device"
            )
