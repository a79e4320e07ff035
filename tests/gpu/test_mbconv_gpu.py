"""`mbconv` on a GPU against the reference in float64, at the shapes of MOAT and at odd ones."""

from __future__ import annotations

import pytest
import torch
from support.backend_comparison import check_mbconv
from support.mbconv_cases import Case

from moat_kernels.functional import MBConvDescription, Pool, SqueezeExcite

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
GATE = SqueezeExcite()
FIRST = MBConvDescription(stride=2, pool=Pool(), squeeze_excite=GATE)

# A bottleneck, and a map (batch, height, width).
CASES = {
    "small": (Case(MBConvDescription(), 8, 16, 8), (2, 8, 9)),
    "small, stride 2": (Case(MBConvDescription(stride=2, pool=Pool()), 8, 16, 8), (2, 8, 9)),
    "stage 1 of moat_0": (Case(FIRST, 64, 384, 96, shortcut_conv=True), (2, 112, 112)),
    "stage 1": (Case(MBConvDescription(squeeze_excite=GATE), 96, 384, 96), (2, 56, 56)),
    "stage 3": (Case(MBConvDescription(), 384, 1536, 384), (2, 14, 14)),
    "stage 4 of moat_2": (Case(MBConvDescription(), 1024, 4096, 1024), (1, 12, 12)),
    "odd": (Case(MBConvDescription(squeeze_excite=GATE), 37, 147, 37), (3, 29, 31)),
    "odd, stride 2": (
        Case(MBConvDescription(stride=2, padding=(2, 0, 1, 3), residual=False), 40, 168, 72),
        (2, 27, 45),
    ),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("recompute", ["none", "expand", "block"])
@pytest.mark.parametrize("name", CASES)
def test_training(
    name: str, recompute: str, dtype: torch.dtype, device: str, kernels: None
) -> None:
    case, shape = CASES[name]
    check_mbconv(case, shape, dtype, device, recompute=recompute)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", CASES)
def test_evaluation(name: str, dtype: torch.dtype, device: str, kernels: None) -> None:
    case, shape = CASES[name]
    check_mbconv(case, shape, dtype, device, training=False, recompute="block")
