"""`fuse` and `unfuse`: the fused ops in a model that somebody else wrote, in place and back."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from torch import nn

from moat_kernels.adapters.base import Adapter
from moat_kernels.adapters.fused import FusedModule, fused_class, is_changed, stock_class
from moat_kernels.adapters.reading import NotCovered, NotCoveredInTraining
from moat_kernels.adapters.registry import all_adapters
from moat_kernels.adapters.timm import UNFUSED
from moat_kernels.adapters.verification import unread, verify
from moat_kernels.inspection import replaced_method
from moat_kernels.modules import FusedAttention, FusedInvertedBottleneck
from moat_kernels.ops.mbconv.checks import RECOMPUTE_LEVELS


@dataclass(frozen=True)
class FusedEntry:
    """One fused module: its path, its own class, whose it is, the op, and what to know of it."""

    path: str
    class_name: str
    implementation: str
    op: str
    note: str = ""


@dataclass(frozen=True)
class SkippedEntry:
    """One module that looks like a block and was left as it is, and the reason."""

    path: str
    class_name: str
    reason: str


@dataclass(frozen=True)
class FusionReport:
    """What `fuse` did. Printed, it is one line per module."""

    fused: tuple[FusedEntry, ...]
    skipped: tuple[SkippedEntry, ...]

    def __str__(self) -> str:
        count = Counter(entry.op for entry in self.fused)
        ops = ", ".join(f"{number} by {op}" for op, number in sorted(count.items()))
        lines = [f"fused {len(self.fused)} modules" + (f": {ops}" if ops else "")]
        lines += [
            f"  {entry.path or '(the model)'}  {entry.class_name} of {entry.implementation}"
            + (f"; {entry.note}" if entry.note else "")
            for entry in self.fused
        ]
        if self.skipped:
            lines.append(f"left {len(self.skipped)} modules as they are:")
        lines += [
            f"  {entry.path or '(the model)'}  {entry.class_name}: {entry.reason}"
            for entry in self.skipped
        ]
        return "\n".join(lines)


def fuse(model: nn.Module, recompute: str = "auto") -> FusionReport:
    """Compute the blocks that are known, anywhere in `model`, by fused ops; tell what was done.

    Changes the classes of the modules in place, nothing else: parameters, buffers, names, hooks
    and state_dict stay, so that optimisers, checkpoints, copies and pickles do not notice.
    Outputs, gradients and running statistics are those of the stock module, in training and eval,
    up to rounding. A module of an unknown variant is left alone and reported with the reason.
    What is hooked or replaced inside a fused module later makes it run unfused, with a
    FallbackWarning. Fusing again is harmless, and how `recompute` is changed.

    recompute: what mbconv's backward pass recomputes, as in FusedMBConv.

    >>> from moat_kernels.reference import MBConvBlock
    >>> model = nn.Sequential(MBConvBlock(8, 8), nn.Flatten())
    >>> print(fuse(model))
    fused 1 modules: 1 by mbconv
      0  MBConvBlock of moat_kernels.reference

    Raises TypeError if `model` is no module, ValueError for an unknown `recompute`.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    if recompute not in RECOMPUTE_LEVELS:
        raise ValueError(f"recompute must be one of {RECOMPUTE_LEVELS}, got {recompute!r}")
    return _Fusion(recompute).run(model)


def unfuse(model: nn.Module) -> tuple[str, ...]:
    """Undo `fuse`, wherever in `model`; the paths of the modules that are stock again.

    Raises RuntimeError, before anything is changed, if a fused module has changed its class since
    (`fully_shard` does that); TypeError if `model` is no module.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    found = {path: item for path, item in model.named_modules() if isinstance(item, FusedModule)}
    for path, module in found.items():
        if is_changed(module):
            raise RuntimeError(
                f"{path or 'model'} became a {type(module).__name__} after it was fused; undo that "
                "before unfuse"
            )
    for module in found.values():
        _set_class(module, module.stock_class)
    return tuple(found)


class _Fusion:
    """One walk through a model."""

    def __init__(self, recompute: str) -> None:
        self.recompute = recompute
        self.fused: list[FusedEntry] = []
        self.skipped: list[SkippedEntry] = []
        self.classes: dict[nn.Module, type[nn.Module]] = {}
        self.inside: set[nn.Module] = set()  # of fused modules; not to be fused by themselves
        self.verified: dict[tuple[str, type, str], str] = {}

    def run(self, model: nn.Module) -> FusionReport:
        """Decide about every module, then change the classes."""
        for path, module in model.named_modules():
            if module not in self.inside:
                self._visit(path, module)
        for module, kind in self.classes.items():
            _set_class(module, kind)
        return FusionReport(tuple(self.fused), tuple(self.skipped))

    def _visit(self, path: str, module: nn.Module) -> None:
        kind = stock_class(module)
        if issubclass(kind, FusedInvertedBottleneck | FusedAttention):
            op = "mbconv" if issubclass(kind, FusedInvertedBottleneck) else "window_attention"
            self.fused.append(FusedEntry(path, kind.__name__, "moat_kernels", op, "built fused"))
            return
        named = [adapter for adapter in all_adapters() if adapter.is_for(kind)]
        adapter = next((adapter for adapter in named if adapter.recognises(module)), None)
        try:
            if isinstance(module, FusedModule) and is_changed(module):
                raise NotCovered(f"it was fused, and became a {type(module).__name__} since")
            if adapter is None:
                self._check_unknown(kind, named)
                return
            note = self._check(adapter, kind, module)
        except NotCovered as obstacle:
            self.skipped.append(SkippedEntry(path, kind.__name__, str(obstacle)))
            if isinstance(module, FusedModule) and not is_changed(module):
                self.classes[module] = kind
            return
        self.classes[module] = fused_class(kind, adapter.key, self.recompute)
        self.inside.update(adapter.consumed(module))
        self.fused.append(FusedEntry(path, kind.__name__, adapter.implementation, adapter.op, note))

    def _check_unknown(self, kind: type[nn.Module], named: list[Adapter]) -> None:
        """Raise NotCovered for a module that only its name, or its base class, makes look known."""
        if kind is nn.Sequential:
            return
        if kind.__name__ in UNFUSED:
            raise NotCovered(UNFUSED[kind.__name__])
        if named:
            raise NotCovered("a class of this name, but of unknown structure")
        for base in kind.__mro__[1:]:
            if base is not nn.Sequential and any(item.is_for(base) for item in all_adapters()):
                raise NotCovered(f"a subclass of {base.__name__}")

    def _check(self, adapter: Adapter, kind: type[nn.Module], module: nn.Module) -> str:
        """Raise NotCovered, or return what to note. The module stays as it is."""
        if method := replaced_method(module):
            raise NotCovered(f"its {method} was replaced")
        reason = ""
        try:
            adapter.check(unread(module))
        except NotCoveredInTraining as obstacle:
            reason = str(obstacle)
        key = (adapter.key, kind, _signature(module))
        if key not in self.verified:
            self.verified[key] = verify(adapter, module)
        reason = reason or self.verified[key]
        return f"in eval only: {reason}" if reason else ""


def _set_class(module: nn.Module, kind: type[nn.Module]) -> None:
    module.__class__ = kind


def _signature(module: nn.Module) -> str:
    """What tells modules that compute differently apart: their structure and settings."""
    settings = [
        (name, value)
        for inner in module.modules()
        for name, value in inner.__dict__.items()
        if name != "training" and isinstance(value, bool | int | float | str | tuple)
    ]
    return f"{module!r} {settings}"
