"""Edits that people make to models, drawn at random, to be made alike to a plain and a fused one.

A draw takes a `random.Random` and the module as it is, and returns an Edit or, where nothing fits,
None. What an edit needs at random it draws from a seed of its own: both modules get the same.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import pickle
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from random import Random
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize

import moat_kernels as mk
from moat_kernels import reference
from moat_kernels.drop_path import DropPath
from moat_kernels.normalization import BatchNorm2d
from moat_kernels.ops.mbconv.description import Pool
from support.edited_modules import (
    Bent,
    Doubled,
    FrozenBatchNorm2d,
    LoRA,
    MapLayerNorm,
    OtherDropPath,
    Scaled,
    Scaling,
    Wrapped,
)
from support.edited_pairs import CALLS, Pair
from support.patches import HOOKS, METHOD_PATCHES, public_methods

BatchNorm = nn.modules.batchnorm._BatchNorm


class Impossible(Exception):
    """The edit cannot be made to the plain module either."""


@dataclass(frozen=True)
class Edit:
    """text: for the report. settle: what follows each change of mode."""

    text: str
    apply: Callable[[Pair], None]
    settle: Callable[[nn.Module], None] | None = None


Draw = Callable[[Random, nn.Module], "Edit | None"]


def _both(change: Callable[[nn.Module], object]) -> Callable[[Pair], None]:
    def apply(pair: Pair) -> None:
        try:
            change(pair.plain)
        except Exception as error:
            raise Impossible(repr(error)) from error
        change(pair.fused)

    return apply


def _at(path: str, text: str, change: Callable[[Any], object]) -> Edit:
    return Edit(f"{path or 'itself'}: {text}", _both(lambda root: change(root.get_submodule(path))))


def _replacing(path: str, text: str, make: Callable[[Any], nn.Module]) -> Edit:
    """make: what takes the place of the module that it is given."""

    def change(root: nn.Module) -> None:
        owner, _, name = path.rpartition(".")
        old = root.get_submodule(path)
        torch.default_generator.manual_seed(11)
        new = make(old)
        if new is not old:
            _like(new, old)
        root.get_submodule(owner)._modules[name] = new

    return Edit(f"{path} = {text}", _both(change))


def _like(new: nn.Module, old: nn.Module) -> None:
    """In the dtype of what it replaces, with weights that matter."""
    tensor = next(iter([*old.parameters(), *old.buffers()]), None)
    if tensor is not None:
        new.to(tensor.dtype)
    mine = set(old.modules())
    for module in new.modules():
        if module in mine:
            continue
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.dim() > 1:
                nn.init.normal_(parameter, std=parameter[0].numel() ** -0.5)
            else:
                nn.init.normal_(parameter, 1.0 if name == "weight" else 0.0, 0.2)
        if isinstance(module, BatchNorm) and module.running_var is not None:
            nn.init.uniform_(module.running_var, 0.5, 1.5)
            nn.init.normal_(module.running_mean, std=0.2)


def _find(rng: Random, root: nn.Module, *kinds: type, inner: bool = False) -> tuple[str, Any]:
    """The path and the module of one of `kinds`, at random; ("", None) if there is none."""
    found = [
        (path, module)
        for path, module in root.named_modules()
        if isinstance(module, kinds) and (path or not inner)
    ]
    return rng.choice(found) if found else ("", None)


def _random(shape: Sequence[int], like: Tensor, std: float = 0.5) -> Tensor:
    generator = torch.Generator().manual_seed(len(shape) + sum(shape))
    return (torch.randn(shape, generator=generator) * std).to(like.dtype)


def _set(**values: Any) -> Callable[[nn.Module], None]:
    def change(module: nn.Module) -> None:
        for name, value in values.items():
            setattr(module, name, value)

    return change


# --- Settings ---------------------------------------------------------------------------------


def _kernel(size: tuple[int, int]) -> Callable[[nn.Conv2d], None]:
    def change(conv: nn.Conv2d) -> None:
        std = (conv.weight[0, :, 0, 0].numel() * size[0] * size[1]) ** -0.5
        weight = _random((*conv.weight.shape[:2], *size), conv.weight, std)
        conv.weight = nn.Parameter(weight)
        conv.kernel_size = size
        conv.padding = (size[0] // 2, size[1] // 2)
        conv._reversed_padding_repeated_twice = [conv.padding[1]] * 2 + [conv.padding[0]] * 2

    return change


def _groups(groups: int) -> Callable[[nn.Conv2d], None]:
    def change(conv: nn.Conv2d) -> None:
        shape = (conv.out_channels, conv.in_channels // groups, *conv.kernel_size)
        std = (shape[1] * shape[2] * shape[3]) ** -0.5
        conv.groups, conv.weight = groups, nn.Parameter(_random(shape, conv.weight, std))

    return change


def _bias(conv: nn.Conv2d | nn.Linear) -> None:
    conv.bias = nn.Parameter(_random((conv.weight.shape[0],), conv.weight))


def setting_of_a_convolution(rng: Random, root: nn.Module) -> Edit | None:
    path, conv = _find(rng, root, nn.Conv2d)
    if conv is None:
        return None
    stride = rng.choice([(1, 1), (2, 2), (2, 1)])
    kernel = rng.choice([(3, 3), (5, 5), (1, 3), (1, 1)])
    padding = rng.choice([(1, 1), (0, 1), "same"])
    dilation = rng.choice([(2, 2), (1, 2)])
    groups = rng.choice([1, 2, 4])
    mode = rng.choice(["reflect", "circular", "replicate"])
    changes: dict[str, Callable[[Any], None]] = {
        f"stride = {stride}": _set(stride=stride),
        f"padding = {padding!r}": _set(padding=padding),
        f"dilation = {dilation}": _set(dilation=dilation),
        f"dilation = {dilation}, padding = the same": _set(dilation=dilation, padding=dilation),
        f"groups = {groups}": _groups(groups),
        f"kernel {kernel}": _kernel(kernel),
        "bias added": _bias,
        "bias = None": _set(bias=None),
        f"padding_mode = {mode!r}": _set(padding_mode=mode),
        "in_channels, out_channels = 1, 1": _set(in_channels=1, out_channels=1),
        "weights in channels_last": lambda m: m.to(memory_format=torch.channels_last),
    }
    text = rng.choice(list(changes))
    return _at(path, text, changes[text])


def moved_stride(rng: Random, root: nn.Module) -> Edit | None:
    path, block = _find(rng, root, reference.MBConvBlock)
    if block is None:
        return None
    goal = rng.choice(["expand_conv", "shrink_conv"])

    def change(block: Any) -> None:
        conv = getattr(block, goal)
        conv.stride, block.depthwise_conv.stride = block.depthwise_conv.stride, (1, 1)

    return _at(path, f"the stride moved to {goal}", change)


def setting_of_a_norm(rng: Random, root: nn.Module) -> Edit | None:
    path, norm = _find(rng, root, BatchNorm)
    if norm is None:
        return None
    momentum = rng.choice([0.5, None, 1.0, 0.0])
    without = {"running_mean": None, "running_var": None}
    changes: dict[str, Callable[[Any], None]] = {
        "eps = 0.3": _set(eps=0.3),
        f"momentum = {momentum}": _set(momentum=momentum),
        "weight = None": _set(weight=None),
        "bias = None": _set(bias=None),
        "affine = False": _set(affine=False),
        "weight = bias = None": _set(weight=None, bias=None, affine=False),
        "track_running_stats = False": _set(track_running_stats=False),
        "no running statistics": _set(track_running_stats=False, **without),
        "running statistics = None": _set(**without),
        "unbiased_running_var flipped": lambda norm: setattr(
            norm, "unbiased_running_var", not getattr(norm, "unbiased_running_var", True)
        ),
        "num_features = 1": _set(num_features=1),
        "num_batches_tracked = None": _set(num_batches_tracked=None),
        "reset_running_stats()": lambda norm: norm.reset_running_stats(),
    }
    text = rng.choice(list(changes))
    return _at(path, text, changes[text])


def setting_of_a_layer_norm(rng: Random, root: nn.Module) -> Edit | None:
    path, norm = _find(rng, root, nn.LayerNorm)
    if norm is None:
        return None
    changes = {
        "eps = 0.3": _set(eps=0.3),
        "weight = None": _set(weight=None),
        "bias = None": _set(bias=None),
        "weight = bias = None": _set(weight=None, bias=None, elementwise_affine=False),
        "normalized_shape = (1,)": _set(normalized_shape=(1,)),
    }
    text = rng.choice(list(changes))
    return _at(path, text, changes[text])


def setting_of_an_attention(rng: Random, root: nn.Module) -> Edit | None:
    path, attention = _find(rng, root, reference.Attention)
    if attention is None:
        return None
    window = rng.choice([None, (2, 2), (3, 1)])
    heads, head_dim = attention.description.heads, attention.description.head_dim

    def describe(**values: Any) -> Callable[[Any], None]:
        return lambda m: setattr(m, "description", dataclasses.replace(m.description, **values))

    def table(size: int) -> Callable[[Any], None]:
        def change(attention: Any) -> None:
            shape = (attention.description.heads, size, size)
            attention.relative_position_embedding = nn.Parameter(
                _random(shape, attention.qkv.weight)
            )

        return change

    changes: dict[str, Callable[[Any], None]] = {
        f"window_size = {window}": describe(window_size=window),
        "heads and head_dim exchanged": describe(heads=head_dim, head_dim=heads),
        "scale = 0.1": describe(scale=0.1),
        "another table": table(5),
        "table = None": _set(relative_position_embedding=None),
        "qkv.bias = None": lambda m: setattr(m.qkv, "bias", None),
        "proj.bias = None": lambda m: setattr(m.proj, "bias", None),
        "qkv.in_features = 1": lambda m: setattr(m.qkv, "in_features", 1),
    }
    text = rng.choice(list(changes))
    return _at(path, text, changes[text])


def setting_of_a_block(rng: Random, root: nn.Module) -> Edit | None:
    path, block = _find(rng, root, reference.MBConvBlock)
    if block is None:
        return None
    stride = block.stride
    pools = [
        None,
        Pool(kernel_size=3, stride=stride),
        Pool("max", 2, stride),
        Pool(stride=stride, kernel_size=3, padding=(1, 1, 1, 1), count_include_pad=True),
    ]
    pool = rng.choice(pools)
    level = rng.choice(["none", "expand", "block"])
    changes: dict[str, Callable[[Any], None]] = {
        f"pool = {pool}": _set(pool=pool),
        "stride = 1": _set(stride=1),
        "stride = 2": _set(stride=2),
        "stride = 1, pool = None": _set(stride=1, pool=None),
        "stride = 1 everywhere": lambda m: (
            _set(stride=1, pool=None)(m),
            _set(stride=(1, 1))(m.depthwise_conv),
        ),
        "se = None": _set(se=None),
        "shortcut_conv = None": _set(shortcut_conv=None),
        "shortcut_conv added": lambda m: _add_shortcut(m),
        "in_channels, out_channels = 1, 1": _set(in_channels=1, out_channels=1),
        f"recompute = {level!r}": _set(recompute=level),
        "drop_path.probability = 0.5": lambda m: setattr(m.drop_path, "probability", 0.5),
    }
    text = rng.choice(list(changes))
    return _at(path, text, changes[text])


def _add_shortcut(block: Any) -> None:
    weight = block.shrink_conv.weight
    conv = nn.Conv2d(block.in_channels, block.out_channels, 1).to(weight.dtype)
    conv.weight = nn.Parameter(_random(conv.weight.shape, weight))
    conv.bias = nn.Parameter(_random(conv.bias.shape, weight))
    block.shortcut_conv = conv


# --- Modules in the place of others -------------------------------------------------------------


def _conv_like(old: nn.Conv2d, **options: Any) -> nn.Conv2d:
    settings = {"kernel_size": old.kernel_size, "stride": old.stride, "groups": old.groups}
    return nn.Conv2d(old.in_channels, old.out_channels, **{**settings, **options})


def replaced_convolution(rng: Random, root: nn.Module) -> Edit | None:
    path, conv = _find(rng, root, nn.Conv2d)
    if conv is None:
        return None
    half = (conv.kernel_size[0] // 2, conv.kernel_size[1] // 2)
    mode = rng.choice(["reflect", "circular"])
    same = functools.partial(reference.SameConv2d, conv.in_channels, conv.out_channels)
    makes: dict[str, Callable[[Any], nn.Module]] = {
        "Conv2d with bias": lambda m: _conv_like(m, padding=half),
        "Conv2d without bias": lambda m: _conv_like(m, padding=half, bias=False),
        "Conv2d 3x3": lambda m: _conv_like(m, kernel_size=3, padding=1),
        "Conv2d 3x3 dilated": lambda m: _conv_like(m, kernel_size=3, padding=2, dilation=2),
        "Conv2d, one group": lambda m: _conv_like(m, padding=half, groups=1),
        f"Conv2d 3x3 {mode}": lambda m: _conv_like(m, kernel_size=3, padding=1, padding_mode=mode),
        "SameConv2d 5x5": lambda m: same(5, m.stride[0], groups=m.groups),
        "SameConv2d 3x1": lambda m: same((3, 1), m.stride[0], groups=m.groups),
        "LoRA": LoRA,
        "Identity": lambda m: nn.Identity(),
        **_wraps(rng),
    }
    text = rng.choice(list(makes))
    return _replacing(path, text, makes[text]) if path else None


def _wraps(rng: Random) -> dict[str, Callable[[Any], nn.Module]]:
    return {
        "Sequential of it": nn.Sequential,
        "Sequential of it and Dropout(0)": lambda m: nn.Sequential(m, nn.Dropout(0.0)),
        "Sequential of it and sine": lambda m: nn.Sequential(m, Bent()),
        "a wrapper with its weight": Wrapped,
    }


def replaced_norm(rng: Random, root: nn.Module) -> Edit | None:
    path, norm = _find(rng, root, BatchNorm)
    if not path:
        return None
    width = norm.num_features
    makes: dict[str, Callable[[Any], nn.Module]] = {
        "BatchNorm2d of torch": lambda m: nn.BatchNorm2d(width),
        "BatchNorm2d of torch, plain": lambda m: nn.BatchNorm2d(
            width, affine=False, track_running_stats=False
        ),
        "BatchNorm2d of this package": lambda m: BatchNorm2d(width, momentum=0.3),
        "synchronised": mk.convert_sync_batchnorm,
        "FrozenBatchNorm2d": lambda m: FrozenBatchNorm2d(width),
        "GroupNorm": lambda m: nn.GroupNorm(2, width),
        "InstanceNorm2d": lambda m: nn.InstanceNorm2d(width, affine=True),
        "LayerNorm of maps": lambda m: MapLayerNorm(width),
        "Identity": lambda m: nn.Identity(),
        "Dropout2d": lambda m: nn.Dropout2d(0.3),
        **_wraps(rng),
    }
    text = rng.choice(list(makes))
    return _replacing(path, text, makes[text])


def replaced_part_of_attention(rng: Random, root: nn.Module) -> Edit | None:
    path, module = _find(rng, root, nn.LayerNorm, nn.Linear, reference.Attention, inner=True)
    if module is None:
        return None
    makes: dict[str, Callable[[Any], nn.Module]] = {
        "Identity": lambda m: nn.Identity(),
        **_wraps(rng),
    }
    if isinstance(module, nn.LayerNorm):
        shape = module.normalized_shape
        makes |= {
            "RMSNorm": lambda m: nn.RMSNorm(shape),
            "LayerNorm, plain": lambda m: nn.LayerNorm(shape, elementwise_affine=False),
            "LayerNorm of another eps": lambda m: nn.LayerNorm(shape, eps=0.1),
        }
    elif isinstance(module, nn.Linear):
        sizes = module.in_features, module.out_features
        makes |= {
            "Linear without bias": lambda m: nn.Linear(*sizes, bias=False),
            "LoRA": LoRA,
        }
    else:
        width = module.qkv.in_features
        makes |= {
            "Attention of other heads": lambda m: reference.Attention(
                width, head_dim=8, window_size=2, position_size=3
            ),
            "plain Attention": lambda m: reference.Attention(width, head_dim=16),
        }
    text = rng.choice(list(makes))
    return _replacing(path, text, makes[text])


def replaced_other_part(rng: Random, root: nn.Module) -> Edit | None:
    kinds = (DropPath, reference.SqueezeExcitation)
    path, module = _find(rng, root, *kinds, inner=True)
    if module is None:
        return None
    makes: dict[str, Callable[[Any], nn.Module]] = {
        "Identity": lambda m: nn.Identity(),
        "Dropout2d": lambda m: nn.Dropout2d(0.3),
        "another DropPath": lambda m: OtherDropPath(0.5),
        "DropPath(0.5)": lambda m: DropPath(0.5),
        "sine": lambda m: Bent(),
        **_wraps(rng),
    }
    text = rng.choice(list(makes))
    return _replacing(path, text, makes[text])


def replaced_block(rng: Random, root: nn.Module) -> Edit | None:
    """In a whole model: blocks, stages, the stem, the head."""
    stages = root._modules.get("stages")
    if stages is None:
        return None
    stage = rng.randrange(len(stages))
    block = rng.randrange(len(stages[stage]))
    place = f"stages.{stage}.{block}"
    targets: dict[str, tuple[str, Callable[[Any], nn.Module]]] = {
        "Sequential of it": (place, nn.Sequential),
        "a wrapper": (place, Wrapped),
        "Sequential of it and sine": (place, lambda m: nn.Sequential(m, Bent())),
        "Sequential of the blocks": (f"stages.{stage}", lambda m: nn.Sequential(*m)),
        "Sequential of the stem": ("stem", nn.Sequential),
        "Identity": ("final_layer_norm", lambda m: nn.Identity()),
        "Sequential of the head": ("logits_head", lambda m: nn.Sequential(nn.Dropout(0.0), m)),
        "the block, twice": (f"stages.{stage}", lambda m: _doubled(m)),
    }
    text = rng.choice(list(targets))
    path, make = targets[text]
    return _replacing(path, text, make) if root._modules.get(path.split(".")[0]) else None


def _doubled(stage: nn.ModuleList) -> nn.Module:
    """The last block at the end once more; it has stride 1 where it is not the first."""
    last = stage[len(stage) - 1]
    if last.stride != 1:
        last.stride, last.pool, last.depthwise_conv.stride = 1, None, (1, 1)
    return nn.ModuleList([*stage, last] if last.in_channels == last.out_channels else stage)


# --- Patches, hooks, classes ----------------------------------------------------------------------


def patched_method(rng: Random, root: nn.Module) -> Edit | None:
    path, module = _find(rng, root, nn.Module)
    called = set() if isinstance(module, nn.ModuleList) else {"forward"}
    uncalled = {"extra_repr", "reset_classifier", "get_classifier", "no_weight_decay"}
    uncalled |= {"parameter_groups", "frozen_steps", "frozen_stages", "frozen_head"}
    methods = sorted((public_methods(type(module)) | called) - uncalled)
    if not methods:
        return None
    method, kind = rng.choice(methods), rng.choice(list(METHOD_PATCHES))
    return _at(path, f"{method} patched {kind}", lambda m: METHOD_PATCHES[kind](m, method))


def subclass_without_change(rng: Random, root: nn.Module) -> Edit | None:
    path, _ = _find(rng, root, nn.Module)

    def change(module: nn.Module) -> None:
        module.__class__ = type(f"My{type(module).__name__}", (type(module),), {})

    return _at(path, "a subclass that changes nothing", change)


def hooked(rng: Random, root: nn.Module) -> Edit | None:
    path, _ = _find(rng, root, nn.Module)
    kind = rng.choice(list(HOOKS))
    return _at(path, kind, HOOKS[kind])


def watched(rng: Random, root: nn.Module) -> Edit | None:
    """A hook that only looks, as a profiler's."""
    path, _ = _find(rng, root, nn.Module)

    def look(module: nn.Module, inputs: Any, output: Any) -> None:
        CALLS.append(f"{path} {tuple(output.shape) if isinstance(output, Tensor) else ''}")

    return _at(path, "a hook that looks", lambda module: module.register_forward_hook(look))


def hooked_and_unhooked(rng: Random, root: nn.Module) -> Edit | None:
    path, _ = _find(rng, root, nn.Module)
    kind = rng.choice(["forward hook", "full backward hook", "forward pre-hook"])
    return _at(path, f"{kind}, removed again", lambda module: HOOKS[kind](module).remove())


# --- Tensors --------------------------------------------------------------------------------------


def _holders(rng: Random, root: nn.Module, dims: int = 1) -> tuple[str, Any, str]:
    """Path, module and name of a parameter of at least `dims` dimensions."""
    found = [
        (path, module, name)
        for path, module in root.named_modules()
        for name, parameter in module.named_parameters(recurse=False)
        if parameter.dim() >= dims and ".parametrizations" not in path
    ]
    return rng.choice(found) if found else ("", None, "")


def parametrized(rng: Random, root: nn.Module) -> Edit | None:
    path, module, name = _holders(rng, root)
    if module is None:
        return None
    makes: dict[str, Callable[[nn.Module], object]] = {
        "doubled": lambda m: parametrize.register_parametrization(m, name, Doubled()),
        "scaled by a parameter": lambda m: parametrize.register_parametrization(
            m, name, Scaling().to(getattr(m, name).dtype)
        ),
        "doubled and undone": lambda m: (
            parametrize.register_parametrization(m, name, Doubled()),
            parametrize.remove_parametrizations(m, name),
        ),
    }
    if getattr(module, name).dim() > 1:
        makes |= {
            "weight_norm": lambda m: parametrizations.weight_norm(m, name),
            "spectral_norm": lambda m: (
                torch.default_generator.manual_seed(3),
                parametrizations.spectral_norm(m, name),
            ),
            "old weight_norm": lambda m: nn.utils.weight_norm(m, name),
            "old spectral_norm": lambda m: (
                torch.default_generator.manual_seed(3),
                nn.utils.spectral_norm(m, name),
            ),
        }
    text = rng.choice(list(makes))
    return _at(path, f"{name} {text}", makes[text])


def another_tensor(rng: Random, root: nn.Module) -> Edit | None:
    path, module, name = _holders(rng, root)
    if module is None:
        return None

    def attribute(m: nn.Module) -> None:
        tensor = m._parameters[name]
        delattr(m, name)
        setattr(m, name, (tensor * 1.5).detach())

    def buffer(m: nn.Module) -> None:
        tensor = m._parameters[name].detach() * 1.5
        delattr(m, name)
        m.register_buffer(name, tensor)

    def subclass(m: nn.Module) -> None:
        setattr(m, name, nn.Parameter(Scaled.of(m._parameters[name].detach())))

    def transposed(m: nn.Module) -> None:
        tensor = m._parameters[name].detach()
        dims = list(range(tensor.dim()))[::-1]
        setattr(m, name, nn.Parameter(tensor.permute(dims).contiguous().permute(dims)))

    def expanded(m: nn.Module) -> None:
        tensor = m._parameters[name].detach()
        setattr(m, name, nn.Parameter(tensor[:1].expand_as(tensor), requires_grad=False))

    changes: dict[str, Callable[[nn.Module], None]] = {
        "is an attribute": attribute,
        "is a buffer": buffer,
        "is a tensor subclass": subclass,
        "has other strides": transposed,
        "has stride 0": expanded,
        "in another dtype": lambda m: setattr(
            m, name, nn.Parameter(m._parameters[name].detach().to(torch.bfloat16))
        ),
        "frozen": lambda m: m._parameters[name].requires_grad_(False),
        "another value, by .data": lambda m: m._parameters[name].data.mul_(1.5),
    }
    text = rng.choice(list(changes))
    return _at(path, f"{name} {text}", changes[text])


def frozen_parameters(rng: Random, root: nn.Module) -> Edit | None:
    path, _ = _find(rng, root, nn.Module)
    return _at(path, "requires_grad_(False)", lambda module: module.requires_grad_(False))


def another_dtype(rng: Random, root: nn.Module) -> Edit | None:
    path, _ = _find(rng, root, nn.Conv2d, nn.Linear, BatchNorm, nn.LayerNorm, reference.MBConvBlock)
    dtype = rng.choice([torch.float64, torch.float32, torch.bfloat16])
    return _at(path, f"to({dtype})", lambda module: module.to(dtype))


def shared(rng: Random, root: nn.Module) -> Edit | None:
    """The same module, or the same parameter, in two places."""
    kind = rng.choice([BatchNorm, nn.Conv2d, nn.Linear, DropPath, reference.MBConvBlock])
    here, there = (_find(rng, root, kind, inner=True) for _ in range(2))
    shapes = [
        [parameter.shape for parameter in module.parameters()] if module is not None else None
        for _, module in (here, there)
    ]
    if here[1] is there[1] or shapes[0] != shapes[1]:
        return None

    def module(root: nn.Module) -> None:
        owner, _, name = there[0].rpartition(".")
        root.get_submodule(owner)._modules[name] = root.get_submodule(here[0])

    def weight(root: nn.Module) -> None:
        root.get_submodule(there[0]).weight = root.get_submodule(here[0]).weight

    if hasattr(here[1], "weight") and rng.random() < 0.4:
        return Edit(f"{there[0]}.weight = {here[0]}.weight", _both(weight))
    return Edit(f"{there[0]} = {here[0]}", _both(module))


# --- Modes and copies -----------------------------------------------------------------------------


def part_in_another_mode(rng: Random, root: nn.Module) -> Edit | None:
    path, _ = _find(rng, root, BatchNorm, DropPath, reference.MBConvBlock, reference.Attention)
    mode = rng.random() < 0.3

    def settle(root: nn.Module) -> None:
        root.get_submodule(path).train(mode)

    text = f"{path or 'itself'} always in {'train' if mode else 'eval'}"
    return Edit(text, lambda pair: None, settle)


def copied(rng: Random, root: nn.Module) -> Edit | None:
    def apply(pair: Pair) -> None:
        try:
            plain = copy.deepcopy(pair.plain)
        except Exception:  # neither can be copied
            return
        pair.plain, pair.fused = plain, copy.deepcopy(pair.fused)

    return Edit("deepcopy", apply)


def pickled(rng: Random, root: nn.Module) -> Edit | None:
    def apply(pair: Pair) -> None:
        try:
            plain = pickle.loads(pickle.dumps(pair.plain))
        except Exception:  # closures cannot be pickled, of neither
            return
        pair.plain, pair.fused = plain, pickle.loads(pickle.dumps(pair.fused))

    return Edit("pickle", apply)


def fused_again(rng: Random, root: nn.Module) -> Edit | None:
    recompute = rng.choice(["auto", "none", "expand", "block"])
    return Edit(f"fuse({recompute!r})", lambda pair: mk.fuse(pair.fused, recompute))


def unfused(rng: Random, root: nn.Module) -> Edit | None:
    def apply(pair: Pair) -> None:
        try:
            mk.unfuse(pair.fused)
        except RuntimeError as error:
            if "after it was fused" not in str(error):
                raise

    return Edit("unfuse", apply)


def converted(rng: Random, root: nn.Module) -> Edit | None:
    changes: dict[str, Callable[[nn.Module], object]] = {
        "to(channels_last)": lambda m: m.to(memory_format=torch.channels_last),
        "convert_sync_batchnorm": mk.convert_sync_batchnorm,
        "double().float()": lambda m: m.double().float(),
        "state_dict loaded": lambda m: m.load_state_dict(
            {name: value + 0.01 for name, value in m.state_dict().items()}
        ),
        "share_memory": lambda m: m.share_memory(),
        "apply(nn.init)": lambda m: m.apply(
            lambda inner: (
                nn.init.constant_(inner.bias, 0.25)
                if isinstance(inner, nn.Conv2d) and inner.bias is not None
                else None
            )
        ),
    }
    text = rng.choice(list(changes))
    return _at("", text, changes[text])


# How often each is drawn.
DRAWS: dict[Draw, int] = {
    setting_of_a_convolution: 10,
    moved_stride: 1,
    setting_of_a_norm: 8,
    setting_of_a_layer_norm: 3,
    setting_of_an_attention: 4,
    setting_of_a_block: 6,
    replaced_convolution: 8,
    replaced_norm: 6,
    replaced_part_of_attention: 6,
    replaced_other_part: 4,
    replaced_block: 4,
    patched_method: 10,
    subclass_without_change: 2,
    hooked: 8,
    watched: 3,
    hooked_and_unhooked: 1,
    parametrized: 8,
    another_tensor: 8,
    frozen_parameters: 4,
    another_dtype: 2,
    shared: 6,
    part_in_another_mode: 6,
    copied: 3,
    pickled: 3,
    fused_again: 3,
    unfused: 2,
    converted: 3,
}
