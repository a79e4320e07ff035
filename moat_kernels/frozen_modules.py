"""What takes the place of modules that `freeze` freezes: steps with packed weights."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from moat_kernels.adapters.base import Adapter, MBConvAdapter
from moat_kernels.adapters.freezing import (
    Operands,
    StemPart,
    TransformerPart,
    bottleneck_step,
)
from moat_kernels.adapters.fused import FusedModule, is_changed
from moat_kernels.adapters.reading import Bottleneck
from moat_kernels.adapters.registry import find_adapter
from moat_kernels.backbone import endpoints, feature_maps, scale_pixels
from moat_kernels.calibration import LayerError, Observations, choose_int8
from moat_kernels.inspection import interception
from moat_kernels.models import MOAT
from moat_kernels.modules import FusedInvertedBottleneck, check_runs_as_made
from moat_kernels.ops.common.spatial import in_format_of
from moat_kernels.ops.frozen import (
    CannotFreeze,
    FrozenSequence,
    FrozenStep,
    Quantizations,
)
from moat_kernels.stem import FusedStem

Module = TypeVar("Module", bound="FrozenModule")

# Of a block -> those of its steps.
Quantize = Callable[[nn.Module], Sequence[Quantizations]]


def checked_adapter(module: FusedModule) -> Adapter:
    """The adapter of a module, if that runs as it was fused. Raises CannotFreeze or NotCovered."""
    if is_changed(module):
        raise CannotFreeze(f"it became a {type(module).__name__} after it was fused")
    if reason := interception(module, "it"):
        raise CannotFreeze(reason)
    adapter = find_adapter(module.adapter_key)
    adapter.check_structure(module)
    return adapter


def fused_bottleneck(module: FusedModule) -> Bottleneck:
    adapter = checked_adapter(module)
    if not isinstance(adapter, MBConvAdapter):
        raise CannotFreeze("an attention without a block around it that is known")
    return adapter.read(module)


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
                [self._scaled(module, x) for x in observations.inputs[id(module)]],
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

    @staticmethod
    def _scaled(module: Any, x: Tensor) -> Tensor:
        """What the first step reads of a module's input."""
        return x

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
            return [[bottleneck_step(fused_bottleneck(module), maps, *quantizations(module))]]
        return [module.frozen_steps(maps, quantizations(module))]

    def operands(self, module: nn.Module) -> list[Operands]:
        if not isinstance(module, FusedModule):
            return []
        return [(module, fused_bottleneck(module).modules.project)]

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
        self.configuration = dict(model.configuration)
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

    @staticmethod
    def _scaled(module: MOAT, x: Tensor) -> Tensor:
        return module.scale_pixels(x)

    def channels(self) -> list[int]:
        """As MOAT.channels."""
        return list(self._channels)

    def strides(self) -> list[int]:
        """As MOAT.strides."""
        return list(self._strides)

    @torch.compiler.disable
    def forward_stages(self, x: Tensor) -> list[Tensor]:
        """As MOAT.forward_stages: the raw outputs of the stem and the stages."""
        return self._features.outputs(self._read(x), self._ends[:-1])

    @torch.compiler.disable
    def forward_features(self, x: Tensor) -> Tensor:
        """As MOAT.forward_features: the last stage's raw map."""
        return self._features.outputs(self._read(x), self._ends[-2:-1])[0]

    @torch.compiler.disable
    def forward_head(self, x: Tensor) -> Tensor:
        """As MOAT.forward_head: pooled, normalised and classified."""
        if self._head is None:
            raise RuntimeError("the frozen model has no head: it was made with features_only")
        return self._head.outputs(x, [0])[0]

    @torch.compiler.disable
    def forward(self, x: Tensor) -> Tensor | list[Tensor] | OrderedDict[str, Tensor]:
        if not self.features_only:
            return self.sequence.outputs(self._read(x), self._last)[0]
        if self.out_indices is None:
            return endpoints(self.forward_stages(x), x.is_contiguous())
        levels = sorted(set(self.out_indices))
        outputs = self._features.outputs(self._read(x), [self._ends[level] for level in levels])
        positions = [levels.index(level) for level in self.out_indices]
        return feature_maps(outputs, positions, x.is_contiguous())

    def _read(self, x: Tensor) -> Tensor:
        """What the stem reads of x."""
        return scale_pixels(x, self.sequence.dtype) if self.configuration["pixel_scaling"] else x
