"""The stem's training with its native norm and GELU against stock layers in float64."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from support.native import needs_extension
from support.operators import Recorder
from support.tolerances import (
    BACKEND_GRADIENT,
    BACKEND_OUTPUT,
    BACKEND_ZERO_GRADIENT,
    LOW_PRECISION_FACTOR,
    assert_close,
    relative_error,
)
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import moat_kernels as mk
from moat_kernels.memory import saved_bytes
from moat_kernels.normalization import BatchNorm2d
from moat_kernels.ops.common.batch_norm import Norm
from moat_kernels.ops.stem import api as stem_api
from moat_kernels.reference import SameConv2d
from moat_kernels.stem import FusedStem, Stem

pytestmark = needs_extension

EPS = 1e-3
FORWARD = "moat_kernels.cpu_stem_train_forward.default"
BACKWARD = "moat_kernels.cpu_stem_train_backward.default"

Results = dict[str, Tensor]


def randomized(stem: FusedStem) -> FusedStem:
    for tensor in (*stem.parameters(), stem.norm_0.running_mean):
        if tensor is not None:
            nn.init.normal_(tensor, std=0.3)
    if stem.norm_0.running_var is not None:
        nn.init.uniform_(stem.norm_0.running_var, 0.5, 2.0)
    return stem


def make_stem(width: int = 16, recompute: bool = False) -> FusedStem:
    return randomized(FusedStem(width, recompute=recompute))


def make_input(stem: FusedStem, batch: int, height: int, width: int) -> tuple[Tensor, Tensor]:
    """x, and a gradient of the output."""
    channels = stem.norm_0.num_features
    grad = torch.randn(batch, channels, (height + 1) // 2, (width + 1) // 2)
    return torch.randn(batch, 3, height, width), grad


def results(stem: Stem, x: Tensor, grad: Tensor) -> Results:
    """Output, gradients, and the buffers after the step."""
    x = x.detach().requires_grad_()
    output = stem(x)
    gradients = torch.autograd.grad(output, [x, *stem.parameters()], grad)
    names = ["x", *(name for name, _ in stem.named_parameters())]
    buffers = {name: buffer.clone() for name, buffer in stem.named_buffers()}
    return {"output": output.detach(), **dict(zip(names, gradients, strict=True)), **buffers}


def stock_results(stem: FusedStem, x: Tensor, grad: Tensor) -> Results:
    """The same of the layers one by one, in float64."""
    stock = copy.deepcopy(stem).double()
    stock.__class__ = Stem
    return results(stock, x.double(), grad.double())


def native_results(stem: FusedStem, x: Tensor, grad: Tensor) -> Results:
    with Recorder() as recorder:
        actual = results(stem, x, grad)
    assert FORWARD in recorder.names
    assert BACKWARD in recorder.names
    assert not any("batch_norm" in name or "gelu" in name for name in recorder.names)
    return actual


def check(actual: Results, expected: Results) -> None:
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        if value.numel() and value.abs().max() < 1e-9:  # zero but for rounding: before the norm
            assert actual[name].abs().max() <= BACKEND_ZERO_GRADIENT, name
            continue
        is_gradient = name == "x" or name.endswith(("weight", "bias"))
        tolerance = BACKEND_GRADIENT if is_gradient else BACKEND_OUTPUT
        assert_close(actual[name], value, tolerance[torch.float32], name)


@pytest.mark.each_isa
@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("size", [(2, 1, 1), (1, 5, 6), (3, 33, 20), (1, 65, 64)])
@pytest.mark.parametrize("width", [1, 5, 32, 40, 67])
def test_sizes(width: int, size: tuple[int, int, int], recompute: bool) -> None:
    """Also those where a row of whole vectors is longer than the map, and where the last is cut."""
    stem = make_stem(width, recompute)
    x, grad = make_input(stem, *size)
    expected = stock_results(stem, x, grad)
    check(native_results(stem, x, grad), expected)


@pytest.mark.each_isa
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("size", [(2, 1, 1), (3, 33, 20), (1, 65, 64)])
@pytest.mark.parametrize("width", [5, 32, 40])
def test_autocast(
    width: int, size: tuple[int, int, int], recompute: bool, dtype: torch.dtype
) -> None:
    """In stock's dtypes, and at most LOW_PRECISION_FACTOR times as far from float64."""
    stem = make_stem(width, recompute)
    x, grad = make_input(stem, *size)
    expected = stock_results(stem, x, grad)
    plain = copy.deepcopy(stem)
    plain.__class__ = Stem
    with torch.autocast("cpu", dtype):
        stock = results(plain, x, grad.to(dtype))
        actual = native_results(stem, x, grad.to(dtype))
    for name, value in expected.items():
        assert actual[name].dtype == stock[name].dtype, name
        if value.numel() and value.abs().max() < 1e-9:  # zero but for rounding: before the norm
            continue
        if name == "conv_0.weight" and size == (2, 1, 1) and torch.cpu._is_amx_tile_supported():
            continue  # oneDNN reads memory that nobody wrote: stock is off by 1e5 and more too
        allowed = LOW_PRECISION_FACTOR * relative_error(stock[name], value)
        assert_close(actual[name], value, allowed + torch.finfo(dtype).eps, name)


@pytest.mark.each_isa
@pytest.mark.parametrize("recompute", [False, True])
def test_frozen_norm(recompute: bool) -> None:
    stem = make_stem(recompute=recompute).eval()
    x, grad = make_input(stem, 2, 17, 30)
    expected = stock_results(stem, x, grad)
    check(native_results(stem, x, grad), expected)
    stem.train()
    stem.norm_0.eval()
    check(native_results(stem, x, grad), expected)


@pytest.mark.each_isa
def test_a_mean_far_from_zero_costs_no_precision() -> None:
    """Ten thousand deviations from zero: squares of the values have no digit of the variance."""
    z = torch.randn(2, 40, 33, 24) + 1e4
    weight, bias, grad = torch.randn(24), torch.randn(24), torch.randn_like(z)
    forward, backward = ops()
    output, statistics = forward(z, weight, bias, None, EPS)
    exact = z.double().flatten(0, 2).requires_grad_()
    variance, mean = torch.var_mean(exact, 0, correction=0)
    assert_close(statistics[0], mean, BACKEND_OUTPUT[torch.float64])
    assert_close(statistics[1], variance, BACKEND_OUTPUT[torch.float32])
    normalized = (exact - mean) * (variance + EPS).rsqrt() * weight + bias
    expected = F.gelu(normalized)
    expected.backward(grad.double().flatten(0, 2))
    assert_close(output.flatten(0, 2), expected, BACKEND_OUTPUT[torch.float32])
    backward(grad, z, weight, bias, statistics, EPS, False)
    assert_close(grad.flatten(0, 2), exact.grad, BACKEND_GRADIENT[torch.float32])


def ops():
    namespace = torch.ops.moat_kernels
    return namespace.cpu_stem_train_forward.default, namespace.cpu_stem_train_backward.default


@pytest.mark.each_isa
def test_bits_for_any_number_of_threads() -> None:
    forward, backward = ops()
    z, weight, bias = torch.randn(3, 41, 37, 40), torch.randn(40), torch.randn(40)
    grad = torch.randn_like(z)

    def run() -> list[Tensor]:
        output, statistics = forward(z, weight, bias, None, EPS)
        gradient = grad.clone()
        return [
            output,
            statistics,
            gradient,
            *backward(gradient, z, weight, bias, statistics, EPS, False),
        ]

    expected = run()
    for threads in (2, 3, 5):
        torch.set_num_threads(threads)
        try:
            assert all(torch.equal(a, b) for a, b in zip(run(), expected, strict=True))
        finally:
            torch.set_num_threads(1)


@pytest.mark.each_isa
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("training", [True, False], ids=["measured", "frozen"])
def test_not_finite_values_stay_where_they_are_seen(training: bool, value: float) -> None:
    """A channel of a measured norm, an element of a frozen one."""
    z, grad = torch.randn(2, 9, 8, 20), torch.randn(2, 9, 8, 20)
    z[1, 3, 2, 7] = value
    weight, bias, mean, variance = (torch.rand(20) + 0.5 for _ in range(4))
    forward, backward = ops()
    given = None if training else torch.stack((mean, variance)).double()
    output, statistics = forward(z, weight, bias, given, EPS)
    gradient = grad.clone()
    actual = [
        output,
        gradient,
        *backward(gradient, z, weight, bias, statistics, EPS, not training),
    ]
    leaves = [t.double().requires_grad_() for t in (z.flatten(0, 2), weight, bias)]
    running = (mean.double(), variance.double())
    normalized = F.batch_norm(leaves[0], *running, *leaves[1:], training, eps=EPS)
    correct = F.gelu(normalized)
    expected = [correct, *torch.autograd.grad(correct, leaves, grad.double().flatten(0, 2))]
    if value in (float("inf"), -float("inf")) and not training:
        # GELU's slope at infinity is its limit, 1 or 0; stock has infinity times zero.
        del actual[1:], expected[1:]
    for one, other in zip(actual, expected, strict=True):
        assert torch.equal(one.isfinite(), other.isfinite().view_as(one))


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_any_memory_format_gives_channels_last(memory_format: torch.memory_format) -> None:
    stem = make_stem().to(memory_format=memory_format)
    x, grad = make_input(stem, 2, 18, 15)
    x, grad = (t.contiguous(memory_format=memory_format) for t in (x, grad))
    expected = stock_results(stem, x[..., ::2], grad[..., ::2])
    actual = native_results(stem, x[..., ::2], grad[..., ::2])
    check(actual, expected)
    assert actual["output"].is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize(
    "norm",
    [
        BatchNorm2d(16, momentum=0.3, unbiased_running_var=True),
        BatchNorm2d(16, momentum=None),
        BatchNorm2d(16, eps=0.1, affine=False),
        BatchNorm2d(16, track_running_stats=False),
    ],
    ids=["unbiased", "cumulative", "not affine", "without statistics"],
)
def test_other_norms(norm: BatchNorm2d) -> None:
    stem = FusedStem(16)
    stem.norm_0 = norm
    stem.conv_1 = SameConv2d(16, 16, 3, bias=False)
    randomized(stem)
    for _ in range(2):
        x, grad = make_input(stem, 2, 13, 10)
        expected = stock_results(stem, x, grad)
        check(native_results(stem, x, grad), expected)


def test_the_unbiased_variance_of_one_value_is_refused() -> None:
    stem = make_stem()
    stem.norm_0.unbiased_running_var = True
    with pytest.raises(ValueError, match="needs at least two values"):
        stem(torch.randn(1, 3, 2, 1))


@pytest.mark.parametrize(("recompute", "maps"), [(False, 2), (True, 1)])
def test_saved_for_backward(recompute: bool, maps: int) -> None:
    """x, one or two maps, and the statistics; stock keeps three maps."""
    stem, batch, size = make_stem(24, recompute), 2, 21  # odd: padded alike on all sides
    x = torch.randn(batch, 3, size, size).contiguous(memory_format=torch.channels_last)
    state = [*stem.parameters(), *stem.buffers()]
    map_bytes, statistics_bytes = 4 * 24 * batch * 11**2, 8 * 2 * 24
    around = 4 * x.numel() + statistics_bytes
    assert saved_bytes(lambda: stem(x), state) == maps * map_bytes + around
    with mk.use_backend("reference"):
        assert saved_bytes(lambda: stem(x), state) >= 3 * map_bytes + 4 * x.numel()
    with torch.no_grad():
        assert saved_bytes(lambda: stem(x), state) == 0


@pytest.mark.parametrize("recompute", ["auto", "none", "expand", "block"])
def test_models_recompute_the_stem_with_their_blocks(recompute: str) -> None:
    model = mk.create_model("tiny_moat_0", recompute=recompute)
    assert model.stem.recompute == (recompute in ("expand", "block"))


def test_gradients_of_callers_are_left_as_they_are() -> None:
    stem = make_stem()
    x, grad = make_input(stem, 2, 8, 8)
    before = grad.clone()
    stem(x).backward(grad)
    assert torch.equal(grad, before)


@pytest.mark.parametrize("frozen", [("conv_1",), ("norm_0",), ("conv_0",), ("conv_0", "norm_0")])
def test_frozen_parameters_get_no_gradient(frozen: tuple[str, ...]) -> None:
    stem = make_stem()
    x, grad = make_input(stem, 2, 9, 12)
    expected = stock_results(stem, x, grad)
    for name in frozen:
        getattr(stem, name).requires_grad_(False)
    stem(x).backward(grad)
    for name, parameter in stem.named_parameters():
        if name.startswith(frozen):
            assert parameter.grad is None, name
        elif name != "conv_0.bias":
            assert_close(parameter.grad, expected[name], BACKEND_GRADIENT[torch.float32], name)


def test_checkpointing_updates_the_statistics_once() -> None:
    stem = make_stem()
    x, grad = make_input(stem, 2, 10, 10)
    expected = stock_results(stem, x, grad)
    leaf = x.requires_grad_()
    output = checkpoint(stem, leaf, use_reentrant=False)
    output.backward(grad)
    assert stem.norm_0.num_batches_tracked == 1
    actual = {name: p.grad for name, p in stem.named_parameters()} | dict(stem.named_buffers())
    check({"output": output.detach(), "x": leaf.grad, **actual}, expected)


def test_training_without_gradients_measures_all_the_same() -> None:
    stem = make_stem()
    x, grad = make_input(stem, 2, 10, 10)
    expected = stock_results(stem, x, grad)
    with torch.no_grad():
        assert_close(stem(x), expected["output"], BACKEND_OUTPUT[torch.float32])
    for name, buffer in stem.named_buffers():
        assert_close(buffer, expected[name], BACKEND_OUTPUT[torch.float32], name)


def test_second_derivatives_are_refused() -> None:
    stem = make_stem()
    x = torch.randn(1, 3, 8, 8, requires_grad=True)
    (gradient,) = torch.autograd.grad(stem(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


def names_of(stem: nn.Module, x: Tensor) -> list[str]:
    with Recorder() as recorder:
        stem(x)
    return recorder.names


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_other_dtypes_are_stock(dtype: torch.dtype) -> None:
    x = torch.randn(2, 3, 8, 8, dtype=dtype)
    assert FORWARD not in names_of(make_stem().to(dtype), x)


def test_other_backends_and_empty_batches_are_stock() -> None:
    stem, x = make_stem(), torch.randn(2, 3, 8, 8)
    assert FORWARD in names_of(stem, x)
    for backend in ("reference", "torch"):
        with mk.use_backend(backend):
            assert FORWARD not in names_of(stem, x)
    assert FORWARD not in names_of(stem, x[:0])
    assert stem(x[:0]).shape == (0, 16, 4, 4)


def test_synchronised_norms_are_stock() -> None:
    stem, x = make_stem(), torch.randn(2, 3, 8, 8)
    first, second = [(conv.weight, conv.bias) for conv in (stem.conv_0, stem.conv_1)]
    tensors = stem.norm_0.tensors()
    assert stem_api.covers_training(x, first, Norm(), tensors, second)
    assert not stem_api.covers_training(x, first, Norm(process_group="0"), tensors, second)


def test_hooked_layers_run_as_themselves() -> None:
    stem, x, seen = make_stem(), torch.randn(1, 3, 16, 16), []
    stem.norm_0.register_forward_hook(lambda module, inputs, output: seen.append(output.shape))
    assert FORWARD not in names_of(stem, x)
    assert seen == [(1, 16, 8, 8)]


def test_functional_transforms_run_stock_layers() -> None:
    stem, x = make_stem(), torch.randn(2, 3, 8, 8)
    stem.norm_0.eval()  # functorch refuses to change buffers that it does not see

    def loss(parameters: dict[str, Tensor]) -> Tensor:
        return torch.func.functional_call(stem, parameters, (x,)).square().sum()

    gradients = torch.func.grad(loss)(dict(stem.named_parameters()))
    stem(x).square().sum().backward()
    for name, parameter in stem.named_parameters():
        assert_close(gradients[name], parameter.grad, BACKEND_GRADIENT[torch.float32], name)


def test_compiles_without_graph_breaks() -> None:
    stem = make_stem()
    x, grad = make_input(stem, 2, 16, 16)
    expected = stock_results(stem, x, grad)
    torch._dynamo.reset()
    compiled = torch.compile(stem, fullgraph=True, backend="aot_eager")
    compiled(x).backward(grad)
    for name, parameter in stem.named_parameters():
        if name != "conv_0.bias":
            assert_close(parameter.grad, expected[name], BACKEND_GRADIENT[torch.float32], name)


def test_the_ops_name_what_they_cannot_read() -> None:
    forward, backward = ops()
    z, statistics = torch.randn(2, 4, 4, 8), torch.ones(2, 8, dtype=torch.float64)
    with pytest.raises(RuntimeError, match="z must be a map"):
        forward(z[:0], None, None, None, EPS)
    with pytest.raises(RuntimeError, match="z must be float32, bfloat16 or float16, got float64"):
        forward(z.double(), None, None, None, EPS)
    with pytest.raises(RuntimeError, match=r"norm.weight must be \[8\], got \[7\]"):
        forward(z, torch.ones(7), None, None, EPS)
    with pytest.raises(RuntimeError, match=r"statistics must be \[2, 8\], got \[8\]"):
        forward(z, None, None, statistics[0], EPS)
    with pytest.raises(RuntimeError, match=r"grad must be \[2, 4, 4, 8\], got \[1, 4, 4, 8\]"):
        backward(torch.randn(1, 4, 4, 8), z, None, None, statistics, EPS, False)


def test_opcheck() -> None:
    forward, backward = ops()
    z, weight, bias = torch.randn(2, 4, 5, 8), torch.randn(8), torch.randn(8)
    statistics = torch.ones(2, 8, dtype=torch.float64)
    checks = ("test_schema", "test_faketensor")
    for given in (None, statistics):
        torch.library.opcheck(forward, (z, weight, bias, given, EPS), test_utils=checks)
    arguments = (torch.randn_like(z), z, weight, bias, statistics, EPS, False)
    torch.library.opcheck(backward, arguments, test_utils=checks)


def test_parameters_with_strides() -> None:
    stem = make_stem()
    stem.norm_0.weight = nn.Parameter(torch.rand(16, 2)[:, 0])
    x, grad = make_input(stem, 2, 9, 12)
    expected = stock_results(stem, x, grad)
    check(native_results(stem, x, grad), expected)
