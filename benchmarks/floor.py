"""What bounds a contender: its bare matrix products, and the most that the machine can do."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from device import chosen, synchronize
from torch import Tensor

Product = Callable[[Tensor, Tensor], Tensor]


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


def peak_gflops(side: int = 1536) -> float:
    """The most that a large matrix product reaches here, in GFLOP/s: the best of its floors."""
    left, right = (torch.randn(side, side, device=chosen()) for _ in range(2))
    fastest = float("inf")
    for product in product_floors().values():
        for _ in range(4):
            synchronize()
            start = time.perf_counter()
            product(left, right)
            synchronize()
            fastest = min(fastest, time.perf_counter() - start)
    return 2 * side**3 / fastest / 1e9
