"""What bounds a contender: its bare matrix products, and the most that the machine can do."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from device import chosen, measured_dtype, placed, time_calls
from torch import Tensor

Product = Callable[[Tensor, Tensor], Tensor]

# Rows, depth and columns of a product that fills the device, and how often it is tried: a GPU needs
# some milliseconds at work to reach its clock.
PEAK_SIDES = {"cpu": 1536, "cuda": 8192}
PEAK_CALLS = {"cpu": 4, "cuda": 20}


def onednn_product(left: Tensor, right: Tensor) -> Tensor:
    """left @ right by oneDNN, which uses AVX-512 on every processor that has it.

    torch.mm calls MKL, which does so on Intel's only. This is the operator that torch.compile
    calls for linear layers; no public function reaches it in float32.
    """
    return torch.ops.mkldnn._linear_pointwise(left, right.t(), None, "none", [], "")


def product_floors() -> dict[str, Product]:
    """The products to compare with, by the name of their row."""
    floors: dict[str, Product] = {"floor": torch.mm}
    if (
        chosen() == "cpu"
        and torch.backends.mkldnn.is_available()
        and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    ):
        floors["floor, oneDNN"] = onednn_product
    return floors


def peak_gflops() -> float:
    """The most that a large matrix product reaches here, in GFLOP/s: the best of its floors.

    In the dtype that is measured.
    """
    side, dtype = PEAK_SIDES[chosen()], measured_dtype()
    with placed():
        left, right = (torch.randn(side, side, dtype=dtype) for _ in range(2))
    fastest = min(
        min(time_calls(partial(product, left, right), PEAK_CALLS[chosen()]))
        for product in product_floors().values()
    )
    return 2 * side**3 / fastest / 1e9
