"""A MOAT without classifier: stem, four stages, and the maps that dense prediction reads."""

from __future__ import annotations

import contextlib
import warnings
from collections import OrderedDict
from collections.abc import Callable, Sequence
from itertools import chain, islice
from typing import Any, NoReturn

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from moat_kernels.configuration import (
    METADATA_KEY,
    OFFICIAL,
    ConfigurationError,
    adaptations,
    turned,
    turns_channels,
)
from moat_kernels.drop_path import DropPath, drawing_together
from moat_kernels.inspection import interception
from moat_kernels.modules import FusedInvertedBottleneck, FusedMBConv, FusedMOATBlock
from moat_kernels.ops.common.backends import keep_backend
from moat_kernels.ops.common.checks import (
    check_choice,
    check_positive_integer,
    check_positive_integers,
)
from moat_kernels.ops.frozen import CannotFreeze, FrozenStep, Quantizations
from moat_kernels.preprocessing import CHANNEL_ORDERS
from moat_kernels.reference import MBConvBlock, MOATBlock
from moat_kernels.stem import FusedStem, Stem
from moat_kernels.tracing import call_as_node, is_traced

STAGES = 4
LEVELS = STAGES + 1  # level 0 is the stem's output, level i that of stage i - 1
OUTPUT_STRIDES = (8, 16, 32)
ATTENTION_STAGES = (2, 3)  # the last two stages are MOAT blocks, the first two MBConv blocks
POSITION_SIZES = {
    2: 14,
    3: 7,
}  # of the bias tables, whatever the resolution: 224 px at stride 16, 32
HEAD_DIM = 32
FIRST_CONVOLUTION = "stem.conv_0.weight"

Window = int | tuple[int, int] | None


class Backbone(nn.Module):
    """Stem, two MBConv stages, two MOAT stages; what `MOAT` adds its classifier to.

    out_indices: the levels whose maps are wanted; stages behind the last one are not built.
    """

    grad_checkpointing = False  # see `set_grad_checkpointing`

    def __init__(
        self,
        stem_width: int,
        widths: Sequence[int],
        depths: Sequence[int],
        *,
        out_indices: Sequence[int] | None = None,
        in_chans: int = 3,
        output_stride: int = 32,
        window_size: Sequence[Window] | None = None,
        global_attention_at_end: bool = False,
        pool_size: int = 2,
        position_embedding: bool = True,
        se_activation: str = OFFICIAL["se_activation"],
        layer_norm_eps: float = OFFICIAL["layer_norm_eps"],
        pixel_scaling: bool = OFFICIAL["pixel_scaling"],
        channel_order: str = OFFICIAL["channel_order"],
        drop_path_rate: float = 0.0,
        fused: bool = True,
        recompute: str = "auto",
    ) -> None:
        super().__init__()
        check_positive_integers(stem_width=stem_width, pool_size=pool_size, in_chans=in_chans)
        check_choice("channel_order", channel_order, CHANNEL_ORDERS)
        check_choice("pixel_scaling", pixel_scaling, (False, True))
        _check_per_stage("widths", widths)
        _check_per_stage("depths", depths)
        windows = _windows_per_stage(window_size)
        if not 0.0 <= drop_path_rate < 1.0:
            raise ValueError(f"drop_path_rate must be within [0, 1), got {drop_path_rate!r}")
        if output_stride not in OUTPUT_STRIDES:
            raise ValueError(
                f"output_stride must be one of {OUTPUT_STRIDES}, got {output_stride!r}"
            )
        self.out_indices = None if out_indices is None else check_out_indices(out_indices)
        self.fused = fused
        self.in_chans = in_chans
        self._recompute_before: dict[str, Any] = {}  # by path, while gradients are checkpointed
        # What the weights are for, whatever computes them; see `moat_kernels.configuration`.
        self.configuration: dict[str, Any] = {
            "stem_width": stem_width,
            "widths": tuple(widths),
            "depths": tuple(depths),
            "in_chans": in_chans,
            "output_stride": output_stride,
            "window_size": windows,
            "global_attention_at_end": global_attention_at_end,
            "pool_size": pool_size,
            "position_embedding": position_embedding,
            "se_activation": se_activation,
            "layer_norm_eps": layer_norm_eps,
            "pixel_scaling": pixel_scaling,
            "channel_order": channel_order,
        }
        recomputes = recompute in ("expand", "block")
        self.stem = (
            FusedStem(stem_width, in_chans, recompute=recomputes)
            if fused
            else Stem(stem_width, in_chans)
        )
        self.stages = nn.ModuleList()
        # Block i of n survives with 1 - rate * i / n: the first always, the last never quite at
        # the full rate (official code divides by n, not n - 1).
        blocks, index, channels = sum(depths), 0, stem_width
        strides = strides_of_stages(output_stride)
        built = STAGES if self.out_indices is None else max(self.out_indices)
        for stage, (width, depth) in enumerate(zip(widths[:built], depths[:built], strict=True)):
            stage_blocks = nn.ModuleList()
            for position in range(depth):
                options: dict[str, Any] = {
                    "stride": strides[stage] if position == 0 else 1,
                    "pool_size": pool_size,
                    "drop_path": drop_path_rate * index / blocks,
                }
                if fused:
                    options["recompute"] = recompute
                if stage in ATTENTION_STAGES:
                    whole_map = global_attention_at_end and position == depth - 1
                    options["window_size"] = None if whole_map else windows[stage]
                    options["position_size"] = POSITION_SIZES[stage] if position_embedding else None
                    options["head_dim"] = HEAD_DIM
                    options["layer_norm_eps"] = layer_norm_eps
                else:
                    options["se_activation"] = se_activation
                stage_blocks.append(_block_class(stage, fused)(channels, width, **options))
                channels, index = width, index + 1
            self.stages.append(stage_blocks)
        # Of each level, as timm has it.
        self.feature_info: Any = [
            {
                "num_chs": (stem_width, *widths)[level],
                "reduction": reduction,
                "module": f"stages.{level - 1}" if level else "stem",
            }
            for level, reduction in enumerate(strides_of_levels(output_stride)[: built + 1])
        ]

    def __prepare_scriptable__(self) -> NoReturn:
        """What torch.jit.script asks for, to script it instead. Raises RuntimeError."""
        raise RuntimeError(
            f"{type(self).__name__}: torch.jit.script cannot read it; torch.export and "
            "torch.onnx.export work, and so does torch.jit.trace of a model with fused=False"
        )

    def channels(self) -> list[int]:
        """Of the maps of `out_indices`, or of all five levels."""
        widths = (self.configuration["stem_width"], *self.configuration["widths"])
        return [widths[level] for level in self._levels()]

    def strides(self) -> list[int]:
        """Of the maps of `out_indices`, or of all levels: pixels of the image to one of theirs."""
        found = strides_of_levels(self.configuration["output_stride"])
        return [found[level] for level in self._levels()]

    def forward_stages(self, x: Tensor, last: int | None = None) -> list[Tensor]:
        """The raw outputs of the stem and the stages, at strides 2, 4, 8, 16, 32.

        last: the level after which to stop. With fused blocks the outputs are in channels_last,
        whatever x is.
        """
        if not is_traced(x) and (
            not isinstance(x, Tensor) or x.dim() != 4 or x.shape[1] != self.in_chans
        ):
            found = tuple(x.shape) if isinstance(x, Tensor) else type(x).__name__
            raise ValueError(f"x must be [B, {self.in_chans}, H, W], got {found}")
        outputs = [self._run(self.stem, self.scale_pixels(x))]
        with self._drawing_together(outputs[0]):
            for stage in islice(self.stages, last):
                x = outputs[-1]
                for block in stage if isinstance(stage, nn.ModuleList) else (stage,):
                    x = self._run(block, x)
                outputs.append(x)
        return outputs

    def scale_pixels(self, x: Tensor) -> Tensor:
        """What the stem reads of x: x itself, or, with pixel_scaling, pixels of 0..255 in -1..1."""
        if not self.configuration["pixel_scaling"]:
            return x
        return scale_pixels(x, self.stem.conv_0.weight.dtype)

    def _drawing_together(self, x: Tensor) -> contextlib.AbstractContextManager[None]:
        """One draw for the drop paths of all blocks, for maps like x; none if they do not train."""
        if not torch.is_grad_enabled() or torch.compiler.is_compiling() or type(x) is not Tensor:
            return contextlib.nullcontext()
        drawing = []
        for block in chain.from_iterable(
            stage if isinstance(stage, nn.ModuleList | nn.Sequential) else (stage,)
            for stage in self.stages
        ):
            drop_path = block._modules.get("drop_path") if isinstance(block, MBConvBlock) else None
            if isinstance(drop_path, DropPath) and drop_path.training and drop_path.probability:
                drawing += [drop_path] * (2 if isinstance(block, MOATBlock) else 1)
        return drawing_together(drawing, x) if drawing else contextlib.nullcontext()

    def forward_features(self, x: Tensor) -> Tensor:
        """The last stage's raw map [B, C, ceil(H/32), ceil(W/32)]."""
        return self.forward_stages(x)[-1]

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | Sequence[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """(The last raw map, the maps of `indices`): timm's way to ask a model for its maps.

        indices: levels as in `out_indices`, in their order; n: the last n; None: all. Each map is
            the official endpoint "res", as with `out_indices`.
        norm: no map is normalised, as the model's last norm is behind its pool.
        stop_early: do not compute levels behind the last of `indices`.
        output_fmt: "NCHW".
        intermediates_only: return the list alone.

        Raises ValueError naming the argument.
        """
        if output_fmt != "NCHW":
            raise ValueError(f"output_fmt must be 'NCHW', got {output_fmt!r}")
        levels = self._levels_taken(indices)
        outputs = self.forward_stages(x, max(levels) if stop_early else None)
        maps = feature_maps(outputs, levels, not is_traced(x) and x.is_contiguous())
        return maps if intermediates_only else (outputs[-1], maps)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Keep the inputs of stem and blocks alone for the backward pass; or what was kept before.

        Fused modules get recompute="block", others run in `torch.utils.checkpoint`.
        """
        if enable and not self.grad_checkpointing:
            self._recompute_before = {
                path: module.recompute for path, module in self._recomputing_modules().items()
            }
        for path, module in self._recomputing_modules().items():
            if enable:
                module.recompute = True if isinstance(module, FusedStem) else "block"
            elif path in self._recompute_before:
                module.recompute = self._recompute_before[path]
        self.grad_checkpointing = enable

    def steps_of_stages(
        self,
        maps: torch.dtype | None = None,
        quantizations: Callable[[nn.Module], Sequence[Quantizations]] = lambda _: (),
    ) -> list[list[FrozenStep]]:
        """What inference computes in the stem and each stage, its weights packed as they are now.

        maps: the dtype of the maps and of products; None: that of the weights.
        quantizations: of the steps of a block, if they are to multiply in int8.
        Raises CannotFreeze.
        """
        steps: list[list[FrozenStep]] = []
        for stage in (self.stem, *self.stages):
            steps.append([])
            for block in _blocks_of(stage):
                if not isinstance(block, FusedStem | FusedInvertedBottleneck):
                    raise CannotFreeze(f"a {type(block).__name__} among its blocks")
                steps[-1] += block.frozen_steps(maps, quantizations(block))
        return steps

    def _run(self, module: nn.Module, x: Tensor) -> Tensor:
        """module(x), where only x is kept for the backward pass if that was asked for."""
        if is_traced(x):
            return call_as_node(module, x) if isinstance(module, Stem | MBConvBlock) else module(x)
        checkpoints = self.grad_checkpointing and torch.is_grad_enabled()
        if not checkpoints or isinstance(module, FusedStem | FusedInvertedBottleneck):
            return module(x)
        return checkpoint(keep_backend(module), x, use_reentrant=False)

    def _recomputing_modules(self) -> dict[str, Any]:
        """Those that have a `recompute`, by their paths."""
        kinds = (FusedStem, FusedInvertedBottleneck)
        return {path: module for path, module in self.named_modules() if isinstance(module, kinds)}

    def _levels_taken(self, indices: int | Sequence[int] | None) -> tuple[int, ...]:
        """The levels that `indices` of timm's methods mean. Raises ValueError."""
        levels = len(self.stages) + 1
        if indices is None:
            return tuple(range(levels))
        if type(indices) is int and 0 < indices <= levels:
            return tuple(range(levels))[-indices:]
        return check_out_indices(indices, levels, "indices")  # type: ignore[arg-type]

    def _levels(self) -> Sequence[int]:
        return range(LEVELS) if self.out_indices is None else self.out_indices

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if hasattr(destination, "_metadata"):
            destination._metadata[prefix[:-1]][METADATA_KEY] = self.description()

    def description(self) -> dict[str, Any]:
        """What travels with the weights, see `moat_kernels.configuration`."""
        return dict(self.configuration)

    def _load_from_state_dict(
        self, state_dict: Any, prefix: str, local_metadata: Any, *arguments: Any
    ) -> None:
        """Raises RuntimeError, before anything is loaded, for weights of another configuration."""
        found = local_metadata.get(METADATA_KEY)
        if isinstance(found, dict):
            try:
                notes = adaptations(found, self.configuration)
            except ConfigurationError as error:
                raise RuntimeError(f"loading state_dict for MOAT: {error}") from error
            for note in notes:
                warnings.warn(f"loading state_dict for MOAT: {note}", stacklevel=2)
            first = f"{prefix}{FIRST_CONVOLUTION}"
            if first in state_dict and turns_channels(found, self.configuration):
                state_dict[first] = turned(state_dict[first])
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *arguments)


def scale_pixels(x: Tensor, dtype: torch.dtype) -> Tensor:
    """(x - 127.5) / 127.5 of pixels of 0..255, in `dtype` if they are integers."""
    if not is_traced(x) and not x.is_floating_point():
        x = x.to(dtype)
    return (x - 127.5) / 127.5


def strides_of_stages(output_stride: int) -> list[int]:
    """Of each stage's first block: 2, or 1 once the map is at `output_stride`.

    Official code's `stage_stride`; nothing is dilated.
    """
    strides, total = [], 2
    for _ in range(STAGES):
        strides.append(2 if total < output_stride else 1)
        total *= strides[-1]
    return strides


def strides_of_levels(output_stride: int) -> list[int]:
    """Pixels of the image to one of each level's map: 2, 4, 8, 16, 32, none above output_stride."""
    return [min(2 ** (level + 1), output_stride) for level in range(LEVELS)]


def check_out_indices(
    out_indices: Sequence[int], count: int = LEVELS, argument: str = "out_indices"
) -> tuple[int, ...]:
    """The levels as they are asked for, the last of `count` as -1 too. Raises ValueError."""
    levels = tuple(out_indices) if isinstance(out_indices, Sequence) else ()
    if not levels or not all(type(level) is int and -count <= level < count for level in levels):
        raise ValueError(
            f"{argument} must be levels from 0 (stem) to {count - 1} (last stage), "
            f"got {out_indices!r}"
        )
    return tuple(level % count for level in levels)


def feature_maps(
    outputs: Sequence[Tensor], levels: Sequence[int], contiguous: bool
) -> list[Tensor]:
    """The official endpoint "res" of each of the levels: GELU of its raw output."""
    found = {
        level: F.gelu(outputs[level].contiguous() if contiguous else outputs[level])
        for level in set(levels)
    }
    return [found[level] for level in levels]


def endpoints(outputs: Sequence[Tensor], contiguous: bool) -> OrderedDict[str, Tensor]:
    """The ten official endpoints: raw outputs of the stem and the stages, and each one's GELU."""
    named: OrderedDict[str, Tensor] = OrderedDict()
    for number, output in enumerate(outputs, start=1):
        output = output.contiguous() if contiguous else output
        named[f"stage{number}"] = output
        named[f"res{number}"] = F.gelu(output)
    return named


def _blocks_of(stage: nn.Module) -> list[nn.Module]:
    """What runs, one after the other, in a stage; itself if it is none. Raises CannotFreeze."""
    if type(stage) is nn.Sequential and (reason := interception(stage, "a stage")):
        raise CannotFreeze(reason)
    if type(stage) in (nn.Sequential, nn.ModuleList):
        return list(stage)  # type: ignore[call-overload]
    return [stage]


def _block_class(stage: int, fused: bool) -> type[MBConvBlock]:
    if stage in ATTENTION_STAGES:
        return FusedMOATBlock if fused else MOATBlock
    return FusedMBConv if fused else MBConvBlock


def _check_per_stage(argument: str, values: Sequence[int]) -> None:
    if len(values) != STAGES:
        raise ValueError(f"{argument} must have {STAGES} entries, got {values!r}")
    for value in values:
        check_positive_integer(argument, value)


def _windows_per_stage(window_size: Sequence[Window] | None) -> tuple[Window, ...]:
    if window_size is None:
        return (None,) * STAGES
    if isinstance(window_size, int) or len(window_size) != STAGES:
        raise ValueError(
            f"window_size must be None or have one entry per stage ({STAGES}), got {window_size!r}"
        )
    for stage, window in enumerate(window_size):
        if window is not None and stage not in ATTENTION_STAGES:
            raise ValueError(
                f"window_size[{stage}] must be None, got {window!r}: stages 0 and 1 are MBConv "
                "blocks without attention"
            )
    return tuple(_pair(stage, window) for stage, window in enumerate(window_size))


def _pair(stage: int, window: Any) -> tuple[int, int] | None:
    if window is None:
        return None
    pair = (window, window) if isinstance(window, int) else window
    if not isinstance(pair, Sequence) or len(pair) != 2 or not all(type(n) is int for n in pair):
        raise ValueError(
            f"window_size[{stage}] must be None, an integer or (height, width), got {window!r}"
        )
    return pair[0], pair[1]
