"""The MLP step in int8, against its own arithmetic in float64."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from support.native import needs_extension
from support.tolerances import INT8_STEP, assert_close
from torch import Tensor

from moat_kernels.calibration import quantization_of
from moat_kernels.ops.frozen import (
    FrozenSequence,
    Quantization,
    Quantizations,
    mlp_step,
    multiplies,
)

pytestmark = [needs_extension, pytest.mark.each_isa]

EPS = 1e-5
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "identity": lambda x: x,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "silu": F.silu,
    "relu": F.relu,
}
# Channels and hidden channels: below a word, below a vector, of no whole word, vector or block, and
# so many that products are made in pieces.
CHANNELS = [(3, 2), (5, 7), (24, 96), (40, 300), (33, 257), (130, 521), (1601, 70)]
# Few rows, which threads share, and many.
MAPS = [(1, 1, 1), (1, 13, 11), (3, 7, 5), (3, 16, 17)]


@pytest.fixture(autouse=True)
def needs_int8() -> None:
    if not multiplies(torch.int8):
        pytest.skip("these instructions do not multiply int8 and bfloat16")


def make_tensors(channels: int, hidden: int) -> list[Tensor | None]:
    """Weight and bias of the norm, fc1 and fc2."""
    torch.manual_seed(0)
    return [
        *(torch.rand(channels) + 0.5, torch.randn(channels)),
        *(torch.randn(hidden, channels) / channels**0.5, torch.randn(hidden)),
        *(torch.randn(channels, hidden) / hidden**0.5, torch.randn(channels)),
    ]


def make_input(channels: int, batch: int, *size: int) -> Tensor:
    """Numbers that bfloat16 has, as the maps are in it."""
    return torch.randn(batch, channels, *size).bfloat16().float()


def as_bytes(values: Tensor, quantization: Quantization) -> Tensor:
    """What the bytes of `values` stand for."""
    scale, zero = quantization
    return ((values / scale + zero).round().clamp(0, 255) - zero) * scale


def weight_as_bytes(weight: Tensor) -> Tensor:
    """The same with a scale per row."""
    scale = weight.abs().amax(1, keepdim=True) / 127
    return (weight / scale).round() * scale


def hidden_of(x: Tensor, tensors: list[Tensor | None], activation: str) -> tuple[Tensor, Tensor]:
    """The normalised rows and the hidden channels, unquantised."""
    weight, bias, fc1, fc1_bias = (None if t is None else t.double() for t in tensors[:4])
    rows = x.double().permute(0, 2, 3, 1)
    normalized = F.layer_norm(rows, rows.shape[3:], weight, bias, EPS)
    return normalized, ACTIVATIONS[activation](F.linear(normalized, fc1, fc1_bias))


def quantizations_of(x: Tensor, tensors: list[Tensor | None], activation: str) -> Quantizations:
    normalized, hidden = hidden_of(x, tensors, activation)
    return quantization_of(normalized), quantization_of(hidden)


def reference(
    x: Tensor, tensors: list[Tensor | None], activation: str, quantizations: Quantizations
) -> Tensor:
    """The step's arithmetic without the rounding of anything but bytes."""
    fc1, fc1_bias, fc2, fc2_bias = (None if t is None else t.double() for t in tensors[2:])
    assert fc1 is not None and fc2 is not None
    normalized, _ = hidden_of(x, tensors, activation)
    sums = F.linear(as_bytes(normalized, quantizations[0]), weight_as_bytes(fc1), fc1_bias)
    hidden = as_bytes(ACTIVATIONS[activation](sums), quantizations[1])
    return x.double() + F.linear(hidden, weight_as_bytes(fc2), fc2_bias).permute(0, 3, 1, 2)


def run(
    x: Tensor, tensors: list[Tensor | None], activation: str, quantizations: Quantizations
) -> Tensor:
    step = mlp_step(tensors, activation, EPS, torch.bfloat16, quantizations)
    assert step.int8
    return FrozenSequence([step]).outputs(x, [0])[0]


@pytest.mark.parametrize("channels", CHANNELS)
@torch.no_grad()
def test_sizes(channels: tuple[int, int]) -> None:
    tensors = make_tensors(*channels)
    quantizations = quantizations_of(make_input(channels[0], 3, 9, 9), tensors, "gelu")
    for size in MAPS:
        x = make_input(channels[0], *size)
        found = run(x, tensors, "gelu", quantizations)
        assert_close(found, reference(x, tensors, "gelu", quantizations), INT8_STEP)
        last = x.contiguous(memory_format=torch.channels_last)
        assert torch.equal(run(last, tensors, "gelu", quantizations), found)
    assert run(x[:0], tensors, "gelu", quantizations).shape == (0, channels[0], 16, 17)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@torch.no_grad()
def test_activations_and_what_may_be_missing(activation: str) -> None:
    for missing in ((), (1,), (3,), (5,), (0, 1, 3, 5)):
        tensors = make_tensors(29, 103)
        for index in missing:
            tensors[index] = None
        for batch in (1, 3):
            x = make_input(29, batch, 7, 5)
            quantizations = quantizations_of(x, tensors, activation)
            found = run(x, tensors, activation, quantizations)
            assert_close(found, reference(x, tensors, activation, quantizations), INT8_STEP)


@torch.no_grad()
def test_values_beyond_the_range_are_clamped() -> None:
    tensors = make_tensors(29, 103)
    quantizations = quantizations_of(make_input(29, 3, 9, 9), tensors, "gelu")
    narrow = tuple(Quantization(scale / 3, zero) for scale, zero in quantizations)
    x = make_input(29, 3, 7, 5)
    for given in ((narrow[0], quantizations[1]), (quantizations[0], narrow[1])):
        exact = reference(x, tensors, "gelu", given)
        assert_close(run(x, tensors, "gelu", given), exact, INT8_STEP)


@torch.no_grad()
def test_any_number_of_threads_gives_the_same() -> None:
    tensors = make_tensors(40, 300)
    threads = torch.get_num_threads()
    for size in MAPS:
        x = make_input(40, *size)
        quantizations = quantizations_of(x, tensors, "gelu")
        expected = run(x, tensors, "gelu", quantizations)
        try:
            for count in (1, 2, 3, 5):
                torch.set_num_threads(count)
                assert torch.equal(run(x, tensors, "gelu", quantizations), expected), (size, count)
        finally:
            torch.set_num_threads(threads)


@torch.no_grad()
def test_values_that_are_not_finite_stay_in_their_pixel() -> None:
    tensors = make_tensors(24, 100)
    x = make_input(24, 3, 16, 17)
    quantizations = quantizations_of(x, tensors, "gelu")
    clean = run(x, tensors, "gelu", quantizations)
    for value in (float("nan"), float("inf")):
        spoilt = x.clone()
        spoilt[0, 3, 2, 4] = value
        found = run(spoilt, tensors, "gelu", quantizations)
        assert not found[0, 3, 2, 4].isfinite()
        found[0, :, 2, 4] = clean[0, :, 2, 4]
        assert torch.equal(found, clean)


@torch.no_grad()
def test_it_needs_maps_in_bfloat16() -> None:
    tensors = make_tensors(24, 100)
    quantizations = quantizations_of(make_input(24, 1, 4, 4), tensors, "gelu")
    with pytest.raises(RuntimeError, match="int8 products need maps in bfloat16"):
        mlp_step(tensors, "gelu", EPS, torch.float32, quantizations)
