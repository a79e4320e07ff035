"""The MOAT that most people run: moat_2 as Keras has it, 448 pixels, thousands of tags.

It is distributed for a batch of 1, as an ONNX file; here every runtime gets both batches. Images
are pixels of 0..255, which the model scales itself. `ms_per_megapixel` compares the batches: an
image is 0.2 megapixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from bench_mbconv import FROZEN, FUSED
from bench_models import exact_logits, forward, freeze, largest_error
from images import measured_images
from interleaved import Comparison, Contender, Group, contenders_of
from runtimes import Served, available, make_runtime
from torch import Tensor

import moat_kernels as mk
from moat_kernels.configuration import KERAS

NAME, RESOLUTION, TAGS = "moat_2", 448, 9000
BATCHES = (1, 4)
OPTIONS: dict[str, Any] = {
    **KERAS,
    "num_classes": TAGS,
    "window_size": (None, None, 14, None),
    "drop_path_rate": 0.0,
}
STOCK = "stock channels_last"
BFLOAT16 = tuple(f"{name} bfloat16" for name in FROZEN)
RUNTIMES = available("ONNX Runtime", "OpenVINO", "OpenVINO float32")


def make_model(fused: bool) -> mk.MOAT:
    torch.manual_seed(0)
    return mk.create_model(NAME, fused=fused, **OPTIONS).eval()


def pixels(batch: int) -> Tensor:
    return (measured_images(batch, RESOLUTION) * 64 + 128).clamp(0, 255).round()


def make_group(batch: int, names: Sequence[str]) -> Group:
    x = pixels(batch)
    channels_last = x.to(memory_format=torch.channels_last)
    stock = make_model(fused=False)
    served = Served(stock, x)
    exact = exact_logits(stock, x[:1])

    def make(name: str) -> Contender:
        if name in RUNTIMES:
            return make_runtime(name, served)
        if name == STOCK:
            return Contender(torch.no_grad()(partial(stock, channels_last)))
        model: Any = make_model(fused=True)
        if "frozen" in name:
            model = freeze(model, "bfloat16" if name in BFLOAT16 else None, ())
        backend = name.split()[0]
        return Contender(torch.no_grad()(partial(forward, model, channels_last, backend)))

    def make_with_error(name: str) -> Contender:
        contender = make(name)

        def facts() -> dict[str, float]:
            return {"logit_error": largest_error(contender.call()[:1], exact)}

        return replace(contender, facts=facts, pixels=batch * RESOLUTION**2)

    return Group(names, make_with_error)


TAGGER = [
    Comparison(
        f"tagger {NAME} {RESOLUTION} px batch {batch}",
        partial(make_group, batch),
        contenders=(STOCK, *RUNTIMES, *FUSED[1:], *FROZEN, *BFLOAT16),
        full=True,
    )
    for batch in BATCHES
]


@pytest.mark.parametrize(("comparison", "contender"), contenders_of(TAGGER))
def test_tagger(measure: Any, comparison: Comparison, contender: str) -> None:
    measure(comparison, contender)
