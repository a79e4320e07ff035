"""`functional.window_attention`: every option, backend and dtype against the reference."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from support.tolerances import (
    BACKEND_GRADIENT,
    BACKEND_OUTPUT,
    LOW_PRECISION_FACTOR,
    assert_close,
    relative_error,
)
from torch import Tensor

from moat_kernels import use_backend
from moat_kernels.functional import WindowAttentionDescription, resize_table, window_attention
from moat_kernels.ops.window_attention.algebra import partition as cutting
from moat_kernels.ops.window_attention.algebra.partition import padding_mask, partition, reverse
from moat_kernels.ops.window_attention.algebra.position_bias import gather_bias, scatter_bias
from moat_kernels.ops.window_attention.torch import backend as torch_backend

MAPS = [(2, 6, 8), (3, 7, 5), (1, 1, 1)]
WINDOWS = [None, (3, 4), (4, 4), (9, 3)]  # whole map; dividing 6 x 8; not dividing; beyond the map


def make_inputs(
    description: WindowAttentionDescription,
    shape: tuple[int, int, int],
    bias: bool,
    dtype: torch.dtype = torch.float64,
) -> tuple[Tensor, Tensor | None]:
    """(qkv, table) for a map (B, H, W)."""
    qkv = torch.randn(*shape, 3 * description.heads * description.head_dim, dtype=dtype)
    if not bias:
        return qkv, None
    height, width = description.window_for(*shape[1:])
    return qkv, torch.randn(description.heads, 2 * height - 1, 2 * width - 1, dtype=dtype)


def run(
    qkv: Tensor,
    table: Tensor | None,
    description: WindowAttentionDescription,
    dtype: torch.dtype = torch.float64,
) -> dict[str, Tensor]:
    """Output and gradients, for copies of the arguments in `dtype`."""
    qkv = qkv.detach().to(dtype, copy=True).requires_grad_()
    table = None if table is None else table.detach().to(dtype, copy=True).requires_grad_()
    output = window_attention(qkv, table, description)
    generator = torch.Generator().manual_seed(1)
    cotangent = torch.randn(output.shape, generator=generator, dtype=torch.float64)
    output.backward(cotangent.to(dtype))
    results = {"output": output.detach(), "qkv": qkv.grad}
    return results if table is None else results | {"table": table.grad}


def check(actual: dict, expected: dict, dtype: torch.dtype) -> None:
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        tolerance = BACKEND_OUTPUT if name == "output" else BACKEND_GRADIENT
        assert_close(actual[name], value, tolerance[dtype], name, floor=0.1)


@pytest.mark.parametrize("chunk", [2**21, 200], ids=["one chunk", "chunks"])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("kind", ["window", "grid"])
@pytest.mark.parametrize("layout", ["qkv_heads", "heads_qkv"])
def test_torch_equals_reference(
    layout: str, kind: str, bias: bool, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch_backend, "SCORE_ELEMENTS", chunk)
    for shape, window in itertools.product(MAPS, WINDOWS):
        scale = None if bias else 0.3
        description = WindowAttentionDescription(2, 8, window, scale, layout, kind)
        qkv, table = make_inputs(description, shape, bias)
        with use_backend("reference"):
            expected = run(qkv, table, description)
        with use_backend("torch"):
            actual = run(qkv, table, description)
        check(actual, expected, torch.float64)


def test_reference_equals_scaled_dot_product_attention() -> None:
    description = WindowAttentionDescription(heads=3, head_dim=8)
    qkv, table = make_inputs(description, (2, 5, 4), bias=True)
    query, key, value = qkv.view(2, 20, 3, 3, 8).permute(2, 0, 3, 1, 4)
    bias = torch.empty(3, 20, 20, dtype=torch.float64)
    for q, k in itertools.product(range(20), repeat=2):
        bias[:, q, k] = table[:, k // 4 - q // 4 + 4, k % 4 - q % 4 + 3]
    expected = F.scaled_dot_product_attention(query, key, value, attn_mask=bias)
    with use_backend("reference"):
        actual = window_attention(qkv, table, description)
    assert_close(actual, expected.transpose(1, 2).reshape(2, 5, 4, 24), 1e-12)


def test_padding_neither_gives_nor_receives_attention() -> None:
    """A 7 x 5 map in 4 x 4 windows equals attention in each ragged window by itself."""
    description = WindowAttentionDescription(2, 8, (4, 4))
    whole = WindowAttentionDescription(2, 8, None)
    qkv, table = make_inputs(description, (1, 7, 5), bias=True)
    actual = window_attention(qkv, table, description)
    for rows, columns in itertools.product((slice(0, 4), slice(4, 7)), (slice(0, 4), slice(4, 5))):
        piece = qkv[:, rows, columns]
        middle = table[:, 4 - piece.shape[1] : 3 + piece.shape[1]]
        middle = middle[:, :, 4 - piece.shape[2] : 3 + piece.shape[2]]
        expected = window_attention(piece, middle, whole)
        assert_close(actual[:, rows, columns], expected, 1e-12)


@pytest.mark.parametrize("backend", ["reference", "torch"])
@pytest.mark.parametrize("kind", ["window", "grid"])
@pytest.mark.parametrize("layout", ["qkv_heads", "heads_qkv"])
@pytest.mark.parametrize("window", WINDOWS, ids=str)
def test_gradcheck(window, layout: str, kind: str, backend: str) -> None:
    description = WindowAttentionDescription(2, 8, window, None, layout, kind)
    qkv, table = make_inputs(description, (2, 6, 5), bias=True)
    with use_backend(backend):
        assert torch.autograd.gradcheck(
            lambda qkv, table: window_attention(qkv, table, description),
            (qkv.requires_grad_(), table.requires_grad_()),
            fast_mode=True,
        )


@pytest.mark.parametrize("window", WINDOWS, ids=str)
def test_float32(window) -> None:
    description = WindowAttentionDescription(2, 32, window)
    qkv, table = make_inputs(description, (3, 7, 9), bias=True)
    with use_backend("reference"):
        expected = run(qkv, table, description)
    with use_backend("torch"):
        check(run(qkv, table, description, torch.float32), expected, torch.float32)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("window", WINDOWS, ids=str)
def test_low_precision_is_as_close_to_float64_as_stock(window, dtype: torch.dtype) -> None:
    description = WindowAttentionDescription(2, 32, window)
    qkv, table = make_inputs(description, (3, 7, 9), bias=True)
    qkv, table = qkv.to(dtype).double(), table.to(dtype).double()
    with use_backend("reference"):
        exact = run(qkv, table, description)
        stock = run(qkv, table, description, dtype)
    with use_backend("torch"):
        fused = run(qkv, table, description, dtype)
    for name, value in exact.items():
        assert fused[name].dtype == dtype
        allowed = LOW_PRECISION_FACTOR * relative_error(stock[name], value)
        assert_close(fused[name], value, allowed + torch.finfo(dtype).eps, name)


@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_empty_batch(backend: str) -> None:
    description = WindowAttentionDescription(2, 8, (3, 3))
    qkv, table = make_inputs(description, (0, 6, 8), bias=True)
    with use_backend(backend):
        results = run(qkv, table, description)
    assert results["output"].shape == (0, 6, 8, 16)
    assert not results["table"].any()


def test_strided_qkv() -> None:
    description = WindowAttentionDescription(2, 8, (4, 4))
    qkv, table = make_inputs(description, (2, 12, 10), bias=True)
    view = qkv[:, ::2, 1:8]
    for backend in ("reference", "torch"):
        with use_backend(backend):
            strided = window_attention(view, table, description)
            dense = window_attention(view.contiguous(), table, description)
        assert torch.equal(strided, dense)
        assert strided.is_contiguous()


def test_nan_stays_in_its_window() -> None:
    description = WindowAttentionDescription(2, 8, (3, 4))
    qkv, table = make_inputs(description, (2, 6, 8), bias=True)
    qkv[0, 1, 1, 0] = float("nan")
    outputs = []
    for backend in ("reference", "torch"):
        with use_backend(backend):
            outputs.append(window_attention(qkv, table, description))
    assert torch.equal(outputs[0].isnan(), outputs[1].isnan())
    assert outputs[0].isnan().any()
    assert not outputs[0][0, 3:].isnan().any()


def test_the_tables_gradient_is_the_transpose_of_the_gather() -> None:
    for window in ((1, 1), (3, 4), (5, 2)):
        size = window[0] * window[1]
        table = torch.randn(2, 2 * window[0] - 1, 2 * window[1] - 1).double().requires_grad_()
        cotangent = torch.randn(2, size, size).double()
        gather_bias(table, window).backward(cotangent)
        assert_close(scatter_bias(cotangent, window), table.grad, 1e-12)


def test_resize_is_bilinear_with_half_pixel_centres_and_the_identity_at_the_same_size() -> None:
    table = torch.randn(2, 13, 13)
    assert torch.equal(resize_table(table, (7, 7)), table)
    expected = F.interpolate(table[None], size=(9, 27), mode="bilinear", align_corners=False)[0]
    assert torch.equal(resize_table(table, (5, 14)), expected)
    assert resize_table(table.bfloat16(), (5, 14)).dtype == torch.bfloat16


def test_resize_names_what_is_no_table() -> None:
    table = torch.randn(2, 13, 13)
    with pytest.raises(ValueError, match=r"table must be \[heads, .*\], got shape \(13, 13\)"):
        resize_table(table[0], (5, 14))
    with pytest.raises(TypeError, match=r"table must be floating point, got torch\.int64"):
        resize_table(table.long(), (5, 14))


@pytest.mark.parametrize("kind", ["window", "grid"])
def test_reverse_undoes_partition(kind: str) -> None:
    x = torch.randn(2, 7, 5, 3)
    windows = partition(x, (4, 3), kind)
    assert windows.shape == (2 * 4, 12, 3)
    assert torch.equal(reverse(windows, (2, 7, 5), (4, 3), kind), x)


@pytest.mark.parametrize("kind", ["window", "grid"])
@pytest.mark.parametrize("size", [(7, 5), (8, 6), (3, 2), (4, 9)])
def test_tokens_found_by_index_are_those_of_views(
    kind: str, size: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What compilers and exporters see of sizes that are held open."""
    x, shape, window = torch.randn(2, *size, 3), (2, *size), (4, 3)

    def compute() -> list[Tensor]:
        windows = partition(x, window, kind)
        mask = padding_mask(shape, window, kind, like=x)
        mask = torch.zeros(windows.shape[:2]) if mask is None else mask
        return [windows, mask, reverse(windows, shape, window, kind)]

    expected = compute()
    monkeypatch.setattr(cutting, "_is_open", lambda *_: True)
    for actual, tensor in zip(compute(), expected, strict=True):
        assert torch.equal(actual, tensor)


def test_opcheck() -> None:
    description = WindowAttentionDescription(2, 8, (4, 4))
    qkv, table = make_inputs(description, (2, 7, 9), bias=True)
    for layout in (qkv, qkv.transpose(1, 2)):
        torch.library.opcheck(
            torch.ops.moat_kernels.window_attention_forward.default,
            (layout, table, description.encode(), "torch"),
            test_utils=("test_schema", "test_faketensor"),
        )


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((torch.zeros(2, 4, 48), None), ValueError, r"qkv must be \[B, H, W, 3\*heads\*head_dim\]"),
        ((torch.zeros(2, 4, 4, 47), None), ValueError, r"qkv must be \[B, H, W, 48\]"),
        ((torch.zeros(2, 4, 4, 48).int(), None), TypeError, "qkv must be float64"),
        (
            (torch.zeros(2, 4, 4, 48), torch.zeros(2, 5, 5)),
            ValueError,
            r"bias_table must be \(2, 7",
        ),
    ],
)
def test_bad_calls_name_the_argument(arguments: tuple, error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        window_attention(*arguments, WindowAttentionDescription(2, 8))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: WindowAttentionDescription(0), "heads must be a positive integer"),
        (lambda: WindowAttentionDescription(2, window_size=(7, 0)), "window_size must be a"),
        (lambda: WindowAttentionDescription(2, window_size=7), r"None or \(height, width\)"),
        (lambda: WindowAttentionDescription(2, qkv_layout="hqkv"), "qkv_layout must be one of"),
        (lambda: WindowAttentionDescription(2, partition="shifted"), "partition must be one of"),
    ],
)
def test_bad_descriptions_name_the_field(make, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
