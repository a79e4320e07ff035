"""Fused modules: a module changes its class, and nothing else.

The class that a fused module gets is made of its own: a subclass that computes one method by an
op. So its attributes, parameters, hooks and state_dict stay exactly what they are, `isinstance`
still holds, `repr` shows the change, and the old class put back is the old module. (PyTorch does
the same for parametrizations and in `fully_shard`. A function put on the instance would survive
neither pickle nor deepcopy: both would call the old module's.)
"""

from __future__ import annotations

import copyreg
from typing import Any

from torch import nn

from moat_kernels.adapters.registry import find_adapter
from moat_kernels.modules import refuse_scripting


class FusedModule(nn.Module):
    """What every class that `fuse` makes has; `stock_class` is what it was made of."""

    stock_class: type[nn.Module]
    adapter_key: str
    recompute: str
    __prepare_scriptable__ = refuse_scripting

    def __reduce_ex__(self, protocol: Any) -> Any:
        """As the stock module's, but for the class, which has no name that pickle could find."""
        reduced: Any = super().__reduce_ex__(max(2, int(protocol)))
        function, arguments, *state = reduced
        if function is not copyreg.__newobj__:  # type: ignore[attr-defined]
            return (function, arguments, *state)  # the stock class has its own way of pickling
        rebuild = (self.stock_class, self.adapter_key, self.recompute, *arguments[1:])
        return (_rebuild, rebuild, *state)


_CLASSES: dict[tuple[type, str, str], type[FusedModule]] = {}


def _rebuild(stock: type[nn.Module], key: str, recompute: str, *arguments: Any) -> nn.Module:
    return stock.__new__(fused_class(stock, key, recompute), *arguments)


def fused_class(stock: type[nn.Module], key: str, recompute: str) -> type[FusedModule]:
    """The class of modules of class `stock` fused by the adapter called `key`; always the same."""
    if (stock, key, recompute) not in _CLASSES:
        parts = find_adapter(key).fused_class(stock, recompute)
        attributes = {
            "stock_class": stock,
            "adapter_key": key,
            "recompute": recompute,
            "__module__": __name__,
            "__doc__": f"{stock.__name__} computed by fused kernels; see moat_kernels.fuse.",
            **parts.attributes,
        }
        metaclass: Any = type(parts.base)
        bases = (FusedModule, parts.base)
        _CLASSES[stock, key, recompute] = metaclass(f"Fused{stock.__name__}", bases, attributes)
    return _CLASSES[stock, key, recompute]


def is_changed(module: FusedModule) -> bool:
    """Whether other code has given the module another class since it was fused."""
    kind = (module.stock_class, module.adapter_key, module.recompute)
    return type(module) is not fused_class(*kind)


def stock_class(module: nn.Module) -> type[nn.Module]:
    """The class that the module has, or had before `fuse`."""
    return module.stock_class if isinstance(module, FusedModule) else type(module)
