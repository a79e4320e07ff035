"""Every Triton kernel of `mbconv` that the MOAT variants launch, on meta tensors."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch

from moat_kernels import get_preprocessing, list_models
from moat_kernels.functional import MBConvDescription, Pool, SqueezeExcite
from moat_kernels.ops.mbconv.description import PARAMETER_NAMES
from moat_kernels.ops.mbconv.dispatch import resolve_frozen
from moat_kernels.ops.mbconv.running_statistics import count_values, plan_updates
from moat_kernels.ops.mbconv.triton import backend as triton_backend
from moat_kernels.variants import get_variant
from support.mbconv_cases import Case, make_parameters

STAGES = (0, 1, 2, 3)
BATCHES = (1, 64)


def bottlenecks(name: str, stages: Iterable[int] = STAGES) -> Iterator[tuple[Case, int]]:
    """The different inverted bottlenecks of a variant, and the size of the map that each sees."""
    variant, resolution = get_variant(name), get_preprocessing(name).resolution
    widths = (variant.stem_width, *variant.widths)
    for stage in stages:
        # The first two stages are MBConv blocks, which have squeeze-excite.
        gate = SqueezeExcite() if stage < 2 else None
        in_channels, channels = widths[stage : stage + 2]
        first = MBConvDescription(stride=2, pool=Pool(), squeeze_excite=gate)
        sizes = {"wide_channels": 4 * channels, "out_channels": channels}
        sizes["squeezed_channels"] = channels // 4
        yield (
            Case(first, in_channels, **sizes, shortcut_conv=True),
            resolution // 2 ** (stage + 1),
        )
        other = MBConvDescription(squeeze_excite=gate)
        yield Case(other, channels, **sizes), resolution // 2 ** (stage + 2)


def launch_mbconv(
    dtype: torch.dtype,
    autocast: bool = False,
    names: Iterable[str] | None = None,
    stages: Iterable[int] = STAGES,
    batches: Iterable[int] = BATCHES,
) -> None:
    """Evaluation, forward and backward of the inverted bottlenecks of variants (None: all nine).

    autocast: x and the norms are float32, as `mbconv` hands them on then.
    """
    needed = frozenset(("x", *PARAMETER_NAMES))
    cast = dtype if autocast else None
    for name in list_models() if names is None else names:
        for case, size in bottlenecks(name, stages):
            with torch.device("meta"):
                parameters = make_parameters(case, torch.float32 if autocast else dtype)
            for batch in batches:
                shape = (batch, case.in_channels, size, size)
                x = torch.empty(shape, dtype=torch.float32 if autocast else dtype, device="meta")
                scale = x.new_empty(batch, dtype=dtype)
                description = resolve_frozen(case.description, parameters, training=False)
                triton_backend.evaluate(x, parameters, description, scale, cast)
                description = resolve_frozen(case.description, parameters, training=True)
                arguments = (parameters, description, "none", scale, cast)
                counts = count_values(x, parameters, description)
                updates = plan_updates(counts, parameters, description)
                result = triton_backend.forward(x, *arguments, updates)
                triton_backend.backward(result.output, x, *arguments, result.saved, needed)
