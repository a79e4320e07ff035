"""Training by the native CPU kernels in 16-bit types and under autocast."""

from __future__ import annotations

import warnings

import pytest
import torch
from support.mbconv_cases import Case, make_parameters, map_tensors, run
from support.native import needs_extension
from support.tolerances import BACKEND_OUTPUT, LOW_PRECISION_FACTOR, assert_close, relative_error

from moat_kernels import FallbackWarning, use_backend
from moat_kernels.functional import MBConvDescription, Norm, Pool, SqueezeExcite, mbconv
from moat_kernels.memory import saved_bytes
from moat_kernels.ops.mbconv.description import (
    flatten,
)

pytestmark = needs_extension

STRIDE_2 = MBConvDescription(stride=2, pool=Pool(kernel_size=3))
GATED = MBConvDescription(squeeze_excite=SqueezeExcite())


@pytest.mark.parametrize("recompute", ["none", "expand", "block"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "description", [MBConvDescription(), STRIDE_2, GATED], ids=["1", "2", "se"]
)
def test_training_in_low_precision(
    dtype: torch.dtype, description: MBConvDescription, recompute: str
) -> None:
    """At most LOW_PRECISION_FACTOR times as far from float64 as stock modules in that dtype."""
    case = Case(description, 24, 96, 24)
    parameters = make_parameters(case, dtype)
    x = torch.randn(3, 24, 17, 12).to(dtype)
    exact = map_tensors(
        parameters, lambda tensor: tensor.double() if tensor.is_floating_point() else tensor
    )
    with use_backend("reference"):
        expected = run(x.double(), exact, description, training=True)
        stock = run(x, parameters, description, dtype, training=True)
    with use_backend("cpu"), warnings.catch_warnings():
        warnings.simplefilter("error", FallbackWarning)
        actual = run(x, parameters, description, dtype, training=True, recompute=recompute)
    for name, value in expected.items():
        if value.abs().max() < 1e-9:  # zero but for rounding
            continue
        # One rounding to `dtype` of the result itself is granted beside the factor.
        allowed = LOW_PRECISION_FACTOR * relative_error(stock[name], value)
        assert_close(actual[name], value, allowed + torch.finfo(dtype).eps, name)
        assert actual[name].dtype == stock[name].dtype


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_halves_what_is_saved(dtype: torch.dtype) -> None:
    """16 and 2 * 64 channels of two bytes per pixel, and little else."""
    case = Case(in_channels=16, wide_channels=64, out_channels=16)
    parameters = make_parameters(case, dtype)
    parameters.expand_weight.requires_grad_()
    tensors = [tensor for tensor in flatten(parameters)[0] if tensor is not None]
    x = torch.randn(4, 16, 32, 32).to(dtype, memory_format=torch.channels_last)
    with use_backend("cpu"):
        saved = saved_bytes(lambda: mbconv(x, parameters, case.description, training=True), tensors)
    per_pixel = saved / (4 * 32 * 32)
    assert 2 * (16 + 128) <= per_pixel < 2 * (16 + 128) + 2


# Odd channels end in half a word, odd maps in half a pair of pixels; several small images make up a
# strip of pixels, large ones several; more than one block of E channels, a part of one, one.
AUTOCAST_CASES = {
    "projected": (Case(STRIDE_2, 16, 64, 24, shortcut_conv=True), (3, 10, 8)),
    "odd": (Case(MBConvDescription(), 13, 39, 13), (3, 7, 7)),
    "odd and gated": (Case(GATED, 7, 135, 7), (5, 5, 3)),
    "one pixel": (Case(MBConvDescription(), 24, 96, 24), (70, 1, 1)),
    "large": (Case(MBConvDescription(), 8, 72, 8), (2, 33, 19)),
    "stride 2": (Case(STRIDE_2, 20, 80, 20), (2, 21, 15)),
    "gated, stride 2": (
        Case(MBConvDescription(stride=2, pool=Pool(), squeeze_excite=SqueezeExcite()), 9, 70, 9),
        (2, 9, 11),
    ),
    "fixed statistics": (
        Case(
            MBConvDescription(
                pre_norm=Norm(frozen=True),
                expand_norm=Norm(frozen=True),
                depthwise_norm=Norm(frozen=True),
            ),
            24,
            72,
            24,
        ),
        (3, 6, 5),
    ),
    "other activations": (
        Case(MBConvDescription(expand_activation="silu", depthwise_activation="relu"), 16, 64, 16),
        (2, 6, 5),
    ),
}


@pytest.mark.parametrize(
    "recompute",
    [pytest.param("none", marks=pytest.mark.each_isa), "expand", "block"],
)
@pytest.mark.parametrize("x_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", AUTOCAST_CASES)
def test_training_under_autocast(name: str, x_dtype: torch.dtype, recompute: str) -> None:
    """As far from float64 as stock modules under autocast, in the same dtypes."""
    case, (batch, height, width) = AUTOCAST_CASES[name]
    parameters = make_parameters(case, torch.float32)
    exact = map_tensors(
        parameters, lambda tensor: tensor.double() if tensor.is_floating_point() else tensor
    )
    x = torch.randn(batch, case.in_channels, height, width).to(x_dtype)
    with use_backend("reference"):
        expected = run(x.double(), exact, case.description, training=True)
        with torch.autocast("cpu", torch.bfloat16):
            stock = run(x, parameters, case.description, training=True)
    with use_backend("cpu"), torch.autocast("cpu", torch.bfloat16):
        actual = run(x, parameters, case.description, training=True, recompute=recompute)
    for name, value in expected.items():
        assert actual[name].dtype == stock[name].dtype, name
        if value.abs().max() < 1e-9:  # zero but for rounding
            continue
        allowed = LOW_PRECISION_FACTOR * relative_error(stock[name], value)
        assert_close(actual[name], value, allowed + torch.finfo(torch.bfloat16).eps, name)


def test_autocast_saves_half() -> None:
    """Of x, z1 and z2; weights are rounded where they are packed, and no copy is kept."""
    case = Case(in_channels=16, wide_channels=64, out_channels=16)
    parameters = make_parameters(case, torch.float32)
    parameters.expand_weight.requires_grad_()
    tensors = [tensor for tensor in flatten(parameters)[0] if tensor is not None]
    x = torch.randn(4, 16, 32, 32).bfloat16().to(memory_format=torch.channels_last)
    with use_backend("cpu"), torch.autocast("cpu", torch.bfloat16):
        saved = saved_bytes(lambda: mbconv(x, parameters, case.description, training=True), tensors)
    per_pixel = saved / (4 * 32 * 32)
    assert 2 * (16 + 128) <= per_pixel < 2 * (16 + 128) + 2


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_bad_values_stay_in_their_image(value: float) -> None:
    """With fixed statistics: pairs of pixels and words of channels end with an image."""
    case, _ = AUTOCAST_CASES["fixed statistics"]
    parameters = make_parameters(case, torch.float32)
    x = torch.randn(3, 24, 3, 5)
    bad = x.clone()
    bad[1, 7, 2, 4] = value
    with use_backend("cpu"), torch.autocast("cpu", torch.bfloat16):
        expected, actual = (
            run(given, parameters, case.description, training=True) for given in (x, bad)
        )
    for name in ("output", "x"):
        for image in (0, 2):
            assert torch.equal(actual[name][image], expected[name][image]), name
        assert not actual[name][1].isfinite().all(), name


@pytest.mark.parametrize("recompute", ["auto", "none", "expand", "block"])
@pytest.mark.parametrize(
    "description", [MBConvDescription(), STRIDE_2, GATED], ids=["1", "2", "se"]
)
def test_empty_batch(description: MBConvDescription, recompute: str) -> None:
    """By the `torch` backend, without a warning: zero gradients, statistics as they were."""
    parameters = make_parameters(Case(description, 16, 64, 16), torch.float32)
    with warnings.catch_warnings():
        warnings.simplefilter("error", FallbackWarning)
        results = run(
            torch.randn(0, 16, 9, 8), parameters, description, training=True, recompute=recompute
        )
    side = (9, 8) if description.stride == 1 else (5, 4)
    assert results["output"].shape == (0, 16, *side)
    running = [tensor for tensor in flatten(parameters)[1] if tensor is not None]
    for before, name in zip(running, [key for key in results if "running" in key], strict=True):
        assert torch.equal(results.pop(name), before), name
    assert all((value == 0).all() for value in results.values())


@pytest.mark.parametrize("recompute", ["none", "expand", "block"])
@pytest.mark.parametrize("batch", [1, 5])
@pytest.mark.parametrize("channels", [8, 24, 40, 96])
def test_statistics_of_every_part(channels: int, batch: int, recompute: str) -> None:
    """x's statistics are summed in parts of the batch by groups of channels, far from zero."""
    case = Case(MBConvDescription(), channels, 4 * channels, channels)
    parameters = make_parameters(case, torch.float32)
    x = torch.randn(batch, channels, 5, 7) + 30.0
    exact = map_tensors(
        parameters, lambda tensor: tensor.double() if tensor.is_floating_point() else tensor
    )
    with use_backend("reference"):
        expected = run(x.double(), exact, case.description, training=True)
    with use_backend("cpu"):
        actual = run(x, parameters, case.description, training=True, recompute=recompute)
    for name in ("output", *(key for key in expected if "running" in key)):
        assert_close(actual[name], expected[name], BACKEND_OUTPUT[torch.float32], name)
