"""Whether modules run as their classes do, so that tensors and settings say what they compute.

A fused op does not call the modules whose tensors it reads. One that a user hooked, patched or
replaced (an adapter, quantisation, offloading) must run as itself; here that is found out.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Sequence
from functools import lru_cache
from operator import attrgetter
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor
from torch.nn.modules import module as torch_module
from torch.utils.module_tracker import ModuleTracker

from moat_kernels.drop_path import DropPath
from moat_kernels.normalization import BatchNorm2d, SyncBatchNorm
from moat_kernels.reference import SameConv2d, SqueezeExcitation
from moat_kernels.tensor_access import child, plain_class

Kind = TypeVar("Kind", bound=type[nn.Module])

# Tensors that are read from where nn.Module keeps them: a plain attribute of the name hides one.
_TENSORS = frozenset(("weight", "bias", "running_mean", "running_var"))

# Methods of nn.Module that a call runs, and those of its subclasses that say nothing about one.
_CALLED = frozenset(("forward", "_call_impl", "_wrapped_call_impl"))
_SILENT = frozenset(("extra_repr", "reset_parameters", *dir(nn.Module))) - _CALLED


@lru_cache(maxsize=512)
def _names(kind: Any) -> frozenset[str]:
    """What a plain attribute of an instance must not be called."""
    return _methods(kind) | _TENSORS


def _methods(kind: Any) -> frozenset[str]:
    """Names of the methods of a module class that may say what a call of it computes."""
    names = (name for name in dir(kind) if name not in _SILENT and not name.startswith("__"))
    return _CALLED | {name for name in names if inspect.isroutine(getattr(kind, name))}


class _Code(NamedTuple):
    """The methods of a class: how to get them, what they were at first, and `_names`."""

    read: Callable[[type], Any]
    methods: Any
    forward: Any
    names: frozenset[str]


_CODE: dict[Any, _Code] = {}


def remember_code(kind: Kind) -> Kind:
    """Note the methods of a module class, so that others put in their place later are noticed."""
    read = attrgetter(*sorted(_methods(kind)))
    _CODE[kind] = _Code(read, read(kind), kind.forward, _names(kind))  # type: ignore[arg-type]
    return kind


for _kind in (
    *(nn.Conv2d, nn.Linear, nn.LayerNorm, nn.BatchNorm2d, nn.SyncBatchNorm),
    *(BatchNorm2d, SyncBatchNorm, DropPath, SameConv2d, SqueezeExcitation),
):
    remember_code(_kind)


def _is_patched(module: nn.Module) -> bool:
    """Whether a method was replaced on the instance, or in its class if that is remembered."""
    own, kind = module.__dict__, type(module)
    code = _CODE.get(kind) or _CODE.get(plain_class(module))
    if code is None:
        return not own.keys().isdisjoint(_names(kind))  # type: ignore[arg-type]
    return code.read(kind) != code.methods or not own.keys().isdisjoint(code.names)


def _is_patched_where_traced(module: nn.Module) -> bool:
    """The same as far as torch.compile can follow: neither caches nor sets of names."""
    own, kind = module.__dict__, type(module)
    code = _CODE.get(kind) or _CODE.get(plain_class(module))
    replaced = code is not None and kind.forward is not code.forward
    return replaced or "forward" in own or "_conv_forward" in own


def has_hooks(module: nn.Module) -> bool:
    """Whether hooks of the module run when it is called."""
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
    )


def is_touched(module: nn.Module) -> bool:
    """Whether hooks of the module, or what replaced a method of it, run when it is called."""
    is_patched = _is_patched_where_traced if torch.compiler.is_compiling() else _is_patched
    return has_hooks(module) or is_patched(module)


def are_touched(modules: Iterable[nn.Module | None]) -> bool:
    """Whether any is; for eager calls, in which it is asked of many."""
    for module in modules:
        if module is not None and (has_hooks(module) or _is_patched(module)):
            return True
    return False


def touch_of(kind: type[nn.Module]) -> Callable[[nn.Module], bool]:
    """`is_touched` of modules of exactly that class, not parametrized, in eager calls."""
    code = _CODE.get(kind)
    names = _names(kind) if code is None else code.names  # type: ignore[arg-type]
    read, methods = (None, None) if code is None else (code.read, code.methods)

    def touches(module: nn.Module) -> bool:
        return bool(
            module._forward_hooks
            or module._forward_pre_hooks
            or module._backward_hooks
            or module._backward_pre_hooks
            or not module.__dict__.keys().isdisjoint(names)
            or (read is not None and read(kind) != methods)
        )

    return touches


def hooks_for_all_modules() -> bool:
    """Whether a hook is registered for every module of the process, and wants to see each call.

    PyTorch's ModuleTracker, which FlopCounterMode has, only wants to know where it is.
    """
    if not (
        torch_module._global_forward_pre_hooks
        or torch_module._global_forward_hooks
        or torch_module._global_backward_pre_hooks
        or torch_module._global_backward_hooks
    ):
        return False
    hooks = (
        *torch_module._global_forward_pre_hooks.values(),
        *torch_module._global_forward_hooks.values(),
        *torch_module._global_backward_pre_hooks.values(),
        *torch_module._global_backward_hooks.values(),
    )
    return not all(isinstance(getattr(hook, "__self__", None), ModuleTracker) for hook in hooks)


def runs_as_its_class(module: nn.Module) -> bool:
    """Whether a call of the module runs the forward of its class and nothing else."""
    return not (is_touched(module) or hooks_for_all_modules())


def interception(module: nn.Module, name: str) -> str:
    """What else runs when the module, to be called `name`, is called; empty if nothing does."""
    if is_touched(module):
        method = "" if has_hooks(module) else replaced_method(module)
        return f"the {method} of {name} was replaced" if method else f"{name} has hooks"
    return "hooks for all modules are registered" if hooks_for_all_modules() else ""


def replaced_method(module: nn.Module) -> str:
    """The name of a method that was replaced on the instance; empty if none was."""
    patched = _is_patched_where_traced if torch.compiler.is_compiling() else _is_patched
    if not patched(module):
        return ""
    own = _names(type(module)).intersection(module.__dict__)  # type: ignore[arg-type]
    return min(own, default="forward")


def interceptions(owner: nn.Module, names: Iterable[str]) -> str:
    """The first `interception` of the children `names`, or of what is inside them, or ""."""
    for name in names:
        module = child(owner, name)
        if not isinstance(module, nn.Module):
            continue
        for path, inner in module.named_modules(prefix=name):
            if ".parametrizations" in path:
                continue  # they run when the tensor is read
            if found := interception(inner, path):
                return found
    return ""


def overridden(module: nn.Module, methods: Iterable[Callable[..., Any]]) -> str:
    """The name of one of `methods`, functions of this package, that the module does not have.

    A subclass, the instance, or whoever patched the class has another; empty if none has.
    """
    for function in methods:
        name = function.__name__
        if name in module.__dict__ or getattr(type(module), name) is not function:
            return name
    return ""


def is_plain_tensor(tensor: Any) -> bool:
    """Whether a tensor's memory says what it is: neither a subclass nor one that is not there yet.

    None is no tensor, and plain.
    """
    kind = type(tensor)
    if kind is nn.Parameter or kind is Tensor:
        return True
    return tensor is None or isinstance(tensor, FakeTensor | FunctionalTensor)


_PLAIN_TENSORS = frozenset((nn.Parameter, Tensor, type(None)))


def are_plain_tensors(tensors: Sequence[Any]) -> bool:
    """Whether all are; quickly where they are of the usual classes."""
    if not torch.compiler.is_compiling() and _PLAIN_TENSORS.issuperset(map(type, tensors)):
        return True
    return all(map(is_plain_tensor, tensors))


def is_plain(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether a module is of a class, runs as that, and holds plain tensors."""
    if plain_class(module) is not kind or not runs_as_its_class(module):
        return False
    return are_plain_tensors(tuple(module._parameters.values()))
