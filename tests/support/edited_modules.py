"""Modules and tensors that people put into models: in the place of others, or on top."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from support.patches import bend


class Bent(nn.Module):
    """x + 0.3 sin(3 x)."""

    def forward(self, x: Tensor) -> Tensor:
        return bend(x)


class Doubled(nn.Module):
    """A parametrization."""

    def forward(self, weight: Tensor) -> Tensor:
        return 2 * weight


class Scaling(nn.Module):
    """A parametrization with a parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(1.3))

    def forward(self, weight: Tensor) -> Tensor:
        return self.scale * weight


class Wrapped(nn.Module):
    """As adapters and checkpoint wrappers: it looks like what it holds, and adds to it."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("module"), name)

    def forward(self, *inputs: Tensor) -> Tensor:
        return bend(self.module(*inputs))


class Checkpointed(nn.Module):
    """What it holds, computed again in the backward pass."""

    def __init__(self, module: nn.Module, use_reentrant: bool) -> None:
        super().__init__()
        self.module = module
        self.use_reentrant = use_reentrant

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.module, x, use_reentrant=self.use_reentrant)


class WithOtherWeights(nn.Module):
    """What it holds, called with other parameters than its own, as meta-learning does."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, x: Tensor) -> Tensor:
        others = {name: 1.5 * value for name, value in self.module.named_parameters()}
        return torch.func.functional_call(self.module, others, (x,))


class LoRA(nn.Module):
    """A low-rank addition to a convolution or a linear layer, as PEFT's."""

    def __init__(self, base: nn.Conv2d | nn.Linear) -> None:
        super().__init__()
        self.base_layer = base
        self.weight, self.bias = base.weight, base.bias
        rows, columns = base.weight.shape[0], base.weight[0].numel()
        self.lora_a = nn.Parameter(torch.randn(2, columns, dtype=base.weight.dtype))
        self.lora_b = nn.Parameter(torch.randn(rows, 2, dtype=base.weight.dtype))

    def forward(self, x: Tensor) -> Tensor:
        weight = self.base_layer.weight + (self.lora_b @ self.lora_a).view_as(self.weight)
        return torch.func.functional_call(self.base_layer, {"weight": weight}, (x,))


class MapLayerNorm(nn.LayerNorm):
    """Over the channels of a map [B, C, H, W]."""

    def forward(self, x: Tensor) -> Tensor:
        rows = F.layer_norm(
            x.permute(0, 2, 3, 1), self.normalized_shape, self.weight, self.bias, self.eps
        )
        return rows.permute(0, 3, 1, 2)


class FrozenBatchNorm2d(nn.Module):
    """As torchvision's: fixed statistics, weight and bias, all of them buffers."""

    def __init__(self, num_features: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.eps = eps
        self.register_buffer("weight", torch.linspace(0.5, 1.5, num_features))
        self.register_buffer("bias", torch.linspace(-0.3, 0.3, num_features))
        self.register_buffer("running_mean", torch.linspace(-0.2, 0.4, num_features))
        self.register_buffer("running_var", torch.linspace(1.5, 0.5, num_features))

    def forward(self, x: Tensor) -> Tensor:
        scale = self.weight * (self.running_var + self.eps).rsqrt()
        shift = self.bias - self.running_mean * scale
        return x * scale[:, None, None] + shift[:, None, None]


class OtherDropPath(nn.Module):
    """As timm's: no `probability`, no `scale`."""

    def __init__(self, drop_prob: float) -> None:
        super().__init__()
        self.drop_prob = drop_prob

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return x
        keep = 1 - self.drop_prob
        mask = x.new_empty(x.shape[0], 1, 1, 1).bernoulli_(keep)
        return x * mask / keep


class Scaled(Tensor):
    """A tensor subclass, as quantised ones are: what it holds is not what it stands for."""

    @staticmethod
    def of(tensor: Tensor) -> Scaled:
        return tensor.as_subclass(Scaled)

    @classmethod
    def __torch_function__(
        cls, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if function.__name__ not in COMPUTING:
            return super().__torch_function__(function, types, args, kwargs)
        return function(*map(_meant, args), **{name: _meant(kwargs[name]) for name in kwargs})


def _meant(value: Any) -> Any:
    return 1.5 * value.as_subclass(Tensor) if isinstance(value, Scaled) else value


# Functions that take a Scaled for what it stands for; others (copies, views of settings) keep it.
COMPUTING = {
    *("conv2d", "linear", "layer_norm", "batch_norm", "interpolate", "pad", "matmul", "einsum"),
    *("add", "sub", "mul", "__add__", "__sub__", "__mul__", "__radd__", "__rmul__", "__getitem__"),
    *("view", "reshape", "flatten", "permute", "expand", "bmm", "baddbmm", "index_select"),
}
