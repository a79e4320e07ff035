"""An op or a module by the kernels, by stock operations, and by the reference in float64."""

from __future__ import annotations

import copy
import statistics
import warnings

import torch
from torch import Tensor, nn

from moat_kernels import FallbackWarning, use_backend
from support.mbconv_cases import Case, make_parameters, map_tensors, run
from support.tolerances import (
    BACKEND_GRADIENT,
    BACKEND_OUTPUT,
    BACKEND_ZERO_GRADIENT,
    FOLDED_ROUNDING,
    LOW_PRECISION_FACTOR,
    LOW_PRECISION_ROUNDING,
    RANDOM_FACTOR,
    TYPICAL_FACTOR,
    assert_close,
    relative_error,
)

Results = dict[str, Tensor]


def check(
    fused: Results,
    stock: Results,
    exact: Results,
    dtype: torch.dtype,
    rounding: float = LOW_PRECISION_ROUNDING,
) -> None:
    """float32: close to float64; else no further from it than twice stock operations are.

    rounding: what may come on top, in units in the last place.
    """
    assert fused.keys() == exact.keys()
    for name, value in exact.items():
        assert fused[name].dtype == stock[name].dtype, name
        if value.abs().max() < 1e-9:
            assert dtype != torch.float32 or fused[name].abs().max() < BACKEND_ZERO_GRADIENT, name
        elif dtype == torch.float32:
            tolerance = BACKEND_OUTPUT if name == "output" else BACKEND_GRADIENT
            assert_close(fused[name], value, tolerance[dtype], name)
        else:
            allowed = LOW_PRECISION_FACTOR * relative_error(stock[name], value)
            assert_close(fused[name], value, allowed + rounding * torch.finfo(dtype).eps, name)


def check_over_inputs(steps: list[tuple[Results, Results, Results]], dtype: torch.dtype) -> None:
    """(fused, stock, exact) of several inputs: typically no further from float64 than stock is.

    For what magnifies rounding at random, so that one input says nothing: the root mean square of
    the errors is compared, of each tensor, and in the median over tensors.
    """
    ratios = []
    for name in steps[0][2]:
        errors = [
            [relative_error(results[name], exact[name]) ** 2 for results in (fused, stock)]
            for fused, stock, exact in steps
            if exact[name].abs().max() >= 1e-9
        ]
        if errors:
            ours, theirs = ((sum(each) / len(errors)) ** 0.5 for each in zip(*errors, strict=True))
            rounding = LOW_PRECISION_ROUNDING * torch.finfo(dtype).eps
            assert ours <= RANDOM_FACTOR * theirs + rounding, f"{name}: {ours:.2e}, {theirs:.2e}"
            ratios.append(ours / max(theirs, rounding))
    assert statistics.median(ratios) <= TYPICAL_FACTOR


def check_mbconv(
    case: Case,
    shape: tuple[int, int, int],
    dtype: torch.dtype,
    device: str,
    *,
    training: bool = True,
    recompute: str = "none",
) -> None:
    """Output, gradients and running statistics by Triton, for a map (B, H, W)."""

    def exactly(tensor: Tensor) -> Tensor:
        """In float64, with values that the dtype holds: only the computation is judged."""
        return tensor.to(device, dtype).double() if tensor.is_floating_point() else tensor

    parameters = map_tensors(make_parameters(case), exactly)
    x = exactly(torch.randn(shape[0], case.in_channels, *shape[1:]))

    def step(backend: str, precision: torch.dtype, **options) -> Results:
        with use_backend(backend), warnings.catch_warnings():
            warnings.simplefilter("error", FallbackWarning)
            # The passes that CUDA C++ covers have tests of their own, for which it covers.
            warnings.filterwarnings("ignore", ".*falling back to Triton's", FallbackWarning)
            return run(x, parameters, case.description, precision, training=training, **options)

    exact, stock = step("reference", torch.float64), step("reference", dtype)
    rounding = LOW_PRECISION_ROUNDING if training else FOLDED_ROUNDING
    check(step("triton", dtype, recompute=recompute), stock, exact, dtype, rounding)


def train_step(module: nn.Module, x: Tensor) -> Results:
    """Output, gradients and floating-point buffers after one step on x."""
    x = x.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    module.zero_grad()
    output = module(x)
    generator = torch.Generator().manual_seed(1)
    output.backward(torch.randn(output.shape, generator=generator).to(output))
    results = {"output": output.detach(), "x": x.grad}
    results |= {name: parameter.grad for name, parameter in module.named_parameters()}
    buffers = ((name, buffer) for name, buffer in module.named_buffers())
    return results | {name: each.clone() for name, each in buffers if each.is_floating_point()}


def check_module(
    reference: nn.Module, fused: nn.Module, x: Tensor, dtype: torch.dtype, device: str
) -> None:
    """A training step and an evaluation of a fused module, with the reference's weights."""
    fused.load_state_dict(reference.state_dict())
    x = x.to(device, dtype)
    modules = [
        copy.deepcopy(reference).to(device, dtype).to(torch.float64),
        copy.deepcopy(reference).to(device, dtype),
        fused.to(device, dtype),
    ]
    exact, stock, actual = (
        train_step(module.train(), x.double() if module is modules[0] else x) for module in modules
    )
    check(actual, stock, exact, dtype)
    with torch.no_grad():
        exact, stock, actual = (
            {"output": module.eval()(x.double() if module is modules[0] else x)}
            for module in modules
        )
    check(actual, stock, exact, dtype)
