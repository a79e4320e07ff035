"""The adapters that `fuse` knows: those of this package and the user's."""

from __future__ import annotations

from moat_kernels.adapters import (
    apple,
    changzy00,
    reference,
    rookichenn,
    timm,
    torchvision,
    vit_pytorch,
)
from moat_kernels.adapters.base import Adapter

_MODULES = (reference, timm, torchvision, vit_pytorch, rookichenn, apple, changzy00)
_ADAPTERS: dict[str, Adapter] = {
    adapter.key: adapter for module in _MODULES for adapter in module.ADAPTERS
}


def register_adapter(adapter: Adapter) -> None:
    """Let `fuse` use `adapter`, before those of this package; see `adapters.MBConvAdapter`.

    Register it before a pickled fused model is loaded. Raises TypeError if it is not an Adapter,
    ValueError if another one of its implementation and class_name is there.
    """
    if not isinstance(adapter, Adapter):
        raise TypeError(f"adapter must be an instance of a subclass of Adapter, got {adapter!r}")
    if adapter.key in _ADAPTERS:
        raise ValueError(f"adapter {adapter.key!r} is registered already")
    others = dict(_ADAPTERS)
    _ADAPTERS.clear()
    _ADAPTERS.update({adapter.key: adapter, **others})


def all_adapters() -> tuple[Adapter, ...]:
    """Every adapter, in the order in which they are tried."""
    return tuple(_ADAPTERS.values())


def find_adapter(key: str) -> Adapter:
    """The adapter called `key`. Raises LookupError if it is not registered."""
    if key not in _ADAPTERS:
        raise LookupError(
            f"no adapter {key!r}: a model fused by it needs moat_kernels.register_adapter first"
        )
    return _ADAPTERS[key]
