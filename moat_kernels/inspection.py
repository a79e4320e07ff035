"""Whether modules are as they were made, so that their tensors say all that they compute.

A fused op does not call the modules whose tensors it reads, so one that a user hooked, changed or
replaced (an adapter, quantisation) must run as itself.
"""

from __future__ import annotations

from torch import nn

from moat_kernels.drop_path import DropPath
from moat_kernels.normalization import BatchNorm2d, SyncBatchNorm
from moat_kernels.reference import SameConv2d, SqueezeExcitation
from moat_kernels.tensor_access import plain_class

_STOCK_CLASSES = (
    nn.Conv2d,
    nn.Linear,
    nn.LayerNorm,
    BatchNorm2d,
    SyncBatchNorm,
    nn.SyncBatchNorm,
    DropPath,
    SameConv2d,
    SqueezeExcitation,
)


def runs_as_its_class(module: nn.Module) -> bool:
    """Whether a call of the module runs the forward of its class and nothing else: no hooks."""
    return not (
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or "forward" in module.__dict__
    )


def interception(module: nn.Module, name: str) -> str:
    """What else runs when the module, to be called `name`, is called; empty if nothing does."""
    if runs_as_its_class(module):
        return ""
    replaced = "forward" in module.__dict__
    return f"the forward of {name} was replaced" if replaced else f"{name} has hooks"


def obstacle(owner: nn.Module, names: tuple[str, ...]) -> str:
    """Why the submodules `names` cannot be read as plain tensors; empty if they can."""
    for name in names:
        child = owner._modules[name] if name in owner._modules else getattr(owner, name)
        if child is None or _is_plain(child):
            continue
        for path, module in child.named_modules(prefix=name):
            if ".parametrizations" in path:
                continue  # they run when the tensor is read
            if plain_class(module) not in _STOCK_CLASSES:
                return f"{path} was replaced by {type(module).__name__}"
            if found := interception(module, path):
                return found
    return ""


def difference(
    module: nn.Module, classes: tuple[type[nn.Module], ...], children: tuple[str, ...]
) -> str:
    """What tells a module from one of `classes` as it is made, itself or in these children.

    Empty if nothing does.
    """
    if type(module) not in classes or "forward" in module.__dict__:
        return f"a {type(module).__name__} with a forward of its own"
    return interception(module, "it") or obstacle(module, children)


def _is_plain(module: nn.Module) -> bool:
    """Stock all the way down and not parametrized: the usual case, told quickly."""
    if type(module) not in _STOCK_CLASSES or not runs_as_its_class(module):
        return False
    # Most have no children, for whom a generator would take longer than all the rest.
    children = module._modules
    return not children or all(child is None or _is_plain(child) for child in children.values())
