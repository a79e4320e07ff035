"""`freeze`: a model for inference on a CPU, its weights packed once."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from itertools import accumulate
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from moat_kernels.adapters import timm, torchvision, vit_pytorch
from moat_kernels.adapters.base import Adapter, MBConvAdapter
from moat_kernels.adapters.freezing import (
    HalfReader,
    MlpReader,
    Operands,
    StemPart,
    StemReader,
    TransformerPart,
    bottleneck_step,
)
from moat_kernels.adapters.fused import FusedModule, is_changed, stock_class
from moat_kernels.adapters.reading import Bottleneck, NotCovered, child_names, refuse_hooks
from moat_kernels.adapters.registry import find_adapter
from moat_kernels.backbone import endpoints, feature_maps
from moat_kernels.calibration import LayerError, Observations, choose_int8
from moat_kernels.chains import Container, chain_containers
from moat_kernels.inspection import interception
from moat_kernels.int8 import quantize, unfrozen_layers
from moat_kernels.models import MOAT
from moat_kernels.modules import FusedInvertedBottleneck, check_runs_as_made
from moat_kernels.ops.common.backends import backend_status, warn_once
from moat_kernels.ops.common.spatial import in_format_of
from moat_kernels.ops.frozen import (
    DTYPES,
    CannotFreeze,
    FrozenSequence,
    FrozenStep,
    Quantizations,
    multiplies,
)
from moat_kernels.stem import FusedStem

Module = TypeVar("Module", bound="FrozenModule")

_HALVES: tuple[HalfReader, ...] = (*timm.HALVES, *torchvision.HALVES, *vit_pytorch.HALVES)
_MLPS: tuple[MlpReader, ...] = vit_pytorch.MLPS
_STEMS: tuple[StemReader, ...] = timm.STEMS
_CONTAINERS: tuple[Container, ...] = (*timm.CONTAINERS, *torchvision.CONTAINERS)
# Of the largest value: rounding of a block, tried out by weights and an input that are given.
_TOLERANCE = {torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}
# Of a block -> those of its steps.
Quantize = Callable[[nn.Module], Sequence[Quantizations]]


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


def _checked_adapter(module: FusedModule) -> Adapter:
    """The adapter of a module, if that runs as it was fused. Raises CannotFreeze or NotCovered."""
    if is_changed(module):
        raise CannotFreeze(f"it became a {type(module).__name__} after it was fused")
    if reason := interception(module, "it"):
        raise CannotFreeze(reason)
    adapter = find_adapter(module.adapter_key)
    adapter.check_structure(module)
    return adapter


def _fused_bottleneck(module: FusedModule) -> Bottleneck:
    adapter = _checked_adapter(module)
    if not isinstance(adapter, MBConvAdapter):
        raise CannotFreeze("an attention without a block around it that is known")
    return adapter.read(module)


def _frozen_transformer_block(
    reader: HalfReader, block: nn.Module, attention: FusedModule, maps: torch.dtype | None
) -> FrozenTransformerBlock:
    _checked_adapter(attention)
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


def _unquantized(_: nn.Module) -> Sequence[Quantizations]:
    return ()


class FrozenModule(nn.Module):
    """What frozen modules share: steps with packed weights, and nothing that could change.

    maps: see `freeze`. observations: if given, what multiplies in int8 is chosen by them.
    int8_report: of each step that could multiply in int8 its error and whether it does; empty if
        int8 was not asked for.
    """

    def __init__(
        self,
        module: Any,
        maps: torch.dtype | None = None,
        observations: Observations | None = None,
    ) -> None:
        super().__init__()
        stages = self._stages_of(module, maps, _unquantized)
        steps = [step for stage in stages for step in stage]
        self.int8_report: list[LayerError] = []
        if observations is not None:

            def alternative(dtype: torch.dtype, quantizations: Quantize) -> list[FrozenStep]:
                return [
                    step
                    for stage in self._stages_of(module, dtype, quantizations)
                    for step in stage
                ]

            steps, self.int8_report = choose_int8(
                steps,
                alternative(torch.bfloat16, observations.quantizations),
                alternative(torch.float32, _unquantized),
                observations.inputs[id(module)],
            )
        self.use(steps)
        # The steps that the stages end with.
        self._ends = [end - 1 for end in accumulate(map(len, stages))]
        self.training = False

    @staticmethod
    def _stages_of(
        module: Any, maps: torch.dtype | None, quantizations: Quantize
    ) -> list[list[FrozenStep]]:
        raise NotImplementedError

    def use(self, steps: Sequence[FrozenStep]) -> None:
        """Compute these."""
        self.sequence = FrozenSequence(steps)

    def operands(self, module: Any) -> list[Operands]:
        """As `int8.Part.operands`."""
        return []

    def train(self: Module, mode: bool = True) -> Module:
        """Stays in eval mode, also inside a model that is trained."""
        return self

    def _apply(self: Module, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Module:
        like = torch.empty(0, dtype=self.sequence.dtype)
        moved = fn(like)
        if moved.dtype != like.dtype or moved.device != like.device:
            raise RuntimeError(
                f"a frozen module stays on the CPU in {like.dtype}, got {moved.dtype} on "
                f"{moved.device}: convert the model that was frozen, and freeze it again"
            )
        return self

    def extra_repr(self) -> str:
        int8 = sum(layer.int8 for layer in self.int8_report)
        report = f", int8 in {int8} of {len(self.int8_report)} layers" if self.int8_report else ""
        return f"{self.sequence.dtype}, {self.sequence.bytes / 2**20:.1f} MiB packed{report}"


class FrozenBlock(FrozenModule):
    """A fused block or a stem as it was when frozen; see `freeze`."""

    def __init__(
        self,
        block: FusedInvertedBottleneck | FusedStem | FusedModule | StemPart,
        maps: torch.dtype | None = None,
        observations: Observations | None = None,
    ) -> None:
        super().__init__(block, maps, observations)
        self.keeps_format = not isinstance(block, FusedStem)

    @property
    def whole_sequence(self) -> FrozenSequence:
        """What computes all of it; see `chains`."""
        return self.sequence

    @staticmethod
    def _stages_of(
        module: FusedInvertedBottleneck | FusedStem | FusedModule | StemPart,
        maps: torch.dtype | None,
        quantizations: Quantize,
    ) -> list[list[FrozenStep]]:
        if isinstance(module, StemPart):
            return [module.steps(maps)]
        if not isinstance(module, FusedInvertedBottleneck | FusedStem):
            return [[bottleneck_step(_fused_bottleneck(module), maps, *quantizations(module))]]
        return [module.frozen_steps(maps, quantizations(module))]

    def operands(self, module: nn.Module) -> list[Operands]:
        if not isinstance(module, FusedModule):
            return []
        project = _fused_bottleneck(module).project
        return [] if project is None else [(module, project)]

    def steps_in_int8(
        self, module: FusedModule, quantizations: Sequence[Quantizations]
    ) -> list[FrozenStep]:
        """As `int8.Part.steps_in_int8`."""
        (steps,) = self._stages_of(module, torch.bfloat16, lambda _: quantizations)
        return steps

    def unfrozen_names(self) -> tuple[str, ...]:
        return ()

    @torch.compiler.disable
    def forward(self, x: Tensor) -> Tensor:
        (output,) = self.sequence.outputs(x, self._ends)
        return in_format_of(output, x) if self.keeps_format else output


class FrozenHalves(FrozenModule):
    """The attention half of somebody's transformer block, its MLP, or both, in one native call.

    Its results are in channels_last.
    """

    @staticmethod
    def _stages_of(
        module: TransformerPart, maps: torch.dtype | None, quantizations: Quantize
    ) -> list[list[FrozenStep]]:
        return [module.steps(maps)]

    @torch.compiler.disable
    def forward(self, x: Tensor) -> Tensor:
        return self.sequence.outputs(x, self._ends)[0]


class FrozenTransformerBlock(nn.Module):
    """Somebody's transformer block whose halves, or one of them, are frozen; see `freeze`.

    An MLP that is not is made of the block's own modules, under their names.
    """

    def __init__(
        self, part: TransformerPart, block: nn.Module, maps: torch.dtype | None = None
    ) -> None:
        super().__init__()
        self._part: TransformerPart | None = part
        self.halves = FrozenHalves(part, maps)
        self.int8_report = self.halves.int8_report
        self._rows, self._branch, self._branch_rows = part.rows, part.branch, part.branch_rows
        for name in part.branch:
            self.add_module(name, getattr(block, name))
        self.training = block.training

    @property
    def sequence(self) -> FrozenSequence:
        """That of the halves."""
        return self.halves.sequence

    def use(self, steps: Sequence[FrozenStep]) -> None:
        self.halves.use(steps)

    def operands(self, _: nn.Module) -> list[Operands]:
        """As `int8.Part.operands`."""
        return self._part.operands() if self._part else []

    def steps_in_int8(
        self, _: nn.Module, quantizations: Sequence[Quantizations]
    ) -> list[FrozenStep]:
        """As `int8.Part.steps_in_int8`."""
        assert self._part is not None
        return self._part.steps(torch.bfloat16, quantizations)

    def unfrozen_names(self) -> tuple[str, ...]:
        return self._branch

    @property
    def reads_rows(self) -> bool:
        """Whether it reads [.., H, W, C]."""
        return self._rows

    @property
    def whole_sequence(self) -> FrozenSequence | None:
        """What computes all of it, if that is so; see `chains`."""
        return None if self._branch else self.sequence

    def let_go(self, copies: dict[int, Any]) -> None:
        """Share nothing with the block any more. copies: of other modules, by id."""
        self._part = None
        for name in self._branch:
            self.add_module(name, copy.deepcopy(getattr(self, name), copies))

    def forward(self, x: Tensor) -> Tensor:
        y = self.halves(self._as_maps(x))
        if self._branch:
            y = y.permute(0, 2, 3, 1) if self._branch_rows else y
            branch = y
            for name in self._branch:
                branch = getattr(self, name)(branch)
            y = y + branch
            y = y.permute(0, 3, 1, 2) if self._branch_rows else y
        return y.permute(0, 2, 3, 1).reshape(x.shape) if self._rows else in_format_of(y, x)

    def _as_maps(self, x: Tensor) -> Tensor:
        if not self._rows or not isinstance(x, Tensor):
            return x
        if x.dim() < 4:
            raise ValueError(f"x must be [B, H, W, C], got {tuple(x.shape)}")
        return x.reshape(-1, *x.shape[-3:]).permute(0, 3, 1, 2)


class FrozenMOAT(FrozenModule):
    """A MOAT as it was when frozen; called like it, with the same results. See `freeze`."""

    def __init__(
        self,
        model: MOAT,
        maps: torch.dtype | None = None,
        observations: Observations | None = None,
    ) -> None:
        super().__init__(model, maps, observations)
        self.features_only = model.features_only
        self.out_indices = model.out_indices
        self.num_features = model.num_features
        self.num_classes = model.num_classes
        self.feature_info = copy.deepcopy(model.feature_info)
        self.pretrained_cfg = self.default_cfg = copy.deepcopy(model.pretrained_cfg)
        self._channels, self._strides = model.channels(), model.strides()
        features = self._ends[-2] + 1
        self._last = self._ends[-1:]
        self._features = self.sequence.part(0, features)
        self._head = None if model.features_only else self.sequence.part(features, None)

    @staticmethod
    def _stages_of(
        module: MOAT, maps: torch.dtype | None, quantizations: Quantize
    ) -> list[list[FrozenStep]]:
        """Those of stem and stages, then of the head, which may have none."""
        check_runs_as_made(module, (MOAT,))
        return [*module.steps_of_stages(maps, quantizations), module.steps_of_head(maps)]

    def channels(self) -> list[int]:
        """As MOAT.channels."""
        return list(self._channels)

    def strides(self) -> list[int]:
        """As MOAT.strides."""
        return list(self._strides)

    @torch.compiler.disable
    def forward_stages(self, x: Tensor) -> list[Tensor]:
        """As MOAT.forward_stages: the raw outputs of the stem and the stages."""
        return self._features.outputs(x, self._ends[:-1])

    @torch.compiler.disable
    def forward_features(self, x: Tensor) -> Tensor:
        """As MOAT.forward_features: the last stage's raw map."""
        return self._features.outputs(x, self._ends[-2:-1])[0]

    @torch.compiler.disable
    def forward_head(self, x: Tensor) -> Tensor:
        """As MOAT.forward_head: pooled, normalised and classified."""
        if self._head is None:
            raise RuntimeError("the frozen model has no head: it was made with features_only")
        return self._head.outputs(x, [0])[0]

    @torch.compiler.disable
    def forward(self, x: Tensor) -> Tensor | list[Tensor] | OrderedDict[str, Tensor]:
        if not self.features_only:
            return self.sequence.outputs(x, self._last)[0]
        if self.out_indices is None:
            return endpoints(self.forward_stages(x), x.is_contiguous())
        levels = sorted(set(self.out_indices))
        outputs = self._features.outputs(x, [self._ends[level] for level in levels])
        positions = [levels.index(level) for level in self.out_indices]
        return feature_maps(outputs, positions, x.is_contiguous())
