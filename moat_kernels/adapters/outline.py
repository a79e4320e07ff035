"""Blocks alike, told by one pass over their modules: what was read of one holds for all of them.

Reading a block (reading.py) looks at every setting and takes tens of microseconds. So what follows
from settings and classes is kept by its outline. Tensors are read in every call; hooks, settings,
and modules and methods that were replaced are looked at in every call, too.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from operator import attrgetter
from typing import Any, Generic, NamedTuple, TypeVar

import torch
from torch import nn

from moat_kernels.adapters.reading import ACTIVATIONS
from moat_kernels.inspection import hooks_for_all_modules, touch_of
from moat_kernels.normalization import describe_norm
from moat_kernels.ops.common.batch_norm import Norm

Value = TypeVar("Value")

# All that reading looks at of a module beside its class, its children and its tensors.
Settings = Callable[[Any], Hashable]

_MOST_KEPT = 1024
_MOST_MODULES = 256
_PLAIN = (type, type(None), bool, int, float, str, Norm)


def _nothing(_: nn.Module) -> None:
    return None


def own_tensors(module: nn.Module) -> tuple[str, ...] | None:
    """Names of the parameters and buffers that a module holds itself; None: there are none."""
    parameters, buffers = module._parameters, module._buffers
    if not (parameters or buffers):
        return None
    own = [name for name, tensor in parameters.items() if tensor is not None]
    own += [name for name, tensor in buffers.items() if tensor is not None]
    return tuple(own)


_convolution_settings = attrgetter(
    *("kernel_size", "stride", "padding", "dilation", "groups", "padding_mode"),
    *("in_channels", "out_channels"),
)


def _read_convolution(conv: nn.Conv2d) -> Hashable:
    return _convolution_settings(conv), conv._parameters["weight"].shape  # type: ignore[union-attr]


_read_pool = attrgetter("kernel_size", "stride", "padding", "ceil_mode")

# By the name of the class, for those of torch.nn and for what several packages call the same.
COMMON: Mapping[str, Settings] = {
    **dict.fromkeys(ACTIVATIONS, _nothing),
    "GELU": lambda module: getattr(module, "approximate", None),
    **dict.fromkeys(("Sigmoid", "Sequential", "Linear"), _nothing),
    **dict.fromkeys(("Conv2d", "Conv2dSame"), _read_convolution),
    **dict.fromkeys(("BatchNorm2d", "BatchNormAct2d", "SyncBatchNorm"), describe_norm),
    **dict.fromkeys(("LayerNorm", "LayerNorm2d"), attrgetter("normalized_shape", "eps")),
    **dict.fromkeys(
        ("AvgPool2d", "AvgPool2dSame"),
        lambda pool: (_read_pool(pool), pool.count_include_pad, pool.divisor_override),
    ),
    **dict.fromkeys(("MaxPool2d", "MaxPool2dSame"), lambda pool: (_read_pool(pool), pool.dilation)),
    "Dropout": attrgetter("p", "training"),
}


class Seen(NamedTuple, Generic[Value]):
    """A block: its key, its modules in the order of the key, and what is kept for it, if anything.

    Blocks of the same key are read alike, the same places among `modules` playing the same parts.
    """

    key: tuple[Any, ...]
    modules: list[nn.Module]
    kept: Value | None

    def at(self, found: Iterable[int | None]) -> list[Any]:
        """The modules at `places`, None for None."""
        modules = self.modules
        return [None if place is None else modules[place] for place in found]


class _Touched(Exception):
    """A module of which more must be looked at than its settings."""


class _Kind(NamedTuple):
    """What to do with modules of a class. descends: whether to look at their children."""

    read: Settings
    touches: Callable[[nn.Module], bool]
    descends: bool


class Outline(Generic[Value]):
    """Tells blocks of one adapter apart, and keeps what was read of each kind.

    classes: by the name of the class what reading looks at, of modules inside; a block that holds
        others has no outline. A class is never told by its name alone: it is part of the key.
    settings, optional: names of what reading looks at of the block itself; of its attributes that
        may be None in place of a module.
    called: names of the block's children that are called, and of the classes whose children are.
    methods: names of the block's methods that its stock `forward` calls.
    """

    def __init__(
        self,
        classes: Mapping[str, Settings],
        *,
        settings: Iterable[str] = (),
        optional: Iterable[str] = (),
        called: Iterable[str] = (),
        methods: Iterable[str] = (),
    ) -> None:
        self._classes = {**COMMON, **classes}
        self._settings, self._optional = tuple(settings), tuple(optional)
        self._called, self._methods = frozenset(called), frozenset(methods)
        # Threads may race to add the same, which is harmless.
        self._kinds: dict[type[nn.Module], _Kind] = {}
        self._kept: dict[tuple[Any, ...], Value] = {}

    def look(self, block: nn.Module) -> Seen[Value] | None:
        """The block as it is now; None if its modules must be looked at one by one."""
        if torch.compiler.is_compiling() or hooks_for_all_modules():
            return None
        try:
            key, modules = self._describe(block)
            return Seen(key, modules, self._kept.get(key))
        # Besides: an unknown class or attribute; a list, say, among the settings.
        except (_Touched, AttributeError, KeyError, TypeError, ValueError):
            return None

    def keep(self, seen: Seen[Value], value: Value) -> None:
        """Keep what was read of such blocks, where the key refers to nothing that may change."""
        if _is_plain(seen.key):
            if len(self._kept) >= _MOST_KEPT:
                self._kept.clear()
            self._kept[seen.key] = value

    def _describe(self, block: nn.Module) -> tuple[tuple[Any, ...], list[nn.Module]]:
        own, children = block.__dict__, block._modules
        if block._parameters or block._buffers or not own.keys().isdisjoint(self._methods):
            raise _Touched
        key: list[Any] = [type(block), *children]
        key += [own[name] for name in self._settings]
        key += [own.get(name) for name in self._optional]
        called, kinds = self._called, self._kinds
        modules: list[Any] = [child for name, child in children.items() if name not in called]
        for module in modules:  # which grows
            kind = type(module)
            read, touches, descends = kinds.get(kind) or self._learn(kind)
            if touches(module):
                raise _Touched
            inner = module._modules
            key += (kind, read(module), *inner)
            if inner and descends:
                if len(modules) > _MOST_MODULES:  # one may be inside of itself
                    raise _Touched
                modules += inner.values()
        return tuple(key), modules

    def _learn(self, kind: type[nn.Module]) -> _Kind:
        """What to do with modules of a class; noted. Raises KeyError if it is not known."""
        read = self._classes[kind.__name__]
        self._kinds[kind] = _Kind(read, touch_of(kind), kind.__name__ not in self._called)
        return self._kinds[kind]


def places(
    modules: Sequence[nn.Module], parts: Iterable[nn.Module | None]
) -> tuple[int | None, ...] | None:
    """Where the parts are among the modules, None of None.

    None at all if one is not there, or if one module is in two places, which may be two later.
    """
    found = {id(module): index for index, module in enumerate(modules)}
    wanted = [part if part is None else found.get(id(part), -1) for part in parts]
    return None if len(found) < len(modules) or -1 in wanted else tuple(wanted)


def _is_plain(value: Any) -> bool:
    if isinstance(value, tuple):
        return all(map(_is_plain, value))
    return isinstance(value, _PLAIN)
