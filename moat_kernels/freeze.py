"""`freeze`: a model for inference on a CPU, its weights packed once."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn

from moat_kernels.adapters import timm, torchvision, vit_pytorch
from moat_kernels.adapters.freezing import (
    HalfReader,
    MlpReader,
    StemReader,
    TransformerPart,
)
from moat_kernels.adapters.fused import FusedModule, stock_class
from moat_kernels.adapters.reading import NotCovered, child_names, refuse_hooks
from moat_kernels.chains import Container, chain_containers
from moat_kernels.frozen_modules import (
    FrozenBlock,
    FrozenMOAT,
    FrozenModule,
    FrozenTransformerBlock,
    checked_adapter,
)
from moat_kernels.inspection import interception
from moat_kernels.int8 import quantize, unfrozen_layers
from moat_kernels.models import MOAT
from moat_kernels.modules import FusedInvertedBottleneck
from moat_kernels.ops.common.backends import backend_status, warn_once
from moat_kernels.ops.frozen import (
    DTYPES,
    CannotFreeze,
    multiplies,
)
from moat_kernels.reference import MBConvBlock
from moat_kernels.stem import FusedStem

_HALVES: tuple[HalfReader, ...] = (*timm.HALVES, *torchvision.HALVES, *vit_pytorch.HALVES)
_MLPS: tuple[MlpReader, ...] = vit_pytorch.MLPS
_STEMS: tuple[StemReader, ...] = (*timm.STEMS, *torchvision.STEMS)
_CONTAINERS: tuple[Container, ...] = (*timm.CONTAINERS, *torchvision.CONTAINERS)
# Of the largest value: rounding of a block, tried out by weights and an input that are given.
_TOLERANCE = {torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}


def freeze(
    model: nn.Module,
    dtype: torch.dtype | None = None,
    calibration: Iterable[Any] | None = None,
) -> nn.Module:
    """A copy of `model` for inference on a CPU: the same outputs, up to rounding, in less time.

    Each MOAT inside, or `model` itself, becomes a FrozenMOAT, fused blocks elsewhere become
    FrozenBlocks, and transformer blocks whose attention `fuse` found FrozenTransformerBlocks, with
    their MLPs where these are a layer norm, two linear layers and an activation. Batch norms are
    folded into the weights and these laid out as the kernels read them, now instead of in every
    call, and a whole MOAT runs in one native call. The rest of the model is copied. The result
    shares nothing with `model`, which stays as it is: train that, load it, save it, and freeze
    again. Frozen parts have no parameters and an empty state_dict, stay in eval mode and in their
    dtype, give no gradients and cannot be pickled.

    dtype: what frozen parts multiply in, and keep what they compute in from one layer to the next.
        None is the dtype of `model`, which inputs and outputs have in any case.
        float32;
        bfloat16, where the CPU multiplies it (AVX512_BF16), else its products are in float32;
        float16, whose products are always in float32;
        int8, where the CPU multiplies that and bfloat16 (AVX512_VNNI): the 1x1 convolutions and
        linear layers of blocks, as far as their errors on the calibration allow, and the rest in
        bfloat16; `int8_report` of the result says which. Values of operands are clamped to what
        the calibration saw, so what is not finite is lost.
        Sums, norms, GELU and softmax are always in float32 (sums of bytes in int32).
    calibration: for int8, batches as `model` takes them: some dozens of images of the kind that it
        will see, prepared in the same way.

    Blocks that cannot be frozen (hooked, replaced, on another device, of a dtype or a kind that the
    native kernels do not cover) are copied, and a FallbackWarning tells why, as one does where the
    CPU multiplies in float32 only. Raises ValueError if `model` is in training mode or holds
    nothing that can be frozen, for another dtype, for int8 where the CPU lacks it or without
    calibration; TypeError if `model` is no module.
    """
    _check_arguments(model, dtype, calibration)
    frozen: dict[int, Any] = {}
    left: dict[str, list[str]] = {}
    maps = torch.bfloat16 if dtype is torch.int8 else dtype
    _freeze_inside(model, "", maps, frozen, left)
    reasons = [
        f"{paths[0]}{f' and {len(paths) - 1} more' if len(paths) > 1 else ''}: {reason}"
        for reason, paths in left.items()
    ]
    if not frozen:
        found = "; ".join(reasons) or "it has no MOAT or fused block"
        raise ValueError(f"nothing in model can be frozen: {found}")
    report = None if calibration is None else quantize(model, list(calibration), frozen)
    for reason in reasons:
        warn_once(f"freeze: {reason}; left as it is")
    for used in {maps or part.sequence.dtype for part in frozen.values()}:
        if not multiplies(used):
            warn_once(
                f"freeze: this CPU does not multiply {used}, so frozen modules multiply in "
                "float32; dtype=torch.float32 takes less time and more memory"
            )
    for part in list(frozen.values()):
        if isinstance(part, FrozenTransformerBlock):
            part.let_go(frozen)
    _freeze_stems(model, maps, frozen)
    result: Any = copy.deepcopy(model, frozen)
    if report is not None and not isinstance(result, FrozenModule):
        result.int8_report = report + unfrozen_layers(left)
    chain_containers(result, _CONTAINERS)
    return result


def _check_arguments(model: object, dtype: object, calibration: object) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    if model.training:
        raise ValueError("model must be in eval mode to be frozen: call model.eval() first")
    if dtype not in (None, *DTYPES, torch.int8):
        raise ValueError(f"dtype must be None, torch.int8 or one of {DTYPES}, got {dtype!r}")
    if (dtype is torch.int8) != (calibration is not None):
        raise ValueError("calibration must be given with dtype=torch.int8, and only with it")
    if dtype is torch.int8 and not (backend_status()["cpu"].usable and multiplies(torch.int8)):
        raise ValueError(
            "dtype must be another than torch.int8, which needs the native kernels and a CPU with "
            "AVX512_VNNI and AVX512_BF16"
        )


def _freeze_inside(
    module: nn.Module,
    path: str,
    maps: torch.dtype | None,
    frozen: dict[int, Any],
    left: dict[str, list[str]],
) -> None:
    """Collect what replaces modules, by id, and by reason the paths of those left."""
    try:
        form = _frozen_form(module, maps)
    except (CannotFreeze, NotCovered) as obstacle:
        if not isinstance(module, MOAT):
            left.setdefault(str(obstacle), []).append(path or type(module).__name__)
            return
        form = None
    if form is not None:
        frozen[id(module)] = form
        return
    before: nn.Module | None = None
    for name, child in module.named_children():
        if isinstance(frozen.get(id(before)), FrozenTransformerBlock):
            mlp = _frozen_mlp(child, maps)
            if mlp is not None:
                frozen[id(child)] = mlp
        if id(child) not in frozen:
            _freeze_inside(child, f"{path}.{name}" if path else name, maps, frozen, left)
        before = child


def _frozen_form(module: nn.Module, maps: torch.dtype | None) -> nn.Module | None:
    """What takes the place of a module; None if only what is inside may be frozen.

    Raises CannotFreeze or NotCovered.
    """
    if isinstance(module, MOAT):
        return FrozenMOAT(module, maps)
    kind = stock_class(module)
    if issubclass(kind, MBConvBlock) and not issubclass(kind, FusedInvertedBottleneck):
        raise CannotFreeze("a plain block: make the model with fused=True, of the same state_dict")
    if isinstance(module, FusedStem | FusedInvertedBottleneck):
        return FrozenBlock(module, maps)
    for reader in _HALVES:
        if (attention := _fused_attention(reader, module)) is not None:
            return _frozen_transformer_block(reader, module, attention, maps)
    return FrozenBlock(module, maps) if isinstance(module, FusedModule) else None


def _fused_attention(reader: HalfReader, module: nn.Module) -> FusedModule | None:
    """The attention that `fuse` found, if a module is a block that the reader is for."""
    if stock_class(module).__name__ != reader.class_name:
        return None
    attention = getattr(module, reader.attention, None) if reader.attention else module
    if isinstance(attention, FusedModule) and attention.adapter_key == reader.adapter_key:
        return attention
    return None


def _frozen_transformer_block(
    reader: HalfReader, block: nn.Module, attention: FusedModule, maps: torch.dtype | None
) -> FrozenTransformerBlock:
    checked_adapter(attention)
    _check_block(reader, block)
    half = reader.read(block)
    x = half.example(reader.leading)
    try:
        return _tried_out(half.with_mlp(reader.read_mlp(block)), block, x, maps)
    except (CannotFreeze, NotCovered):  # the MLP then stays as it is
        return _tried_out(half, block, x, maps)


def _frozen_mlp(block: nn.Module, maps: torch.dtype | None) -> FrozenTransformerBlock | None:
    """What takes the place of a block that is an MLP behind a frozen attention half."""
    for reader in _MLPS:
        if stock_class(block).__name__ == reader.class_name:
            try:
                _check_block(reader, block)
                mlp = reader.read(block)
                return _tried_out(mlp, block, mlp.example(reader.leading), maps)
            except (CannotFreeze, NotCovered):
                pass
    return None


def _freeze_stems(model: nn.Module, maps: torch.dtype | None, frozen: dict[int, Any]) -> None:
    """Collect what replaces stems of models whose blocks are frozen."""
    for module in model.modules():
        for reader in _STEMS:
            if type(module).__name__ == reader.class_name and id(module) not in frozen:
                with suppress(CannotFreeze, NotCovered):  # it then stays as it is
                    _check_block(reader, module)
                    stem = reader.read(module)
                    form = FrozenBlock(stem, maps)
                    _try_out(form, module, stem.example(), maps)
                    frozen[id(module)] = form


def _check_block(reader: HalfReader | MlpReader | StemReader, block: nn.Module) -> None:
    """Raise unless the block is as the reader knows it."""
    if reason := interception(block, "it"):
        raise CannotFreeze(reason)
    if unknown := child_names(block).symmetric_difference(reader.children):
        raise NotCovered(f"unknown or missing {', '.join(sorted(unknown))}")
    refuse_hooks(list(block.modules())[1:])


def _tried_out(
    part: TransformerPart, block: nn.Module, x: Tensor, maps: torch.dtype | None
) -> FrozenTransformerBlock:
    form = FrozenTransformerBlock(part, block, maps)
    _try_out(form, block, x, maps)
    return form


@torch.no_grad()
def _try_out(form: nn.Module, block: nn.Module, x: Tensor, maps: torch.dtype | None) -> None:
    """Raise CannotFreeze unless both give the same: names may be those of changed code."""
    try:
        actual, expected = form(x).double(), block(x).double()
    except Exception as error:
        raise CannotFreeze(f"trying it out failed: {error}") from error
    if actual.shape != expected.shape or not torch.allclose(
        actual, expected, rtol=0.0, atol=_TOLERANCE[maps or x.dtype] * float(expected.abs().max())
    ):
        raise CannotFreeze(
            "its results differ from those of the code that its names are known from"
        )
