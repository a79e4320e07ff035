"""A plain and a fused module with the same weights, to be edited alike, and compared.

The rule: where the plain module runs, the fused one gives the same outputs, gradients and running
statistics; where the plain module raises, the fused one raises too, whatever the exception. But
where PyTorch refuses to mix dtypes, the fused ops, which take parameters of any floating dtype, may
run: there is no number that theirs could differ from.
"""

from __future__ import annotations

import copy
import re
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

import moat_kernels as mk
from moat_kernels import reference
from moat_kernels.modules import FusedAttention
from moat_kernels.ops.common import backends
from moat_kernels.stem import FusedStem, Stem
from support.fusing import randomize
from support.tolerances import (
    BACKEND_GRADIENT,
    BACKEND_OUTPUT,
    STORED_ROUNDING,
    relative_error,
)

MODES = ("train", "eval", "no_grad")
FROZEN = "frozen"  # a frozen copy, compared with "no_grad"

# Gradients are compared on this share of the model's largest one: a bias before a norm has a
# gradient that is zero in exact arithmetic, in fact the rounding of a sum over the map.
GRADIENT_FLOOR = 0.1
# Outputs and buffers that are all but zero are compared on this scale.
OUTPUT_FLOOR = 1e-2

MIXED_DTYPES = re.compile(
    r"expect.*(dtype|scalar type)|share same datatype|same dtype|should be the same"
)

# Nothing inside can be, the module is in training mode, or torch.nn.utils.spectral_norm has left a
# tensor with a history in it, so that nobody can copy it.
UNFROZEN = re.compile("can be frozen|must be in eval mode|deepcopy protocol")

CLASSES = {
    reference.MBConvBlock: mk.FusedMBConv,
    reference.MOATBlock: mk.FusedMOATBlock,
    reference.Attention: FusedAttention,
    Stem: FusedStem,
}


@dataclass(frozen=True)
class Subject:
    """A module that is made plain and fused: a class of `CLASSES` or MOAT. shape: of its input."""

    plain: type[nn.Module]
    shape: tuple[int, ...]
    sizes: tuple[Any, ...]
    options: dict[str, Any]

    @property
    def fused(self) -> type[nn.Module]:
        return CLASSES.get(self.plain, self.plain)

    def make(self, kind: type[nn.Module], fused: bool) -> nn.Module:
        """kind: `plain`, `fused` or a subclass."""
        switch = {"fused": fused} if issubclass(kind, mk.MOAT) else {}
        return kind(*self.sizes, **self.options, **switch)


def _subject(
    plain: type[nn.Module], shape: tuple[int, ...], *sizes: Any, **options: Any
) -> Subject:
    return Subject(plain, shape, sizes, options)


def _model(depths: tuple[int, ...], **options: Any) -> Subject:
    return _subject(mk.MOAT, (3, 3, 64, 48), 8, (8, 8, 32, 32), depths, **options)


# Both kinds of block, with and without squeeze-and-excitation, stride, projected shortcut, drop
# path; attention on the whole map and in windows that do not divide it.
SUBJECTS = {
    "mbconv stride 2": _subject(reference.MBConvBlock, (2, 8, 9, 7), 8, 16, stride=2),
    "mbconv": _subject(reference.MBConvBlock, (3, 16, 6, 5), 16, 16, drop_path=0.3),
    "moat stride 2": _subject(
        reference.MOATBlock, (2, 16, 9, 8), 16, 32, stride=2, head_dim=16, position_size=4
    ),
    "moat windows": _subject(
        *(reference.MOATBlock, (3, 32, 5, 4), 32, 32),
        **{"head_dim": 16, "position_size": 3, "window_size": (3, 2), "drop_path": 0.3},
    ),
    "attention": _subject(
        reference.Attention, (2, 5, 6, 32), 32, head_dim=16, window_size=3, position_size=3
    ),
    "stem": _subject(Stem, (2, 3, 12, 9), 8),
    "model": _model((1, 1, 2, 1), num_classes=5, window_size=(None, None, (3, 2), None)),
    "backbone": _model((1, 1, 1, 1), features_only=True, pool_size=3),
}


class PlainMOAT(mk.MOAT):
    """A MOAT whose stages run as anybody would write it: each entry of a list, even the same twice;

    any other container as itself.
    """

    def forward_stages(self, x: Tensor) -> list[Tensor]:
        outputs = [self.stem(self.scale_pixels(x))]
        for stage in self.stages:
            x = outputs[-1]
            for block in stage if isinstance(stage, nn.ModuleList) else (stage,):
                x = block(x)
            outputs.append(x)
        return outputs


@dataclass
class Pair:
    """The two; `make_pair` says how the fused one came to be."""

    plain: nn.Module
    fused: nn.Module

    def copy(self) -> Pair:
        """Of a pair that nobody edited."""
        return Pair(_copy(self.plain), _copy(self.fused))


def _copy(module: nn.Module) -> nn.Module:
    """As copy.deepcopy, which takes five times as long."""
    new = module.__class__.__new__(module.__class__)
    for name, value in module.__dict__.items():
        new.__dict__[name] = copy.copy(value) if isinstance(value, dict) else value
    for name, tensor in module._parameters.items():
        if tensor is not None:
            new._parameters[name] = nn.Parameter(tensor.detach().clone())
    for name, tensor in module._buffers.items():
        new._buffers[name] = tensor if tensor is None else tensor.clone()
    for name, child in module._modules.items():
        new._modules[name] = child if child is None else _copy(child)
    return new


def make_pair(name: str, dtype: torch.dtype, way: str) -> Pair:
    """A new pair of SUBJECTS[name], with weights away from the trivial ones.

    way: "built" of fused classes; "fuse" of plain ones; "plain", to try the comparison itself.
    """
    return _template(name, dtype, way).copy()


def build_pair(
    name: str,
    dtype: torch.dtype,
    way: str,
    subclass: Callable[[type[nn.Module]], type[nn.Module]] = lambda kind: kind,
) -> Pair:
    """As make_pair. subclass: of the classes, what is made instead of them."""
    subject = SUBJECTS[name]
    torch.default_generator.manual_seed(0)
    plain = randomize(subject.make(subclass(subject.plain), fused=False))
    for parameter in plain.parameters():
        if parameter.dim() > 1:  # so that every part of the module matters
            nn.init.normal_(parameter, std=parameter[0].numel() ** -0.5)
    plain = plain.to(dtype)
    if way == "built":
        fused = subject.make(subclass(subject.fused), fused=True).to(dtype)
        fused.load_state_dict(plain.state_dict())
    else:
        fused = copy.deepcopy(plain)
        if way == "fuse":
            mk.fuse(fused)
    for module in (plain, fused) if way == "plain" else (plain,):
        if type(module) is mk.MOAT:
            module.__class__ = PlainMOAT
    return Pair(plain, fused)


_template = cache(build_pair)


def make_input(name: str, dtype: torch.dtype) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(SUBJECTS[name].shape, generator=generator).to(dtype)


Results = dict[str, Any]


@dataclass(frozen=True)
class Raised:
    """A call that ended in an exception."""

    error: Exception


CALLS: list[str] = []  # what hooks that only look have seen, in the forward pass that runs now


def observe(
    module: nn.Module,
    x: Tensor,
    mode: str,
    settle: Callable[[nn.Module], None] | None = None,
    input_gradient: bool = True,
) -> Results | Raised:
    """What one forward pass gives, and but for "no_grad" one backward pass: all results by name.

    settle: called once the module is in its mode.
    """
    module.train(mode == "train")
    if settle is not None:
        settle(module)
    differentiates = mode != "no_grad"
    x = x.detach().clone().requires_grad_(differentiates and input_gradient)
    module.zero_grad(set_to_none=True)
    CALLS.clear()
    torch.default_generator.manual_seed(5)  # drop path draws; torch.manual_seed is slower
    try:
        with torch.set_grad_enabled(differentiates), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            outputs = module(x)
            named = outputs if isinstance(outputs, dict) else {"": outputs}
            results: Results = {f"output {key}": value.detach() for key, value in named.items()}
            results["calls"] = tuple(CALLS)
            if differentiates:
                loss = sum(map(_loss, named.values()), torch.zeros(()))
                if loss.requires_grad:  # everything may be frozen
                    loss.backward()
    except Exception as error:  # whatever the edited module raises is compared
        return Raised(error)
    if x.grad is not None:
        results["gradient of the input"] = x.grad
    for name, parameter in module.named_parameters():
        if parameter.grad is not None:
            results[f"gradient of {name}"] = parameter.grad
    for name, buffer in module.named_buffers():
        results[f"buffer {name}"] = buffer.detach().clone()
    return results


def _loss(output: Tensor) -> Tensor:
    """A sum with random weights: every element's gradient is another."""
    generator = torch.Generator().manual_seed(2)
    weights = torch.randn(output.shape, generator=generator).to(output.dtype)
    return (output * weights).sum() / output.numel() ** 0.5


def difference(actual: Results | Raised, expected: Results | Raised) -> str:
    """In what the fused module's results differ from the plain module's; empty if in nothing."""
    if isinstance(expected, Raised):
        if isinstance(actual, Raised) or MIXED_DTYPES.search(str(expected.error)):
            return ""
        return f"runs, where plain raises {expected.error!r}"
    if isinstance(actual, Raised):
        return f"raises {actual.error!r}"
    if actual.keys() != expected.keys():
        return f"has other results: {sorted(actual.keys() ^ expected.keys())}"
    floating = {
        name: value
        for name, value in expected.items()
        if name != "calls" and value.is_floating_point()
    }
    gradients = [value for name, value in floating.items() if name.startswith("gradient")]
    largest = max((float(value.abs().max()) for value in gradients if value.numel()), default=0.0)
    # Nothing is more exact than the maps in between, which the outputs' dtype tells of.
    outputs = {value.dtype for name, value in floating.items() if name.startswith("output")}
    found = []
    for name, value in expected.items():
        if name == "calls":
            if actual[name] != value:
                found.append(f"calls {actual[name]}, expected {value}")
            continue
        if actual[name].dtype != value.dtype:
            found.append(f"{name} is {actual[name].dtype}, expected {value.dtype}")
        if torch.equal(actual[name], value):
            continue
        is_gradient = name.startswith("gradient")
        floor = max(1e-30, GRADIENT_FLOOR * largest) if is_gradient else OUTPUT_FLOOR
        error = relative_error(actual[name], value, floor)
        if error > max(_tolerance(dtype, is_gradient) for dtype in {value.dtype, *outputs}):
            found.append(f"{name} off by {error:.1e}")
    return ", ".join(found[:3]) + (f" and {len(found) - 3} more" if len(found) > 3 else "")


def _tolerance(dtype: torch.dtype, is_gradient: bool) -> float:
    table = BACKEND_GRADIENT if is_gradient else BACKEND_OUTPUT
    # Where one module is in 16 bits, so are its gradients and what it hands on.
    return table.get(dtype, 4 * STORED_ROUNDING.get(dtype, 0.0))


def observe_frozen(
    module: nn.Module, x: Tensor, settle: Callable[[nn.Module], None] | None = None
) -> Results | Raised | None:
    """The output of a frozen copy; None if nothing in the module can be frozen, or none be made."""
    module.eval()
    if settle is not None:
        settle(module)
    CALLS.clear()
    try:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                frozen = mk.freeze(module)
            except (ValueError, RuntimeError) as error:
                if UNFROZEN.search(str(error)):
                    return None
                raise
            CALLS.clear()
            outputs = frozen(x.detach().clone())
    except Exception as error:
        return Raised(error)
    named = outputs if isinstance(outputs, dict) else {"": outputs}
    return {**{f"output {key}": value for key, value in named.items()}, "calls": tuple(CALLS)}


def outputs_only(results: Results | Raised) -> Results | Raised:
    """What a frozen module gives too."""
    if isinstance(results, Raised):
        return results
    return {key: value for key, value in results.items() if key.split()[0] in ("output", "calls")}


def check_runs_fused(module: nn.Module, x: Tensor) -> None:
    """Assert that nothing in the module runs unfused, as nothing was edited."""
    backends._warned.clear()
    for training in (True, False):
        with warnings.catch_warnings():
            warnings.simplefilter("error", mk.FallbackWarning)
            module.train(training)(x)
