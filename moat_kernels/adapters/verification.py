"""Whether an adapter computes what a module computes: both ways on small random numbers.

Names and structure can be the same and the arithmetic not (a changed copy of somebody's code). So
before a module is fused, a copy of it with random weights runs both ways in float64.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from moat_kernels.adapters.base import Adapter
from moat_kernels.adapters.fused import stock_class
from moat_kernels.adapters.reading import NotCovered, NotCoveredInTraining
from moat_kernels.normalization import (
    BatchNorm2d,
    BatchNormAct2d,
    SyncBatchNorm,
    has_activation,
)
from moat_kernels.ops.common.backends import use_backend
from moat_kernels.tensor_access import is_parametrized

# float64, values of order one: what is the same differs by 1e-13, another eps by 1e-4.
TOLERANCE = 1e-8


def verify(adapter: Adapter, module: nn.Module) -> str:
    """Compare both ways, in training and in eval; "" or why it is fused in eval only.

    Raises NotCovered if it cannot be fused at all.
    """
    if not adapter.compared:
        return ""
    if any(tensor.is_meta for tensor in (*module.parameters(), *module.buffers())):
        raise NotCovered("its tensors are on the meta device: fuse after loading them")
    reason = ""
    with (
        torch.random.fork_rng(devices=()),
        use_backend("reference"),
        torch.no_grad(),
        torch.device("cpu"),
    ):
        try:
            stock = _randomized(_clone(module, {}))
        except Exception as error:
            raise NotCovered(f"trying it out failed: {error}") from error
        for run in adapter.trials:
            try:
                _compare(adapter, run, stock.train())
            except NotCoveredInTraining as obstacle:
                reason = str(obstacle)
            _compare(adapter, run, stock.eval())
    return reason


def unread(module: nn.Module) -> nn.Module:
    """The module, or a copy of it if reading its tensors may change them.

    A parametrization (spectral_norm's in training) may do so.
    """
    if not any(map(is_parametrized, module.modules())):
        return module
    try:
        return _clone(module, {})
    except Exception as error:
        raise NotCovered(f"trying it out failed: {error}") from error


def _clone(module: nn.Module, clones: dict[nn.Module, nn.Module]) -> nn.Module:
    """A stock module on the CPU, in float64, without hooks; other attributes are shared.

    Not a deepcopy: that would also copy whatever the attributes and the hooks refer to.
    """
    if module in clones:
        return clones[module]
    kind = _local_class(module)
    clones[module] = clone = kind.__new__(kind)
    attributes = clone.__dict__
    for name, value in module.__dict__.items():
        attributes[name] = type(value)() if name.endswith("_hooks") else value
    attributes["_parameters"] = {
        name: value if value is None else nn.Parameter(_double(value))
        for name, value in module._parameters.items()
    }
    attributes["_buffers"] = {
        name: value if value is None else _double(value) for name, value in module._buffers.items()
    }
    attributes["_modules"] = {
        name: value if value is None else _clone(value, clones)
        for name, value in module._modules.items()
    }
    if isinstance(module, nn.SyncBatchNorm):
        attributes["unbiased_running_var"] = True
    return clone


def _local_class(module: nn.Module) -> type[nn.Module]:
    """The stock class; of a synchronised norm one that needs neither other ranks nor a GPU."""
    if not isinstance(module, nn.SyncBatchNorm | SyncBatchNorm):
        return stock_class(module)
    return BatchNormAct2d if has_activation(module) else BatchNorm2d


def _double(tensor: Tensor) -> Tensor:
    dtype = torch.float64 if tensor.is_floating_point() else tensor.dtype
    return tensor.detach().to("cpu", dtype, copy=True)


def _randomized(module: nn.Module) -> nn.Module:
    """Random weights, so that nothing that is 0 or 1 initially hides a difference."""
    for inner in module.modules():
        for name, tensor in inner.named_parameters(recurse=False):
            fan_in = tensor[0].numel() if name == "weight" and tensor.dim() > 1 else 1
            bound = (3 / fan_in) ** 0.5
            tensor.uniform_(-bound, bound)
        if isinstance(inner, nn.modules.batchnorm._BatchNorm) and inner.running_var is not None:
            assert inner.running_mean is not None
            inner.running_mean.normal_()
            inner.running_var.uniform_(0.5, 1.5)
    return module


def _compare(adapter: Adapter, run: Callable[..., Any], stock: nn.Module) -> None:
    fused = _clone(stock, {}).train(stock.training)
    try:
        inputs = adapter.example(_clone(stock, {}))
        state = torch.get_rng_state()
        actual = run(fused, "auto", *[value.clone() for value in inputs])
        torch.set_rng_state(state)
        expected = getattr(stock, adapter.method)(*[value.clone() for value in inputs])
    except NotCovered:
        raise
    except Exception as error:
        raise NotCovered(f"trying it out failed: {error}") from error
    if not _same(actual, expected):
        raise NotCovered("its results differ from those of the code that its names are known from")
    after = dict(fused.named_buffers())
    for name, value in stock.named_buffers():
        if not _same(after[name], value):
            raise NotCovered(f"its {name} changes otherwise than in the code known by its names")


def _same(actual: Tensor, expected: Tensor) -> bool:
    if actual.shape != expected.shape:
        return False
    scale = expected.abs().max().clamp(min=1)
    return bool((actual - expected).abs().max() <= TOLERANCE * scale)
