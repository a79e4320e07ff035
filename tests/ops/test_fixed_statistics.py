"""Norms with fixed statistics: what a sample gives does not depend on the others of its batch."""

from __future__ import annotations

import pytest
from support.mbconv_cases import CASES
from support.native import needs_extension
from support.sample_independence import check_samples_never_mix

NAMES = [
    "stride 1",
    "stride 2, pool 2, projected",
    "squeeze-excite",
    "no pre_norm",
    "no norms",
    "project_norm",
]
# 84 rows of 6 channels keep the norms as they are, 126 fold them into the expand convolution.
SHAPES = [(2, 7, 6), (3, 7, 6)]


@pytest.mark.parametrize("recompute", ["none", "expand", "block"])
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("backend", ["torch", pytest.param("cpu", marks=needs_extension)])
def test_samples_never_mix(backend: str, name: str, recompute: str) -> None:
    for shape in SHAPES:
        check_samples_never_mix(backend, CASES[name], shape, recompute=recompute)
