"""Every Triton kernel of `mbconv` that the MOAT variants launch, on meta tensors."""

from __future__ import annotations

import torch

from moat_kernels import get_preprocessing, list_models
from moat_kernels.functional import MBConvDescription, Pool, SqueezeExcite
from moat_kernels.ops.mbconv import front, triton_backend
from moat_kernels.variants import get_variant
from support.mbconv_cases import Case, make_parameters

BATCHES = (1, 64)


def blocks(name: str) -> list[tuple[Case, int]]:
    """The different inverted bottlenecks of a variant, and the sizes of the maps they see."""
    variant, size = get_variant(name), get_preprocessing(name).resolution // 2
    in_channels, found = variant.stem_width, []
    for stage, channels in enumerate(variant.widths):
        # The first two stages are MBConv blocks, which have squeeze-excite.
        gate = SqueezeExcite() if stage < 2 else None
        first = MBConvDescription(stride=2, pool=Pool(), squeeze_excite=gate)
        case = Case(first, in_channels, 4 * channels, channels, shortcut_conv=True)
        found.append((case, size))
        size //= 2
        other = MBConvDescription(squeeze_excite=gate)
        found.append((Case(other, channels, 4 * channels, channels), size))
        in_channels = channels
    return found


def launch_mbconv(dtype: torch.dtype) -> None:
    """Evaluation, forward and backward of every inverted bottleneck of the nine variants."""
    needed = frozenset(("x", *front.PARAMETER_NAMES))
    for name in list_models():
        for case, size in blocks(name):
            with torch.device("meta"):
                parameters = make_parameters(case, dtype)
            for batch in BATCHES:
                shape = (batch, case.in_channels, size, size)
                x = torch.empty(shape, dtype=dtype, device="meta")
                scale = x.new_empty(batch)
                for training in (False, True):
                    description = front.resolve_frozen(case.description, parameters, training)
                    arguments = (parameters, description, "none" if training else "block", scale)
                    result = triton_backend.forward(x, *arguments)
                triton_backend.backward(result.output, x, *arguments, result.saved, needed)
