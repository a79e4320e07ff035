"""The native CPU kernels of `window_attention` against the reference in float64."""

from __future__ import annotations

import warnings

import pytest
import torch
from support.native import needs_extension
from support.tolerances import (
    BACKEND_GRADIENT,
    BACKEND_OUTPUT,
    LOW_PRECISION_FACTOR,
    assert_close,
    relative_error,
)
from support.window_attention_cases import make_inputs, run
from torch import Tensor

from moat_kernels import FallbackWarning, use_backend
from moat_kernels.functional import WindowAttentionDescription, window_attention

pytestmark = needs_extension

# (batch, height, width) and window: dividing the map and not, beyond the map, the whole map; fewer
# tokens than a vector, and more than one block of queries in the backward pass.
CASES = [
    ((2, 14, 14), None),
    ((2, 7, 14), (7, 7)),
    ((2, 10, 13), (4, 5)),
    ((1, 9, 5), (2, 3)),
    ((1, 5, 6), (9, 3)),
    ((1, 3, 70), None),
    ((3, 1, 1), None),
    ((1, 2, 1), (1, 1)),
]
WHOLE = WindowAttentionDescription(heads=2, head_dim=32)


def check(qkv: Tensor, table: Tensor | None, description: WindowAttentionDescription) -> None:
    """The kernels in float32 are close to the reference in float64."""
    actual = run("cpu", qkv, table, description)
    expected = run("reference", qkv, table, description, torch.float64)
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        tolerance = BACKEND_OUTPUT if name == "output" else BACKEND_GRADIENT
        # The gradient of the table of one token is zero but for rounding.
        assert_close(actual[name], value, tolerance[torch.float32], name, floor=0.1)


def check_low_precision(
    description: WindowAttentionDescription, shape: tuple[int, int, int], dtype: torch.dtype
) -> None:
    """The kernels are about as close to float64 as stock is in the dtype."""
    qkv, table = make_inputs(description, shape, dtype=dtype)
    exact = run("reference", qkv, table, description, torch.float64)
    stock = run("reference", qkv, table, description, dtype)
    fused = run("cpu", qkv, table, description, dtype)
    for name, value in exact.items():
        # The gradient of the table of one token is zero but for rounding.
        allowed = LOW_PRECISION_FACTOR * relative_error(stock[name], value, floor=0.1)
        assert_close(fused[name], value, allowed + torch.finfo(dtype).eps, name, floor=0.1)


@pytest.mark.each_isa
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("kind", ["window", "grid"])
@pytest.mark.parametrize("layout", ["qkv_heads", "heads_qkv"])
@pytest.mark.parametrize(("shape", "window"), CASES, ids=str)
def test_every_choice(shape, window, layout: str, kind: str, bias: bool) -> None:
    scale = None if bias else 0.3
    description = WindowAttentionDescription(3, 32, window, scale, layout, kind)
    check(*make_inputs(description, shape, bias), description)


@pytest.mark.each_isa
@pytest.mark.parametrize("head_dim", [1, 5, 8, 16, 24, 48, 64, 100])
def test_any_head_dim(head_dim: int) -> None:
    description = WindowAttentionDescription(2, head_dim, (4, 4))
    check(*make_inputs(description, (2, 7, 9)), description)


def test_more_windows_than_chunks() -> None:
    """Several windows of different sizes are summed into one partial gradient of the table."""
    description = WindowAttentionDescription(6, 8, (2, 3))
    check(*make_inputs(description, (3, 41, 23)), description)


@pytest.mark.each_isa
@pytest.mark.parametrize("offset", [1000.0, -1000.0])
def test_a_bias_common_to_all_keys_changes_nothing(offset: float) -> None:
    """Scores whose exponentials overflow, or vanish, unless the largest is subtracted."""
    qkv, table = make_inputs(WHOLE, (2, 5, 5))
    expected = run("reference", qkv, table, WHOLE, torch.float64)
    actual = run("cpu", qkv, table + offset, WHOLE)
    for name, value in expected.items():
        # A float32 of 1000 is good to 3e-5, and so are the weights.
        assert_close(actual[name], value, 3e-4, name)


@pytest.mark.each_isa
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("head_dim", [32, 5, 16, 40])
@pytest.mark.parametrize(
    ("shape", "window"),
    [((3, 7, 9), None), ((3, 7, 9), (4, 5)), ((1, 15, 15), None)],
    ids=["odd", "windows", "blocks of queries"],
)
def test_low_precision_is_as_close_to_float64_as_stock(
    shape: tuple[int, int, int], window, head_dim: int, dtype: torch.dtype
) -> None:
    check_low_precision(WindowAttentionDescription(2, head_dim, window), shape, dtype)


@pytest.mark.each_isa
@pytest.mark.parametrize("head_dim", [8, 24, 32, 40, 64])
@pytest.mark.parametrize("tokens", [1, 15, 16, 17, 31, 33, 49, 50, 196])
def test_bfloat16_of_any_number_of_tokens(tokens: int, head_dim: int) -> None:
    """Matrix tiles of 16 tokens, which these fill or not, in several windows."""
    description = WindowAttentionDescription(2, head_dim, (1, tokens))
    check_low_precision(description, (2, 3, tokens), torch.bfloat16)


@pytest.mark.each_isa
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_small_windows_beside_large_ones(dtype: torch.dtype) -> None:
    """Of those at the map's end more queries make a block, whose scores fit the memory, too."""
    description = WindowAttentionDescription(1, 32, (32, 32))
    if dtype == torch.float32:
        check(*make_inputs(description, (1, 39, 39)), description)
    else:
        check_low_precision(description, (1, 39, 39), dtype)


@pytest.mark.each_isa
@pytest.mark.parametrize("tokens", [5, 16, 20, 40])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_in_bfloat16_stays_in_its_window(value: float, tokens: int) -> None:
    description = WindowAttentionDescription(2, 24, (1, tokens))
    inputs = make_inputs(description, (1, 3, tokens), dtype=torch.bfloat16)
    clean = run("cpu", *inputs, description, torch.bfloat16)
    for part in range(3):
        qkv = inputs[0].clone()
        qkv[0, 1, tokens // 2, 48 * part] = value
        found = run("cpu", qkv, inputs[1], description, torch.bfloat16)
        expected = run("reference", qkv, inputs[1], description)
        assert torch.equal(found["output"].isnan(), expected["output"].isnan())
        for name in ("output", "qkv"):
            assert torch.equal(found[name][:, [0, 2]], clean[name][:, [0, 2]])


@pytest.mark.each_isa
def test_keys_masked_by_the_table_count_nothing_in_bfloat16() -> None:
    qkv, table = make_inputs(WHOLE, (1, 1, 40), dtype=torch.bfloat16)
    table[:, :, 40:] = -float("inf")
    whole = run("cpu", qkv, table, WHOLE, torch.bfloat16)["output"]
    first = run("cpu", qkv[:, :, :18], table[:, :, 22:57], WHOLE, torch.bfloat16)["output"]
    assert torch.equal(whole[:, :, :18], first)


@pytest.mark.each_isa
def test_the_same_bits_in_bfloat16_for_any_number_of_threads() -> None:
    description = WindowAttentionDescription(2, 32, (14, 14))
    inputs = make_inputs(description, (1, 20, 30), dtype=torch.bfloat16)
    expected = run("cpu", *inputs, description, torch.bfloat16)
    for threads in (2, 3):
        torch.set_num_threads(threads)
        try:
            found = run("cpu", *inputs, description, torch.bfloat16)
        finally:
            torch.set_num_threads(1)
        for name, value in expected.items():
            assert torch.equal(found[name], value), name


def test_empty_batch() -> None:
    description = WindowAttentionDescription(2, 8, (3, 3))
    results = run("cpu", *make_inputs(description, (0, 6, 8)), description)
    assert results["output"].shape == (0, 6, 8, 16)
    assert results["qkv"].shape == (0, 6, 8, 48)
    assert not results["table"].any()


@pytest.mark.parametrize(
    "view",
    [
        lambda x: x[:, ::2, 1:8],
        lambda x: x.transpose(1, 2),
        lambda x: x.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1),
        lambda x: x[:1].expand(3, -1, -1, -1),
    ],
    ids=["sliced", "transposed", "channels first", "expanded"],
)
def test_strided_qkv_and_gradient(view) -> None:
    description = WindowAttentionDescription(2, 8, (4, 4))
    qkv = view(torch.randn(2, 12, 10, 48))
    _, table = make_inputs(description, (1, 12, 10))
    cotangent = view(torch.randn(2, 12, 10, 16))
    gradients = []
    with use_backend("cpu"):
        for arrange in (lambda x: x, Tensor.contiguous):
            leaf = arrange(qkv.detach()).requires_grad_()
            output = window_attention(leaf, table, description)
            gradients.append(torch.autograd.grad(output, leaf, arrange(cotangent)))
    assert torch.equal(*[gradient for (gradient,) in gradients])


@pytest.mark.each_isa
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("place", ["query", "key", "value", "table"])
def test_what_is_not_finite_spreads_as_in_the_reference(place: str, value: float) -> None:
    description = WindowAttentionDescription(2, 8, (3, 4))
    qkv, table = make_inputs(description, (2, 6, 8))
    if place == "table":
        table[1, 0, 3] = value
    else:
        qkv[0, 1, 1, 16 * ("query", "key", "value").index(place)] = value
    actual = run("cpu", qkv, table, description)
    expected = run("reference", qkv, table, description)
    # Reaches what it should, and no padding lane carries it elsewhere.
    assert torch.equal(actual["output"].isfinite(), expected["output"].isfinite())
    finite = expected["output"].isfinite()
    assert_close(actual["output"][finite], expected["output"][finite], 1e-5)
    for name in ("qkv", "table"):
        assert torch.equal(actual[name].isnan(), expected[name].isnan()), name


@pytest.mark.each_isa
def test_keys_masked_by_the_table_count_exactly_nothing() -> None:
    """-inf for every later key: causal attention on a row of tokens."""
    qkv, table = make_inputs(WHOLE, (1, 1, 20))
    table[:, :, 20:] = -float("inf")
    whole = run("cpu", qkv, table, WHOLE)["output"]
    first = run("cpu", qkv[:, :, :12], table[:, :, 8:31], WHOLE)["output"]
    assert torch.equal(whole[:, :, :12], first)


@pytest.mark.each_isa
@pytest.mark.parametrize(("shape", "window"), [((1, 16, 16), None), ((2, 15, 22), (5, 4))], ids=str)
def test_the_same_bits_every_time_for_any_number_of_threads(shape, window) -> None:
    description = WindowAttentionDescription(2, 16, window)
    inputs = make_inputs(description, shape)
    results = []
    for threads in (1, 1, 2, 3):
        torch.set_num_threads(threads)
        try:
            results.append(run("cpu", *inputs, description))
        finally:
            torch.set_num_threads(1)
    for name, value in results[0].items():
        assert all(torch.equal(value, other[name]) for other in results[1:]), name


def test_only_what_needs_a_gradient_gets_one() -> None:
    qkv, table = make_inputs(WHOLE, (2, 4, 4))
    expected = run("cpu", qkv, table, WHOLE)
    with use_backend("cpu"):
        window_attention(qkv.requires_grad_(), table, WHOLE).sum().backward()
        assert table.grad is None
        frozen = qkv.detach()
        generator = torch.Generator().manual_seed(1)
        output = window_attention(frozen, table.requires_grad_(), WHOLE)
        output.backward(torch.randn(output.shape, generator=generator))
    assert frozen.grad is None
    assert torch.equal(table.grad, expected["table"])


def test_autocast_keeps_the_table_in_its_dtype() -> None:
    qkv, table = make_inputs(WHOLE, (2, 4, 4))
    table.requires_grad_()
    with use_backend("cpu"), torch.autocast("cpu", torch.bfloat16):
        output = window_attention(qkv, table, WHOLE)
    output.float().square().sum().backward()
    assert output.dtype == torch.bfloat16
    assert table.grad.dtype == torch.float32


def test_the_kernels_are_the_default_for_float32_and_float64_falls_back_in_silence() -> None:
    qkv, table = make_inputs(WHOLE, (1, 4, 4))
    with warnings.catch_warnings():
        warnings.simplefilter("error", FallbackWarning)
        default = window_attention(qkv, table, WHOLE)
        assert window_attention(qkv.double(), table.double(), WHOLE).dtype == torch.float64
    with use_backend("cpu"):
        assert torch.equal(default, window_attention(qkv, table, WHOLE))
        with pytest.warns(FallbackWarning, match=r"does not cover dtype torch\.float64"):
            window_attention(qkv.double(), table.double(), WHOLE)


def test_opcheck() -> None:
    description = WindowAttentionDescription(2, 8, (4, 4))
    qkv, table = make_inputs(description, (2, 7, 9))
    arguments = (table, 2, 8, 4, 4, 0.3, False, False)
    ops = torch.ops.moat_kernels
    output, log_sum_exp = ops.cpu_window_attention_forward(qkv, *arguments)
    calls = [
        (ops.cpu_window_attention_forward, (qkv, *arguments)),
        *[
            (
                ops.cpu_window_attention_backward,
                (output, qkv, table, output, log_sum_exp, *arguments[1:], needs_table),
            )
            for needs_table in (True, False)
        ],
        (ops.window_attention_forward, (qkv, table, description.encode(), "cpu")),
        (ops.window_attention_evaluate, (qkv, table, description.encode(), "cpu")),
    ]
    for op, call in calls:
        torch.library.opcheck(op.default, call, test_utils=("test_schema", "test_faketensor"))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({0: torch.zeros(1, 4, 4, 48).double()}, "qkv must be float32, bfloat16 or float16"),
        ({0: torch.zeros(1, 4, 4, 47)}, r"qkv must be \[1, 4, 4, 48\]"),
        ({1: torch.zeros(2, 5, 7)}, r"bias_table must be \[2, 7, 7\], got \[2, 5, 7\]"),
        ({2: 0}, "heads, head_dim and the window's sides must be positive"),
    ],
)
def test_the_native_op_refuses_what_it_cannot_read(changed: dict, message: str) -> None:
    arguments = [torch.zeros(1, 4, 4, 48), torch.zeros(2, 7, 7), 2, 8, 4, 4, 0.3, False, False]
    for index, value in changed.items():
        arguments[index] = value
    with pytest.raises(RuntimeError, match=message):
        torch.ops.moat_kernels.cpu_window_attention_forward(*arguments)
