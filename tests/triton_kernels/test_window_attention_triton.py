"""The Triton kernels of `window_attention` against the reference in float64.

Maps and numbers of heads are small: the interpreter takes a tenth of a second per program.
"""

from __future__ import annotations

import math

import pytest
import torch
from support.empty_layouts import empty_layouts
from support.tolerances import (
    BACKEND_GRADIENT,
    BACKEND_OUTPUT,
    LOW_PRECISION_FACTOR,
    assert_close,
    relative_error,
)
from support.window_attention_cases import make_inputs, run
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from moat_kernels import FallbackWarning, use_backend
from moat_kernels.functional import WindowAttentionDescription, window_attention

pytest.importorskip("triton")

from moat_kernels.ops.triton_support.traffic import record_passes
from moat_kernels.ops.window_attention.algebra.position_bias import gather_bias, table_size
from moat_kernels.ops.window_attention.triton import backend as triton_backend
from moat_kernels.ops.window_attention.triton import launch_table

WHOLE = WindowAttentionDescription(heads=2, head_dim=16)
SMALL = (1, 4, 5)

# A map (batch, height, width) with its windows: the whole map in one tile and in several, windows
# that divide the map and that do not, that are larger than the map, and of one token.
CASES = {
    "7x7": ((2, 7, 7), WindowAttentionDescription(2, 32)),
    "two blocks of queries": ((1, 3, 47), WindowAttentionDescription(1, 16)),
    "ragged": ((1, 6, 7), WindowAttentionDescription(1, 16, (4, 5), 0.3, "heads_qkv")),
    "ragged grid": (
        (1, 6, 7),
        WindowAttentionDescription(2, 16, (4, 5), None, "qkv_heads", "grid"),
    ),
    "dividing": ((2, 4, 6), WindowAttentionDescription(2, 16, (4, 3), None, "heads_qkv")),
    "beyond the map": ((1, 5, 3), WindowAttentionDescription(1, 64, (9, 2))),
    "grid beyond the map": (
        (1, 3, 5),
        WindowAttentionDescription(1, 16, (14, 2), None, "heads_qkv", "grid"),
    ),
    "one token": ((3, 1, 1), WindowAttentionDescription(1, 16)),
}


@pytest.fixture(params=["one", "several", "held", "looked up"])
def kernels(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """How the backward pass is made: by one kernel, or as large windows are, which are few here.

    held: as those of up to 256 tokens are. looked up: as those of more than 1024, whose bias is not
    spread out.
    """
    one, held = request.param == "one", request.param == "held"
    monkeypatch.setattr(triton_backend, "in_one", lambda _, tokens: one and tokens <= 64)
    monkeypatch.setattr(triton_backend, "is_held", lambda *_: held)
    if request.param == "looked up":
        monkeypatch.setattr(triton_backend, "LARGEST_SPREAD", 0)
    return str(request.param)


def check(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """The kernels in float32 are close to the reference in float64."""
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        tolerance = BACKEND_OUTPUT if name == "output" else BACKEND_GRADIENT
        # The gradient of the table of one token is zero but for rounding.
        assert_close(actual[name], value, tolerance[torch.float32], name, floor=0.1)


@pytest.mark.oldest_triton
@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("case", CASES)
def test_every_choice(case: str, bias: bool, device: str) -> None:
    shape, description = CASES[case]
    qkv, table = make_inputs(description, shape, bias, device=device)
    expected = run("reference", qkv, table, description, torch.float64)
    check(run("triton", qkv, table, description), expected)


@pytest.mark.oldest_triton
@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", ["7x7", "two blocks of queries", "ragged", "beyond the map"])
def test_low_precision_is_as_close_to_float64_as_stock(
    case: str, dtype: torch.dtype, device: str
) -> None:
    shape, description = CASES[case]
    qkv, table = make_inputs(description, shape, device=device, dtype=dtype)
    exact = run("reference", qkv, table, description, torch.float64)
    stock = run("reference", qkv, table, description, dtype)
    fused = run("triton", qkv, table, description, dtype)
    for name, value in exact.items():
        allowed = LOW_PRECISION_FACTOR * relative_error(stock[name], value)
        assert_close(fused[name], value, allowed + torch.finfo(dtype).eps, name)


@pytest.mark.parametrize("programs", [1, 3], ids="{} programs".format)
def test_the_tables_gradient_for_any_number_of_partial_sums(
    programs: int, kernels: str, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Five windows, summed by one program, and by three: two, two and one."""
    constant = "GRADIENT" if kernels == "one" else "BIAS_GRADIENT"
    monkeypatch.setattr(triton_backend, f"{constant}_PROGRAMS", programs)
    description = WindowAttentionDescription(1, 16, (3, 3))
    qkv, table = make_inputs(description, (5, 3, 3), device=device)
    expected = run("reference", qkv, table, description, torch.float64)
    check(run("triton", qkv, table, description), expected)


@pytest.mark.parametrize(("tokens", "rows"), [(1, 64), (64, 64), (65, 128), (196, 256), (576, 640)])
def test_rows_of_the_bias_spread_out(tokens: int, rows: int) -> None:
    """Whole blocks of every size that a launch may have; the kernels' rule is the same."""
    assert launch_table.padded_tokens(tokens) == rows


def rows_and_columns(tiles: Tensor) -> Tensor:
    """[heads, rows, columns] of tiles, which lie in the order of a tensor core's sums."""
    vector = 16 // tiles.element_size()
    heads, rows, _ = tiles.shape
    units = tiles.view(heads, rows // 16, rows // (2 * vector), 8, 4, vector // 4, 2, 2)
    return units.permute(0, 1, 6, 3, 2, 5, 4, 7).reshape(tiles.shape)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(
    "window", [(1, 1), (5, 3), (10, 8), (1, 300), (300, 1), (24, 24), (32, 32), (2, 512)], ids=str
)
def test_the_bias_is_spread_out_for_windows_of_any_shape(
    window: tuple[int, int], dtype: torch.dtype, device: str
) -> None:
    table = torch.randn(2, *table_size(window)).to(device)
    tiles = triton_backend.empty_tiles(table, dtype, window)
    assert tiles is not None
    triton_backend._spread(table, tiles.fill_(float("nan")), window)
    expected = torch.full(tiles.shape, float("-inf"), device=device)
    tokens = window[0] * window[1]
    expected[:, :tokens, :tokens] = gather_bias(table, window) * math.log2(math.e)
    error = 1e-3 if dtype == torch.bfloat16 else 1e-6
    torch.testing.assert_close(rows_and_columns(tiles).float(), expected, rtol=error, atol=error)


@pytest.mark.parametrize("value", [1e6, -1e6, -1e30])
def test_a_bias_beyond_float16_saturates(value: float, device: str) -> None:
    """In bfloat16 the bias is spread out in float16; what is masked by a large number stays so."""
    description = WindowAttentionDescription(1, 16, (3, 4))
    qkv, table = make_inputs(description, (1, 3, 8), device=device, dtype=torch.bfloat16)
    table[0, 0, 3] = value
    actual = run("triton", qkv, table, description, torch.bfloat16)
    expected = run("reference", qkv, table, description, torch.float64)
    for name, exact in expected.items():
        assert_close(actual[name], exact, 2e-2, name)


@pytest.mark.usefixtures("kernels")
def test_windows_of_several_blocks_add_to_one_sum(
    device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two windows of 60 tokens, in blocks of 16 or 32, by one program."""
    monkeypatch.setattr(triton_backend, "BIAS_GRADIENT_PROGRAMS", 1)
    monkeypatch.setattr(triton_backend, "GRADIENT_PROGRAMS", 1)
    description = WindowAttentionDescription(1, 16)
    qkv, table = make_inputs(description, (2, 5, 12), device=device)
    expected = run("reference", qkv, table, description, torch.float64)
    check(run("triton", qkv, table, description), expected)


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("layout", ["qkv_heads", "heads_qkv"])
def test_sums_of_the_gradient_of_qkv(
    layout: str, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For who adds a bias to qkv; of eight windows, by three programs for each head."""
    monkeypatch.setattr(triton_backend, "GRADIENT_PROGRAMS", 6)
    description = WindowAttentionDescription(2, 16, (3, 4), None, layout)
    qkv, table = make_inputs(description, (2, 5, 7), device=device, dtype=torch.bfloat16)
    output, saved = triton_backend.forward(qkv, table, description)
    grad = torch.randn_like(output)
    partial = triton_backend.partial_gradients(
        *(grad, qkv, table.float(), description, output, saved, False)
    )
    assert partial.slabs is None
    expected = partial.qkv.double().sum((0, 1, 2))
    assert_close(partial.sums.double().sum(0), expected, 1e-2)


def test_a_table_wider_than_a_block_of_its_gradient(device: str) -> None:
    description = WindowAttentionDescription(1, 16)
    qkv, table = make_inputs(description, (1, 2, 19), device=device)
    expected = run("reference", qkv, table, description, torch.float64)
    check(run("triton", qkv, table, description), expected)


@pytest.mark.usefixtures("kernels")
def test_the_same_bits_every_time(device: str) -> None:
    shape, description = CASES["ragged grid"]
    inputs = make_inputs(description, shape, device=device)
    first, second = (run("triton", *inputs, description) for _ in range(2))
    for name, value in first.items():
        assert torch.equal(value, second[name]), name


@pytest.mark.parametrize("offset", [1000.0, -1000.0])
def test_a_bias_common_to_all_keys_changes_nothing(offset: float, device: str) -> None:
    """Scores whose exponentials overflow, or vanish, unless the largest is subtracted."""
    qkv, table = make_inputs(WHOLE, SMALL, device=device)
    expected = run("reference", qkv, table, WHOLE, torch.float64)
    actual = run("triton", qkv, table + offset, WHOLE)
    for name, value in expected.items():
        # A float32 of 1000 is good to 3e-5, and so are the weights.
        assert_close(actual[name], value, 3e-4, name)


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("later", [True, False], ids=["later keys", "earlier keys"])
def test_keys_masked_by_the_table_count_exactly_nothing(later: bool, device: str) -> None:
    """-inf for all keys on one side: for some queries that is all of the first or last block."""
    description = WindowAttentionDescription(1, 16)
    qkv, table = make_inputs(description, (1, 1, 70), device=device)
    masked = slice(70, None) if later else slice(None, 69)
    table[:, :, masked] = -float("inf")
    actual = run("triton", qkv, table, description)
    expected = run("reference", qkv, table, description, torch.float64)
    check(actual, expected)


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("place", ["query", "key", "value", "table"])
def test_what_is_not_finite_spreads_as_in_the_reference(
    place: str, value: float, device: str
) -> None:
    description = WindowAttentionDescription(1, 16, (3, 4))
    qkv, table = make_inputs(description, (1, 3, 8), device=device)
    if place == "table":
        table[0, 0, 3] = value
    else:
        qkv[0, 1, 1, 16 * ("query", "key", "value").index(place)] = value
    actual = run("triton", qkv, table, description)
    expected = run("reference", qkv, table, description)
    # Reaches what it should, and no padding lane carries it elsewhere.
    assert torch.equal(actual["output"].isfinite(), expected["output"].isfinite())
    finite = expected["output"].isfinite()
    assert_close(actual["output"][finite], expected["output"][finite], 1e-5)
    for name in ("qkv", "table"):
        assert torch.equal(actual[name].isnan(), expected[name].isnan()), name


@pytest.mark.usefixtures("kernels")
def test_empty_batch(device: str) -> None:
    """In any layout."""
    _, table = make_inputs(WHOLE, (0, 4, 4), device=device)
    for qkv in empty_layouts((0, 4, 4, 96), device).values():
        results = run("triton", qkv, table, WHOLE)
        assert results["output"].shape == (0, 4, 4, 32)
        assert results["qkv"].shape == (0, 4, 4, 96)
        assert not results["table"].any()


@pytest.mark.parametrize(
    "view",
    [
        lambda x: x[:, ::2, 1:4],
        lambda x: x.transpose(1, 2),
        lambda x: x.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1),
        lambda x: x[:1].expand(2, -1, -1, -1),
    ],
    ids=["sliced", "transposed", "channels first", "expanded"],
)
def test_strided_qkv_and_gradient(view, device: str) -> None:
    qkv = view(torch.randn(1, 4, 5, 96, device=device))
    _, table = make_inputs(WHOLE, tuple(qkv.shape[:3]), device=device)
    cotangent = view(torch.randn(1, 4, 5, 32, device=device))
    gradients = []
    with use_backend("triton"):
        for arrange in (lambda x: x, Tensor.contiguous):
            leaf = arrange(qkv.detach()).requires_grad_()
            output = window_attention(leaf, table, WHOLE)
            gradients.append(torch.autograd.grad(output, leaf, arrange(cotangent)))
    assert torch.equal(*[gradient for (gradient,) in gradients])


def test_only_what_needs_a_gradient_gets_one(device: str) -> None:
    qkv, table = make_inputs(WHOLE, SMALL, device=device)
    with use_backend("triton"):
        window_attention(qkv.requires_grad_(), table, WHOLE).sum().backward()
    assert table.grad is None


def test_a_head_dim_without_kernels_falls_back_visibly(device: str) -> None:
    description = WindowAttentionDescription(2, 24)
    qkv, table = make_inputs(description, SMALL, device=device)
    with (
        use_backend("triton"),
        pytest.warns(FallbackWarning, match="'triton' does not cover head_dim 24"),
    ):
        window_attention(qkv, table, description)


def test_bytes_and_products_of_each_pass(kernels: str) -> None:
    """Beside packed qkv (3 C): C-wide maps, two float32 per query and head, slabs, the table
    and its bias spread out."""
    description = WindowAttentionDescription(2, 16, (4, 4))
    with FakeTensorMode():
        qkv, table = torch.empty(3, 8, 8, 96), torch.empty(2, 7, 7)
        with record_passes() as passes:
            output, saved = triton_backend.forward(qkv, table, description)
            grad = torch.empty_like(output)
            triton_backend.backward(grad, qkv, table, description, output, saved, True)
    rows, table_bytes = 3 * 8 * 8, 4 * 2 * 7 * 7
    wide, statistic = 4 * rows * 32, 4 * rows * 2
    slabs = 4 * 12 * 2 * 16 * 16  # one for each of the 12 windows
    spread = kernels != "looked up"
    tiles = 4 * 2 * 64 * 64
    bias = tiles if spread else table_bytes
    expected = {
        "forward_kernel": 3 * wide + bias + wide + statistic,
        "fold_table_kernel": slabs + table_bytes,
    }
    if spread:
        expected["spread_bias_kernel"] = table_bytes + tiles
    if kernels == "one":
        expected["gradient_kernel"] = 5 * wide + bias + statistic + 3 * wide + slabs
    else:
        expected["query_gradient_kernel"] = 5 * wide + bias + statistic + wide + statistic
        expected["key_value_gradient_kernel"] = 4 * wide + bias + 2 * statistic + 2 * wide
        expected["bias_gradient_kernel"] = 4 * wide + bias + 2 * statistic + slabs
    assert {one.kernel: one.bytes for one in passes} == expected
    product = 2 * 12 * 2 * 16 * 16 * 16
    products = {"one": [0, 2, 0, 5, 0], "looked up": [2, 3, 4, 2, 0]}.get(
        kernels, [0, 2, 0, 3, 4, 2, 0]
    )
    assert [one.flops // product for one in passes] == products
    assert {one.arithmetic for one in passes} == {"float32"}


def test_fake_tensors_give_the_same_shapes_and_layouts(device: str) -> None:
    description = WindowAttentionDescription(1, 16, (4, 4))
    qkv, table = make_inputs(description, (1, 5, 4), device=device)
    checks, choices = ("test_schema", "test_faketensor"), (description.encode(), "triton")
    forward = torch.ops.moat_kernels.window_attention_forward.default
    torch.library.opcheck(forward, (qkv, table, *choices), test_utils=checks)
    output, *saved = forward(qkv, table, *choices)
    torch.library.opcheck(
        torch.ops.moat_kernels.window_attention_backward.default,
        (torch.randn_like(output), qkv, table, output, saved, *choices, True),
        test_utils=checks,
    )
