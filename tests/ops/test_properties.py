"""Whatever shapes, strides, dtypes and memory formats come: the backends equal the reference.

Hypothesis draws the calls; the same ones each time, so that a failure can be repeated.
"""

from __future__ import annotations

import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.mbconv_cases import Case, make_parameters, map_tensors, run
from support.native import needs_extension
from support.tolerances import (
    BACKEND_GRADIENT,
    BACKEND_OUTPUT,
    BACKEND_ZERO_GRADIENT,
    LOW_PRECISION_FACTOR,
    assert_close,
    relative_error,
)
from torch import Tensor

from moat_kernels import FallbackWarning, use_backend
from moat_kernels.functional import (
    MBConvDescription,
    MBConvParameters,
    Norm,
    Pool,
    SqueezeExcite,
    WindowAttentionDescription,
    mbconv,
    window_attention,
)

BACKENDS = [
    "torch",
    pytest.param("cpu", marks=needs_extension),
]
SEEDS = st.integers(0, 2**16)
LOW_PRECISION = st.sampled_from([torch.bfloat16, torch.float16])
# Smooth ones: beside the kink of a ReLU or of a maximum, rounding decides the gradient.
ACTIVATIONS = st.sampled_from(["gelu", "gelu_tanh", "silu", "identity"])
# Deterministic, and no time limit: machines differ, and examples come in all sizes.
drawn = settings(max_examples=40, deadline=None, derandomize=True, database=None)


def laid_out(draw: st.DrawFn, x: Tensor) -> Tensor:
    """The values of the 4-d tensor `x`, under strides of any kind."""
    kind = draw(st.sampled_from(["contiguous", "channels_last", "transposed", "sliced"]))
    if kind == "channels_last":
        return x.contiguous(memory_format=torch.channels_last)
    if kind == "transposed":
        return x.transpose(2, 3).contiguous().transpose(2, 3)
    if kind == "sliced":
        wide = torch.full([size + 2 for size in x.shape], float("nan"), dtype=x.dtype)
        wide[1:-1, 1:-1, 1:-1, 1:-1] = x
        return wide[1:-1, 1:-1, 1:-1, 1:-1]
    return x


@st.composite
def mbconv_calls(draw: st.DrawFn) -> tuple[Tensor, Case]:
    """An inverted bottleneck of the kinds that the native kernels cover, and its input."""
    torch.manual_seed(draw(SEEDS))
    stride = draw(st.sampled_from([1, 2]))
    channels = draw(st.integers(2, 20))
    projected = draw(st.booleans())
    pool = Pool(kernel_size=draw(st.sampled_from([2, 3])))
    description = MBConvDescription(
        stride=stride,
        pre_norm=draw(st.sampled_from([None, Norm()])),
        expand_activation=draw(ACTIVATIONS),
        depthwise_norm=draw(st.sampled_from([None, Norm(eps=1e-2)])),
        depthwise_activation=draw(ACTIVATIONS),
        squeeze_excite=draw(st.sampled_from([None, SqueezeExcite()])),
        pool=pool if stride == 2 else None,
    )
    case = Case(
        description,
        channels,
        draw(st.integers(2, 70)),
        draw(st.integers(2, 20)) if projected else channels,
        biases=draw(st.booleans()),
        shortcut_conv=projected,
    )
    size = [draw(st.integers(2, 4)), channels, draw(st.integers(2, 17)), draw(st.integers(2, 17))]
    return laid_out(draw, torch.randn(size)), case


@st.composite
def attention_calls(draw: st.DrawFn) -> tuple[Tensor, Tensor | None, WindowAttentionDescription]:
    """A packed map of any strides, a table or none, windows that need not divide the map."""
    torch.manual_seed(draw(SEEDS))
    height, width = draw(st.integers(1, 15)), draw(st.integers(1, 15))
    window = draw(st.none() | st.tuples(st.integers(1, 9), st.integers(1, 9)))
    heads, head_dim = draw(st.integers(1, 3)), draw(st.sampled_from([1, 7, 16, 32, 40]))
    description = WindowAttentionDescription(
        heads,
        head_dim,
        window,
        qkv_layout=draw(st.sampled_from(["qkv_heads", "heads_qkv"])),
        partition="window" if window is None else draw(st.sampled_from(["window", "grid"])),
    )
    tokens = description.window_for(height, width)
    table = torch.randn(heads, 2 * tokens[0] - 1, 2 * tokens[1] - 1)
    qkv = torch.randn(draw(st.integers(1, 3)), height, width, 3 * heads * head_dim)
    return laid_out(draw, qkv), table if draw(st.booleans()) else None, description


def as_double(parameters: MBConvParameters) -> MBConvParameters:
    """Copies with the same values in float64."""
    return map_tensors(parameters, lambda t: t.double() if t.is_floating_point() else t.clone())


def low_precision_limit(stock: Tensor, expected: Tensor) -> float:
    """How far from float64 a result may be; tiny cases round luckily now and then, so at least
    two roundings count."""
    error = relative_error(stock.double(), expected)
    return LOW_PRECISION_FACTOR * max(error, 2 * torch.finfo(stock.dtype).eps)


@pytest.mark.parametrize("backend", BACKENDS)
@given(call=mbconv_calls(), training=st.booleans())
@drawn
def test_mbconv_in_float32(backend: str, call: tuple[Tensor, Case], training: bool) -> None:
    x, case = call
    parameters = make_parameters(case, torch.float32)
    with use_backend("reference"):
        expected = run(x.double(), as_double(parameters), case.description, training=training)
    with use_backend(backend), warnings.catch_warnings():
        warnings.simplefilter("error", FallbackWarning)
        actual = run(x, parameters, case.description, training=training)
    for name, value in expected.items():
        tolerance = BACKEND_OUTPUT if name == "output" else BACKEND_GRADIENT
        if value.abs().max() < 1e-9:  # zero but for rounding
            assert actual[name].abs().max() < BACKEND_ZERO_GRADIENT, name
        else:
            assert_close(actual[name], value, tolerance[torch.float32], name)


@pytest.mark.parametrize("backend", BACKENDS)
@given(call=mbconv_calls(), dtype=LOW_PRECISION)
@drawn
def test_mbconv_eval_in_low_precision(
    backend: str, call: tuple[Tensor, Case], dtype: torch.dtype
) -> None:
    x, case = call
    x, low = x.to(dtype), make_parameters(case, dtype)
    with torch.no_grad():
        with use_backend("reference"):
            expected = mbconv(x.double(), as_double(low), case.description)
            stock = mbconv(x, low, case.description)
        with use_backend(backend):
            actual = mbconv(x, low, case.description)
    assert actual.dtype == dtype
    assert relative_error(actual.double(), expected) <= low_precision_limit(stock, expected)


def attend(
    qkv: Tensor, table: Tensor | None, description: WindowAttentionDescription
) -> dict[str, Tensor]:
    """Output and gradients of one call."""
    qkv = qkv.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    leaves = [qkv] if table is None else [qkv, table.detach().clone().requires_grad_()]
    output = window_attention(qkv, leaves[1] if table is not None else None, description)
    generator = torch.Generator().manual_seed(1)
    cotangent = torch.randn(output.shape, generator=generator, dtype=torch.float64)
    gradients = torch.autograd.grad(output, leaves, cotangent.to(output.dtype))
    return {"output": output.detach(), **dict(zip(("qkv", "table"), gradients, strict=False))}


@pytest.mark.parametrize("backend", BACKENDS)
@given(call=attention_calls())
@drawn
def test_window_attention_in_float32(
    backend: str, call: tuple[Tensor, Tensor | None, WindowAttentionDescription]
) -> None:
    qkv, table, description = call
    with use_backend("reference"):
        expected = attend(qkv.double(), None if table is None else table.double(), description)
    with use_backend(backend):
        actual = attend(qkv, table, description)
    for name, value in expected.items():
        tolerance = BACKEND_OUTPUT if name == "output" else BACKEND_GRADIENT
        if value.abs().max() < 1e-9:  # a window of one token
            assert actual[name].abs().max() < BACKEND_ZERO_GRADIENT, name
        else:
            assert_close(actual[name], value, tolerance[torch.float32], name)


@pytest.mark.parametrize("backend", BACKENDS)
@given(call=attention_calls(), dtype=LOW_PRECISION)
@drawn
def test_window_attention_in_low_precision(
    backend: str,
    call: tuple[Tensor, Tensor | None, WindowAttentionDescription],
    dtype: torch.dtype,
) -> None:
    qkv, table, description = call
    qkv, table = qkv.to(dtype), None if table is None else table.to(dtype)
    with use_backend("reference"):
        expected = attend(qkv.double(), None if table is None else table.double(), description)
        stock = attend(qkv, table, description)
    with use_backend(backend):
        actual = attend(qkv, table, description)
    for name, value in expected.items():
        assert actual[name].dtype == dtype
        if value.abs().max() >= 1e-9:
            limit = low_precision_limit(stock[name], value)
            assert relative_error(actual[name].double(), value) <= limit, name
