"""The native linear layer against torch.nn.functional.linear in float64."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from support.guarded_memory import guarded
from support.native import needs_extension
from support.tolerances import (
    BACKEND_GRADIENT,
    BACKEND_OUTPUT,
    STORED_ROUNDING,
    assert_close,
)
from torch import Tensor, nn

from moat_kernels import use_backend
from moat_kernels.extension import load_extension
from moat_kernels.linear import apply_linear
from moat_kernels.memory import saved_bytes
from moat_kernels.ops.frozen import multiplies
from moat_kernels.ops.linear.cpu import FEWEST_ROWS, backward, forward, unsupported

pytestmark = needs_extension

# Rows, K and N: fewer rows than a block of the product, more than a strip; a last panel of one
# vector; depths that are cut in two; so narrow that the weight's gradient is summed in parts.
SIZES = [(1, 16, 16), (5, 48, 16), (129, 32, 96), (300, 80, 272), (600, 16, 48), (70, 784, 400)]
NAMES = ("output", "x", "weight", "bias")


def make(rows: int, depth: int, columns: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x, weight, bias and the gradient of the output."""
    return (
        torch.randn(rows, depth),
        torch.randn(columns, depth),
        torch.randn(columns),
        torch.randn(rows, columns),
    )


def expected(x: Tensor, weight: Tensor, bias: Tensor | None, grad: Tensor) -> list[Tensor]:
    """Output and gradients in float64."""
    tensors = [None if t is None else t.double().requires_grad_() for t in (x, weight, bias)]
    output = F.linear(*tensors)
    output.backward(grad.double())
    return [output.detach(), *(t.grad for t in tensors if t is not None)]


def check(actual: list[Tensor], correct: list[Tensor]) -> None:
    for name, value, exact in zip(NAMES, actual, correct, strict=False):
        tolerance = BACKEND_OUTPUT if name == "output" else BACKEND_GRADIENT
        assert_close(value, exact, tolerance[torch.float32], name)


@pytest.mark.each_isa
@pytest.mark.parametrize(("rows", "depth", "columns"), SIZES)
def test_products(rows: int, depth: int, columns: int) -> None:
    x, weight, bias, grad = make(rows, depth, columns)
    actual = [forward(x, weight, bias), *backward(grad, x, weight, x.dtype, True, True)]
    check(actual, expected(x, weight, bias, grad))
    without_bias = forward(x, weight, None)
    assert_close(without_bias, x.double() @ weight.double().t(), BACKEND_OUTPUT[torch.float32])


BFLOAT16 = load_extension().usable and multiplies(torch.bfloat16)
multiplies_bfloat16 = pytest.mark.skipif(not BFLOAT16, reason="the CPU does not multiply bfloat16")


@pytest.mark.each_isa
@multiplies_bfloat16
@pytest.mark.parametrize("input_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("rows", "depth", "columns"), SIZES)
def test_products_in_bfloat16(
    rows: int, depth: int, columns: int, input_dtype: torch.dtype
) -> None:
    """Of operands in bfloat16 the sums are as exact as those of floats, before they are rounded."""
    x, weight, bias, grad = (tensor.bfloat16() for tensor in make(rows, depth, columns))
    weight, bias = weight.float(), bias.float()
    output = forward(x, weight, bias)
    gradients = backward(grad, x, weight, input_dtype, True, True)
    correct = expected(x, weight, bias, grad)
    assert output.dtype == torch.bfloat16 and gradients[0].dtype == input_dtype
    rounding = STORED_ROUNDING[torch.bfloat16]
    assert_close(output, correct[0], rounding, "output")
    assert_close(gradients[0], correct[1], STORED_ROUNDING[input_dtype] + 5e-5, "x")
    check([correct[0], correct[1], *gradients[1:]], correct)


@pytest.mark.each_isa
@multiplies_bfloat16
@pytest.mark.parametrize("depth", [16, 48, 80])
@pytest.mark.parametrize("rows", [1, 2, 15, 16, 17, 31, 32, 33, 47, 49, 65])
def test_rows_and_depths_that_do_not_fill_tiles(rows: int, depth: int) -> None:
    """Matrix units multiply tiles of 16 rows and of at most 32 numbers of depth."""
    x, weight, bias, grad = (tensor.bfloat16() for tensor in make(rows, depth, 32))
    output = forward(x, weight.float(), bias.float())
    gradients = backward(grad, x, weight.float(), torch.float32, True, True)
    correct = expected(x, weight, bias, grad)
    assert_close(output, correct[0], STORED_ROUNDING[torch.bfloat16], "output")
    check([correct[0], *gradients], correct)


@pytest.mark.each_isa
@pytest.mark.parametrize("rows", [1, 15, 17, 49])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nothing_behind_the_operands_is_read(rows: int, dtype: torch.dtype) -> None:
    if dtype == torch.bfloat16 and not BFLOAT16:
        pytest.skip("the CPU does not multiply bfloat16")
    x, weight, bias, grad = (tensor.to(dtype) for tensor in make(rows, 80, 48))
    x, weight, bias, grad = map(guarded, (x, weight.float(), bias.float(), grad))
    output = forward(x, weight, bias)
    gradients = backward(grad, x, weight, torch.float32, True, True)
    correct = expected(x, weight, bias, grad)
    assert_close(output, correct[0], STORED_ROUNDING[dtype] + 1e-5, "output")
    check([correct[0], *gradients], correct)


def test_maps_and_dense_copies_of_what_is_not_contiguous() -> None:
    x, weight, bias, grad = make(2 * 5 * 7, 32, 48)
    map_of_x = x.view(2, 5, 7, 32).transpose(1, 2)
    map_of_grad = grad.view(2, 5, 7, 48).transpose(1, 2)
    columns = weight.t().contiguous().t()
    output = forward(map_of_x, columns, bias)
    assert output.shape == (2, 7, 5, 48)
    gradients = backward(map_of_grad, map_of_x, columns, x.dtype, True, True)
    correct = expected(map_of_x.reshape(-1, 32), weight, bias, map_of_grad.reshape(-1, 48))
    check([output.flatten(0, 2), gradients[0].flatten(0, 2), *gradients[1:]], correct)


def test_only_the_gradients_that_are_needed() -> None:
    x, weight, _, grad = make(20, 16, 32)
    everything = backward(grad, x, weight, x.dtype, True, True)
    sizes = [
        [t.numel() for t in backward(grad, x, weight, x.dtype, *needs)]
        for needs in ((True, False), (False, True))
    ]
    full = [t.numel() for t in everything]
    assert sizes == [[full[0], 0, 0], [0, full[1], full[2]]]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_bad_values_reach_their_row_and_no_other(value: float) -> None:
    x, weight, bias, _ = make(40, 32, 32)
    x[7, 3] = value
    finite = torch.isfinite(forward(x, weight, bias)).all(1)
    assert finite.nonzero().flatten().tolist() == [row for row in range(40) if row != 7]


def test_results_do_not_depend_on_the_threads() -> None:
    x, weight, bias, grad = make(700, 64, 96)
    threads = torch.get_num_threads()
    results: dict[torch.dtype, list[list[Tensor]]] = {}
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            for dtype in (torch.float32, torch.bfloat16) if BFLOAT16 else (torch.float32,):
                rows, gradient = x.to(dtype), grad.to(dtype)
                results.setdefault(dtype, []).append(
                    [
                        forward(rows, weight, bias),
                        *backward(gradient, rows, weight, torch.float32, True, True),
                    ]
                )
    finally:
        torch.set_num_threads(threads)
    for first, *others in results.values():
        for other in others:
            assert all(torch.equal(a, b) for a, b in zip(first, other, strict=True))


def name_of_backward(module: nn.Module, x: Tensor) -> str:
    return type(apply_linear(module, x).grad_fn).__name__


def test_modules_take_the_native_kernels() -> None:
    module = nn.Linear(32, 64)
    x = torch.randn(3, FEWEST_ROWS, 32)
    stock = module(x)
    native = unsupported(x, module.weight, module.bias) == ""
    assert (name_of_backward(module, x) == "_LinearBackward") == native
    with use_backend("torch"):
        assert name_of_backward(module, x) == type(stock.grad_fn).__name__
    with torch.no_grad():
        output = apply_linear(module, x)
        assert native == torch.equal(output, forward(x, module.weight, module.bias))
        assert_close(output, stock.detach(), BACKEND_OUTPUT[torch.float32])


@pytest.mark.parametrize(
    ("module", "x"),
    [
        (nn.Linear(40, 64), torch.randn(FEWEST_ROWS, 40)),
        (nn.Linear(32, 64), torch.randn(0, 32)),
        (nn.Linear(32, 64), torch.randn(FEWEST_ROWS - 1, 32)),
        (nn.Linear(32, 64).double(), torch.randn(FEWEST_ROWS, 32).double()),
        (nn.Linear(32, 64).bfloat16(), torch.randn(FEWEST_ROWS, 32).bfloat16()),
        (nn.utils.parametrizations.weight_norm(nn.Linear(32, 64)), torch.randn(FEWEST_ROWS, 32)),
    ],
    ids=["odd sizes", "empty", "few rows", "float64", "bfloat16", "parametrized"],
)
def test_everything_else_is_stock(module: nn.Module, x: Tensor) -> None:
    output = apply_linear(module, x)
    assert torch.equal(output, module(x))
    assert type(output.grad_fn).__name__ != "_LinearBackward"


@multiplies_bfloat16
@pytest.mark.parametrize("x_dtype", [torch.float32, torch.bfloat16])
def test_autocast(x_dtype: torch.dtype) -> None:
    """The dtypes of stock, the same numbers up to rounding, and x is saved in bfloat16."""
    module = nn.Linear(32, 64)
    x = torch.randn(FEWEST_ROWS + 1, 32).to(x_dtype).requires_grad_()
    grad = torch.randn(FEWEST_ROWS + 1, 64).bfloat16()
    results = []
    for compute in (apply_linear, lambda layer, rows: layer(rows)):
        with torch.autocast("cpu", torch.bfloat16):
            output = compute(module, x)
        results.append([output, *torch.autograd.grad(output, (x, *module.parameters()), grad)])
    names = [type(output[0].grad_fn).__name__ for output in results]
    assert names[0] == "_LinearBackward" != names[1]
    for name, actual, stock in zip(NAMES, *results, strict=True):
        assert actual.dtype == stock.dtype, name
        assert_close(actual, stock.double(), 4 * torch.finfo(torch.bfloat16).eps, name)
    with torch.autocast("cpu", torch.bfloat16):
        saved = saved_bytes(lambda: apply_linear(module, x), [x, *module.parameters()])
    assert saved == (2 * x.numel() if x_dtype == torch.float32 else 0)
    with torch.autocast("cpu", torch.float16):
        assert "_Linear" not in name_of_backward(module, x)


def test_hooked_and_changed_modules_are_stock() -> None:
    module, calls = nn.Linear(32, 64), []
    x = torch.randn(FEWEST_ROWS, 32)
    module.register_forward_hook(lambda *_: calls.append(1))
    apply_linear(module, x)
    assert calls == [1]
    module = nn.Linear(32, 64)
    module.forward = lambda x: 2 * x
    assert torch.equal(apply_linear(module, x), 2 * x)


def test_frozen_parameters_get_no_gradient() -> None:
    module = nn.Linear(32, 64)
    module.weight.requires_grad_(False)
    other = copy.deepcopy(module)
    x = torch.randn(2 * FEWEST_ROWS, 32)
    apply_linear(module, x).sum().backward()
    other(x).sum().backward()
    assert module.weight.grad is None
    assert_close(module.bias.grad, other.bias.grad, 1e-6)


def test_bad_input_is_named() -> None:
    x, weight, bias, _ = make(3, 32, 48)
    with pytest.raises(RuntimeError, match="multiples of 16"):
        forward(x[:, :8], weight[:, :8], bias)
    with pytest.raises(RuntimeError, match=r"bias must be \[48\], got \[40\]"):
        forward(x, weight, bias[:40])
    with pytest.raises(RuntimeError, match=r"x must be \[.., 32\] .*, got \[3, 64\]"):
        forward(torch.cat([x, x], 1), weight, bias)
