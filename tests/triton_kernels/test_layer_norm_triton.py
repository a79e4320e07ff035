"""The Triton kernels of `layer_norm`, and the blocks that use them, against stock float64."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
import torch.nn.functional as F
from support.empty_layouts import empty_layouts
from support.tolerances import (
    BACKEND_GRADIENT,
    BACKEND_OUTPUT,
    LOW_PRECISION_FACTOR,
    assert_close,
    relative_error,
)
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from moat_kernels import FallbackWarning, FusedMOATBlock, use_backend
from moat_kernels.ops.layer_norm import branch_layer_norm
from moat_kernels.reference import MOATBlock

pytest.importorskip("triton")

from moat_kernels.ops.layer_norm.triton import backend as triton_backend
from moat_kernels.ops.layer_norm.triton import launch_table as triton_launch
from moat_kernels.ops.triton_support.traffic import record_passes

EPS = 1e-5
NAMES = ("normalized", "residual", "grad x", "grad weight", "grad bias")
LOW = (torch.bfloat16, torch.float16)


@contextmanager
def triton_only() -> Iterator[None]:
    with use_backend("triton"), warnings.catch_warnings():
        warnings.simplefilter("error", FallbackWarning)
        yield


def make_inputs(shape: tuple[int, ...], device: str) -> list[Tensor]:
    """x, weight, bias, and gradients of both results, in float64."""
    x, grad, grad_residual = torch.randn(3, *shape, dtype=torch.float64)
    weight, bias = torch.randn(2, shape[-1], dtype=torch.float64)
    return [t.to(device) for t in (2 * x + 3, weight, bias, grad, grad_residual)]


def stock(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    return F.layer_norm(x, weight.shape, weight, bias, eps), x


def run(function, x, weight, bias, grad, grad_residual) -> dict[str, Tensor]:
    """Results and gradients; the gradients take the results' dtypes."""
    leaves = [t.detach().requires_grad_() for t in (x, weight, bias)]
    normalized, residual = function(*leaves, EPS)
    grads = torch.autograd.grad(
        (normalized, residual), leaves, (grad.to(normalized.dtype), grad_residual.to(x.dtype))
    )
    return dict(zip(NAMES, (normalized, residual, *grads), strict=True))


@pytest.mark.oldest_triton
# One row in a tile and several, rows that fill it and that do not, shares of one step and of more.
@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (2, 5, 3, 7), (70, 96), (37, 1027), (2, 2048)])
def test_float32(shape: tuple[int, ...], device: str) -> None:
    inputs = make_inputs(shape, device)
    expected = run(stock, *inputs)
    with triton_only():
        actual = run(branch_layer_norm, *(t.float() for t in inputs))
    for name, value in expected.items():
        assert actual[name].dtype == torch.float32, name
        tolerance = BACKEND_OUTPUT if name == "normalized" else BACKEND_GRADIENT
        assert_close(actual[name], value, tolerance[torch.float32], name, floor=1.0)


@pytest.mark.oldest_triton
@pytest.mark.parametrize("dtype", LOW, ids=str)
def test_low_precision_is_as_close_to_float64_as_stock(dtype: torch.dtype, device: str) -> None:
    inputs = [t.to(dtype) for t in make_inputs((3, 7, 5, 72), device)]
    exact = run(stock, *(t.double() for t in inputs))
    eager = run(stock, *inputs)
    with triton_only():
        actual = run(branch_layer_norm, *inputs)
    for name, value in exact.items():
        assert actual[name].dtype == eager[name].dtype, name
        allowed = LOW_PRECISION_FACTOR * relative_error(eager[name], value)
        assert_close(actual[name], value, allowed + torch.finfo(dtype).eps, name)


@pytest.mark.parametrize("dtype", LOW, ids=str)
def test_autocast_rounds_once(dtype: torch.dtype, device: str) -> None:
    inputs = [t.float() for t in make_inputs((3, 5, 72), device)]
    expected = run(stock, *inputs)
    with triton_only(), torch.autocast(device, dtype):
        actual = run(branch_layer_norm, *inputs)
    assert actual["normalized"].dtype == dtype
    rounded = expected["normalized"].to(dtype)
    # What lies halfway between two numbers may go either way.
    assert_close(actual["normalized"], rounded, torch.finfo(dtype).eps)
    assert (actual["normalized"] != rounded).double().mean() < 0.01
    for name in NAMES[1:]:
        assert actual[name].dtype == torch.float32, name


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_nan_and_inf_stay_in_their_row(value: float, device: str) -> None:
    inputs = [t.float() for t in make_inputs((9, 33), device)]
    inputs[0][4, 7] = value
    expected = run(stock, *inputs)
    with triton_only():
        actual = run(branch_layer_norm, *inputs)
    for name, result in expected.items():
        assert torch.equal(actual[name].isnan(), result.isnan()), name
    assert expected["normalized"].isnan().any(1).sum() == 1


def test_no_rows(device: str) -> None:
    """In any layout."""
    weight, bias = torch.randn(2, 6, device=device)
    for x in empty_layouts((0, 5, 6), device).values():
        for grad in empty_layouts((0, 5, 6), device).values():
            with triton_only():
                results = run(branch_layer_norm, x, weight, bias, grad, grad)
            assert all(results[name].shape == (0, 5, 6) for name in NAMES[:3])
            assert not results["grad weight"].any() and not results["grad bias"].any()


@pytest.mark.parametrize(
    "view",
    [
        lambda x: x.permute(0, 2, 3, 1),
        lambda x: x[:, ::2, 1:],
        lambda x: x[:1].expand(2, -1, -1, -1),
    ],
    ids=["channels first", "sliced", "expanded"],
)
def test_strides_do_not_matter(view, device: str) -> None:
    x, grad, grad_residual = (view(torch.randn(2, 6, 5, 8, device=device)) for _ in range(3))
    weight, bias = torch.randn(2, x.shape[-1], device=device)
    with triton_only():
        strided = run(branch_layer_norm, x, weight, bias, grad, grad_residual)
        plain = run(
            branch_layer_norm, x.contiguous(), weight, bias, grad.contiguous(), grad_residual
        )
    for name, value in plain.items():
        assert torch.equal(strided[name], value), name


def test_the_same_bits_every_time(device: str) -> None:
    inputs = [t.float() for t in make_inputs((70, 40), device)]
    with triton_only():
        first, second = (run(branch_layer_norm, *inputs) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in NAMES)


@pytest.mark.parametrize("used", [0, 1], ids=["norm", "residual"])
def test_one_result_used(used: int, device: str) -> None:
    x, weight, bias, grad, _ = (t.float() for t in make_inputs((6, 40), device))
    gradients = []
    for function in (stock, branch_layer_norm):
        leaf = x.clone().requires_grad_()
        with triton_only():
            (gradient,) = torch.autograd.grad(function(leaf, weight, bias, EPS)[used], leaf, grad)
        gradients.append(gradient)
    assert_close(gradients[1], gradients[0], BACKEND_GRADIENT[torch.float32])


def test_frozen_parameters_take_no_sums(device: str) -> None:
    x, weight, bias, grad, _ = (t.float() for t in make_inputs((6, 40), device))
    saved = triton_backend.forward(x, weight, bias, EPS, x.dtype).saved
    assert len(triton_backend.backward(grad, None, x, weight, saved, False)) == 1


def test_what_is_not_covered_says_why(device: str) -> None:
    x, weight, bias, *_ = (t.float() for t in make_inputs((1, 2049), device))
    with use_backend("triton"), pytest.warns(FallbackWarning, match="rows of 2049 channels"):
        branch_layer_norm(x, weight, bias, EPS)
    with use_backend("triton"), pytest.warns(FallbackWarning, match=r"dtype torch\.float64"):
        branch_layer_norm(*(t[..., :8].double() for t in (x, weight, bias)), EPS)


def test_opcheck(device: str) -> None:
    x, weight, bias, grad, grad_residual = (t.float() for t in make_inputs((3, 24), device))
    checks = ("test_schema", "test_faketensor")
    operators = torch.ops.moat_kernels
    forward = operators.layer_norm_forward.default
    for operator in (forward, operators.layer_norm_evaluate.default):
        arguments = (x, weight, bias, EPS, torch.bfloat16, "triton")
        torch.library.opcheck(operator, arguments, test_utils=checks)
    _, *saved = forward(x, weight, bias, EPS, torch.float32, "triton")
    torch.library.opcheck(
        operators.layer_norm_backward.default,
        (grad, grad_residual, x, weight, saved, True, "triton"),
        test_utils=checks,
    )


@pytest.mark.parametrize(
    ("x_dtype", "dtype", "forward", "backward"),
    [(torch.bfloat16, torch.bfloat16, 4, 8), (torch.float32, torch.bfloat16, 6, 14)],
    ids=["bfloat16", "autocast"],
)
def test_bytes_that_cross_memory(
    x_dtype: torch.dtype, dtype: torch.dtype, forward: int, backward: int
) -> None:
    """As counted in triton/backend.py; what belongs to rows and channels is little beside."""
    rows, channels = 64 * 14 * 14, 768
    with FakeTensorMode(), record_passes() as passes:
        x = torch.empty(rows, channels, dtype=x_dtype)
        weight, bias = torch.empty(2, channels)
        normalized, saved = triton_backend.forward(x, weight, bias, EPS, dtype)
        grads = (torch.empty_like(normalized), torch.empty_like(x))
        triton_backend.backward(*grads, x, weight, saved, True)
    small = 8 * rows + 8 * channels
    assert passes[0].bytes == forward * rows * channels + small
    sums = triton_launch.PROGRAMS * 8 * channels
    assert 0 <= passes[1].bytes - backward * rows * channels <= small + sums


def test_compiled_without_graph_breaks(device: str) -> None:
    inputs = [t.float() for t in make_inputs((3, 40), device)]
    compiled = torch.compile(branch_layer_norm, fullgraph=True, backend="aot_eager")
    with triton_only():
        expected, actual = run(branch_layer_norm, *inputs), run(compiled, *inputs)
    assert all(torch.equal(actual[name], expected[name]) for name in NAMES)


def make_blocks(device: str, **options) -> tuple[nn.Module, nn.Module]:
    """A stock block in float64 and the same fused in float32."""
    stock_block = MOATBlock(16, 16, head_dim=16, position_size=3, **options).double()
    fused = FusedMOATBlock(16, 16, head_dim=16, position_size=3, **options)
    for parameter in stock_block.parameters():
        nn.init.normal_(parameter, 0.1, 0.3)
    fused.load_state_dict(stock_block.state_dict())
    return stock_block.to(device), fused.to(device)


def train(block: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """Output and gradients of one step; the drop path draws the same each time."""
    torch.manual_seed(1)
    leaf = x.detach().requires_grad_()
    output = block(leaf)
    output.square().sum().backward()
    gradients = {name: p.grad for name, p in block.named_parameters() if p.grad is not None}
    return {"output": output.detach(), "x": leaf.grad, **gradients}


@pytest.mark.parametrize("recompute", ["none", "block"])
@pytest.mark.parametrize("channels_last", [True, False], ids=["channels_last", "contiguous"])
def test_a_block_with_drop_path(recompute: str, channels_last: bool, device: str) -> None:
    stock_block, fused = make_blocks(device, drop_path=0.5)
    fused.recompute = recompute
    x = torch.randn(4, 16, 3, 3, dtype=torch.float64).to(device)
    if channels_last:
        x = x.to(memory_format=torch.channels_last)
    expected = train(stock_block, x)
    with triton_only():
        actual = train(fused, x.float())
    assert actual["output"].stride() == expected["output"].stride()
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        tolerance = BACKEND_OUTPUT if name == "output" else BACKEND_GRADIENT
        if value.abs().max() > 1e-9:
            assert_close(actual[name], value, tolerance[torch.float32], name)


def test_a_block_in_eval_is_the_same_with_and_without_kernels(device: str) -> None:
    stock_block, fused = make_blocks(device)
    x = torch.randn(2, 16, 3, 3, dtype=torch.float64).to(device)
    with torch.no_grad(), triton_only():
        actual = fused.eval()(x.float())
    assert_close(actual, stock_block.eval()(x), BACKEND_OUTPUT[torch.float32])


class Replaced(nn.LayerNorm):
    def __init__(self, channels: int, calls: list[str]) -> None:
        super().__init__(channels)
        self.calls = calls

    def forward(self, rows: Tensor) -> Tensor:
        self.calls.append("replaced")
        return super().forward(rows)


@pytest.mark.parametrize("change", ["hook", "attention hook", "replaced", "attention"])
def test_hooked_and_replaced_norms_run_as_themselves(change: str, device: str) -> None:
    _, fused = make_blocks(device)
    x = torch.randn(1, 16, 3, 3).to(device)
    calls = []
    if change == "hook":
        fused.attention_norm.register_forward_hook(lambda *_: calls.append("hook"))
    elif change == "attention hook":
        fused.attention.register_forward_pre_hook(lambda *_: calls.append("attention hook"))
    elif change == "replaced":
        fused.attention_norm = Replaced(16, calls).to(device)
    else:
        fused.attention = nn.Sequential(fused.attention)
        fused.attention[0].register_forward_hook(lambda *_: calls.append("attention"))
    with use_backend("triton"), torch.no_grad(), pytest.warns(FallbackWarning, match="unfused"):
        fused(x)
    assert calls == [change]
