"""The packages whose models `fuse` is tested on; a test is skipped where one is missing.

torchvision's compiled operators load only beside the PyTorch build that they were made for, or by
torchvision_operators.py. Without them its import fails: it registers shapes and gradients for
operators that are not there. Its classifiers are plain Python and need none of them. So where the
import fails, it is repeated with exactly those registrations left out. timm imports torchvision,
and thereby profits.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from types import ModuleType
from typing import Any

import pytest
import torch

from support.torchvision_operators import load_operators

_REGISTRATIONS = ("register_fake", "register_autograd", "impl")


@contextmanager
def _without_torchvision_registrations() -> Iterator[None]:
    """torch.library's functions ignore operators called torchvision::*."""
    originals = {name: getattr(torch.library, name) for name in _REGISTRATIONS}

    def ignoring(original: Callable[..., Any]) -> Callable[..., Any]:
        def register(operator: Any, *arguments: Any, **options: Any) -> Any:
            if not str(operator).startswith("torchvision::"):
                return original(operator, *arguments, **options)
            return None if arguments and callable(arguments[-1]) else lambda function: function

        return register

    for name, original in originals.items():
        setattr(torch.library, name, ignoring(original))
    try:
        yield
    finally:
        for name, original in originals.items():
            setattr(torch.library, name, original)


@cache
def _import_torchvision() -> str:
    """Import torchvision; "" or why it cannot be."""
    load_operators()
    try:
        importlib.import_module("torchvision")
    except ModuleNotFoundError as error:
        if error.name == "torchvision":
            return "torchvision is not installed"
        raise
    except RuntimeError:  # "operator torchvision::nms does not exist"
        for name in [name for name in sys.modules if name.split(".")[0] == "torchvision"]:
            del sys.modules[name]
        with _without_torchvision_registrations():
            importlib.import_module("torchvision")
    return ""


def import_peer(name: str) -> ModuleType:
    """The module called `name` of torchvision, timm or vit_pytorch; skips where it is missing."""
    reason = _import_torchvision()
    package = name.split(".")[0]
    if reason and package in ("torchvision", "timm"):
        pytest.skip(reason, allow_module_level=True)
    return pytest.importorskip(name)


def import_own(name: str) -> ModuleType:
    """A module of this package; skips where a peer that it is for is missing."""
    return import_peer(name) if name == "moat_kernels.timm" else importlib.import_module(name)


def import_with_operators(name: str) -> ModuleType:
    """A module of torchvision that calls its compiled operators; skips where they are missing."""
    torchvision = import_peer("torchvision")
    if not torchvision.extension._has_ops():
        reason = f"torchvision {torchvision.__version__} has no operators for this torch"
        pytest.skip(reason, allow_module_level=True)
    return importlib.import_module(name)


def import_detector(name: str) -> ModuleType:
    """A module of the examples that calls torchvision's operators; skips where they are missing."""
    import_with_operators("torchvision")
    pytest.importorskip("PIL", reason="the example needs Pillow")
    pytest.importorskip("pycocotools", reason="the example needs pycocotools")
    return importlib.import_module(name)
