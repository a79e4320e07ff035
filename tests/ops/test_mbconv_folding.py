"""Batch norm folded in training mode holds where eager batch norm does: hard statistics."""

from __future__ import annotations

import pytest
import torch
from support.mbconv_cases import Case, copy_parameters, make_parameters, run
from support.tolerances import (
    FOLDED_GRADIENT,
    FOLDED_GRADIENT_CORRELATED,
    FOLDED_VARIANCE,
    LOW_PRECISION_FACTOR,
    relative_error,
)
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from moat_kernels import use_backend
from moat_kernels.functional import MBConvDescription, Norm, mbconv
from moat_kernels.ops.mbconv.algebra.folding import covariance, projected_variance
from moat_kernels.ops.mbconv.dispatch import resolve_frozen
from moat_kernels.ops.mbconv.torch import backend as torch_backend
from moat_kernels.ops.mbconv.torch.bottleneck import joining_pays

CASE = Case(in_channels=8, wide_channels=32, out_channels=8, biases=False)
SHAPE = (8, 8, 12, 12)  # 1152 rows of 8 channels: statistics by covariance


def shifted(mean: float) -> Tensor:
    """Channels of standard deviation one around `mean`, as float32 holds them."""
    return (torch.randn(SHAPE) + mean).double()


def with_dead_channels() -> Tensor:
    x = torch.randn(SHAPE).double()
    x[:, 2] = 0.0
    x[:, 5] = 7.0
    return x


def correlated() -> Tensor:
    """Channels that are nearly the same signal, so that differences of them cancel."""
    common = torch.randn(SHAPE[0], 1, *SHAPE[2:])
    return (common + 1e-2 * torch.randn(SHAPE)).double()


INPUTS = {
    "mean 0": lambda: shifted(0.0),
    "mean 100": lambda: shifted(100.0),
    "mean 1e4": lambda: shifted(1e4),
    "dead channels": with_dead_channels,
    "correlated channels": correlated,
}


@pytest.mark.parametrize("make", INPUTS.values(), ids=INPUTS)
def test_float64_equals_eager(make) -> None:
    x, parameters = make(), make_parameters(CASE)
    with use_backend("reference"):
        expected = run(x, parameters, CASE.description, training=True)
    with use_backend("torch"):
        actual = run(x, parameters, CASE.description, training=True)
    for name, value in expected.items():
        # A mean of 1e4 costs eager batch norm four digits too: its own rounding of x - mean.
        assert relative_error(actual[name], value, floor=0.1) < 1e-8, name


@pytest.mark.parametrize("kind", INPUTS)
def test_float32_is_as_exact_as_eager(kind: str) -> None:
    x, parameters = INPUTS[kind](), make_parameters(CASE, torch.float32)
    correlated = kind == "correlated channels"
    margin = FOLDED_GRADIENT_CORRELATED if correlated else FOLDED_GRADIENT
    with use_backend("reference"):
        exact = run(x, parameters, CASE.description, torch.float64, training=True)
        eager = run(x, parameters, CASE.description, torch.float32, training=True)
    with use_backend("torch"):
        folded = run(x, parameters, CASE.description, torch.float32, training=True)
    for name, value in exact.items():
        allowed = LOW_PRECISION_FACTOR * relative_error(eager[name], value, floor=0.1)
        allowed += margin
        assert relative_error(folded[name], value, floor=0.1) <= allowed, name


@pytest.mark.parametrize("make", INPUTS.values(), ids=INPUTS)
def test_variance_of_the_expanded_map(make) -> None:
    """What expand_norm measured in float32, against the variance of the expanded map in float64."""
    x, parameters = make(), make_parameters(CASE, torch.float32)
    # With momentum 1 the running variance is the batch's.
    description = MBConvDescription(expand_norm=Norm(momentum=1.0))
    measured = {}
    for backend, dtype in (("reference", torch.float64), ("torch", torch.float32)):
        copied = copy_parameters(parameters, dtype)
        with use_backend(backend):
            mbconv(x.to(dtype), copied, description, training=True)
        measured[backend] = copied.expand_norm.running_var.double()
    exact = measured["reference"]
    error = (measured["torch"] - exact).abs() / (exact + description.expand_norm.eps)
    assert float(error.max()) < FOLDED_VARIANCE


def test_covariance_of_shifted_rows() -> None:
    rows = torch.randn(1000, 6, dtype=torch.float64) @ torch.randn(6, 6, dtype=torch.float64)
    mean, matrix = covariance(rows)
    torch.testing.assert_close(mean, rows.mean(0))
    torch.testing.assert_close(matrix, torch.cov(rows.t(), correction=0))
    weight = torch.randn(9, 6, dtype=torch.float64)
    expected = (rows @ weight.t()).var(0, correction=0)
    torch.testing.assert_close(projected_variance(weight, matrix), expected)


@pytest.mark.parametrize("biases", [True, False])
@pytest.mark.parametrize("expand_norm", [Norm(1e-2), None], ids=["norm", "no norm"])
def test_what_follows_the_depthwise_stage_linearly_is_one_product(expand_norm, biases) -> None:
    """Depthwise first, no second activation, eval: no tensor is wider than x."""
    description = MBConvDescription(
        order="depthwise_first", expand_activation="identity", expand_norm=expand_norm
    )
    case = Case(description, in_channels=8, wide_channels=32, out_channels=8, biases=biases)
    x, parameters = shifted(1.0), make_parameters(case)
    widths = set()

    class Recorder(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, arguments=(), options=None):
            result = function(*arguments, **(options or {}))
            if isinstance(result, Tensor):
                widths.add(result.numel() / x.numel())
            return result

    with torch.no_grad(), use_backend("reference"):
        expected = mbconv(x, parameters, description)
    resolved = resolve_frozen(description, parameters, training=False)
    with torch.no_grad(), Recorder():
        actual = torch_backend.evaluate(x, parameters, resolved, None, None)
    assert relative_error(actual, expected) < 1e-12
    assert max(widths) == 1


def test_weights_are_joined_only_for_rows_enough() -> None:
    parameters = make_parameters(Case(wide_channels=24))
    assert not joining_pays(3, parameters)
    assert joining_pays(4, parameters)  # (24 + 4) * 36 < 4 * 24 * 12


@pytest.mark.parametrize("recompute", ["none", "block"])
def test_gradients_of_one_product_are_those_of_its_parts(recompute: str) -> None:
    description = MBConvDescription(order="depthwise_first", expand_activation="identity")
    x, parameters = shifted(1.0), make_parameters(Case(description, 8, 32, 8))
    with use_backend("reference"):
        expected = run(x, parameters, description)
    with use_backend("torch"):
        actual = run(x, parameters, description, recompute=recompute)
    for name, value in expected.items():
        assert relative_error(actual[name], value) < 1e-9, name
