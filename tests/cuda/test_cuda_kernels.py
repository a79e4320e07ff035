"""The CUDA stencil kernels against stock operations in float64: on the host, and on a GPU."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from support import cuda_on_cpu
from support.stencil_cases import (
    MAPS,
    Map,
    Tensors,
    make_map,
    make_tensors,
    reference_backward,
    reference_forward,
)
from support.tolerances import (
    CUDA_KERNEL,
    LOW_PRECISION_FACTOR,
    LOW_PRECISION_ROUNDING,
    STORED_MOMENTS,
    assert_close,
    relative_error,
)
from support.wrong_arguments import run_in_process
from torch import Tensor

from moat_kernels.extension import reason_cuda_unusable
from moat_kernels.ops.mbconv.triton import cuda_kernels
from moat_kernels.ops.mbconv.triton.cuda_kernels import (
    depthwise,
    depthwise_backward,
    expand_depthwise,
)

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# Few blocks, so that each goes through several tiles.
BLOCKS = 5
MOST_COLUMNS = 14  # of a tile
# Maps, and how they are divided: into how many blocks, of how many columns.
DIVISIONS = {
    "columns of one pixel": (make_map(2, 3, 5, 1), 1, 1),
    "a last tile of one column": (make_map(1, 5, 7, 1), 2, 3),
    "two bands": (make_map(1, 17, 3, 1), 64, 7),
    "bands and tiles": (make_map(2, 33, 30, 1, (1, 1, 1, 1)), 5000, 14),
    "bands and tiles in groups": (make_map(1, 40, 15, 1, (2, 2, 0, 0)), 7, 7),
    "no padding": (make_map(1, 9, 16, 1, (0, 0, 0, 0)), 3, 14),
    "nothing but padding": (make_map(1, 1, 2, 1, (4, 4, 3, 5)), 3, 14),
    "stride 2, bands": (make_map(2, 35, 31, 2, (1, 1, 1, 1)), 5000, 7),
    "stride 2, even": (make_map(1, 36, 60, 2), 5000, 14),
    "stride 2, groups": (make_map(3, 13, 29, 2, (0, 1, 0, 1)), 5, 3),
    "stride 2, one column": (make_map(1, 4, 1, 2, (1, 1, 1, 1)), 1, 1),
}
divisions = pytest.mark.parametrize(
    ("stencil", "blocks", "columns"), DIVISIONS.values(), ids=DIVISIONS.keys()
)


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> str:
    """Where the kernels run; on the host they are compiled by g++ (support/cuda_on_cpu)."""
    if request.param == "cpu":
        if reason := cuda_on_cpu.reason_unavailable():
            pytest.skip(reason)
        cuda_on_cpu.load()
    elif reason := reason_cuda_unusable():
        pytest.skip(f"the CUDA kernels: {reason}")
    return request.param


def check(actual: Tensor, exact: Tensor, stock: Tensor, dtype: torch.dtype, name: str) -> None:
    """float32: close to float64; else no further from it than twice stock operations are.

    On top comes a rounding of what is stored, and summed as stored.
    """
    error = relative_error(actual.cpu(), exact)
    allowed = CUDA_KERNEL
    if dtype != torch.float32:
        allowed = max(allowed, LOW_PRECISION_FACTOR * relative_error(stock, exact))
        allowed += LOW_PRECISION_ROUNDING * torch.finfo(dtype).eps
    assert error <= allowed, f"{name}: {error:.2e} > {allowed:.2e}"


def check_moments(moments: Tensor | None, output: Tensor) -> None:
    """Mean and squared deviations are those of the output as it was stored."""
    assert moments is not None
    (values,) = moments
    stored = output.double()
    assert_close(values[0], stored.mean(0), STORED_MOMENTS, "mean")
    assert_close(values[1], (stored - stored.mean(0)).square().sum(0), STORED_MOMENTS, "squares")


def on(device: str, tensors: Tensors) -> Tensors:
    return Tensors(**{name: tensor.to(device) for name, tensor in vars(tensors).items()})


def training_arguments(tensors: Tensors, stencil: Map) -> tuple:
    return (tensors.z1, tensors.affine, "gelu", tensors.taps, None, "identity", stencil)


def eval_arguments(tensors: Tensors, stencil: Map) -> tuple:
    return (tensors.z1, None, "identity", tensors.taps, tensors.bias, "gelu", stencil)


def check_forward(
    stencil: Map,
    channels: int,
    dtype: torch.dtype,
    device: str,
    blocks: int = BLOCKS,
    columns: int = MOST_COLUMNS,
) -> None:
    tensors = make_tensors(stencil, channels, dtype)
    for arguments in (training_arguments, eval_arguments):
        output, moments = depthwise(
            *arguments(on(device, tensors), stencil), True, target_blocks=blocks, columns=columns
        )
        exact = reference_forward(*arguments(tensors.to(torch.float64), stencil))
        stock = reference_forward(*arguments(tensors.to(dtype), stencil))
        assert output.dtype == dtype
        check(output, exact, stock, dtype, "output")
        check_moments(moments, output)


def check_backward(
    stencil: Map,
    channels: int,
    dtype: torch.dtype,
    device: str,
    blocks: int = BLOCKS,
    columns: int = MOST_COLUMNS,
) -> None:
    tensors = make_tensors(stencil, channels, dtype)
    on_device = on(device, tensors)
    for activation, with_norms in (("gelu", True), ("identity", False)):
        gradient, sums = depthwise_backward(
            on_device.grad,
            on_device.z2 if with_norms else None,
            on_device.factors if with_norms else None,
            on_device.z1,
            on_device.affine if with_norms else None,
            activation,
            on_device.taps,
            stencil,
            target_blocks=blocks,
            columns=columns,
        )
        exact = reference_backward(tensors.to(torch.float64), activation, with_norms, stencil)
        stock = reference_backward(tensors.to(dtype), activation, with_norms, stencil)
        assert gradient.dtype == dtype and sums.dtype == torch.float32
        sums = sums.sum(0, dtype=torch.float64)
        check(gradient, exact[0], stock[0], dtype, "gradient")
        check(sums[:9], exact[1][:9], stock[1][:9], dtype, "taps")
        check(sums[9], exact[1][9], stock[1][9], dtype, "sum")
        check(sums[10], exact[1][10], stock[1][10], dtype, "product")


both_passes = pytest.mark.parametrize(
    "check_pass", [check_forward, check_backward], ids=["forward", "backward"]
)
CheckPass = Callable[..., None]


@both_passes
@pytest.mark.parametrize("stencil", MAPS.values(), ids=MAPS.keys())
def test_maps_of_every_kind(stencil: Map, check_pass: CheckPass, device: str) -> None:
    check_pass(stencil, 8, torch.float32, device)


@both_passes
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("stride", [1, 2])
def test_channels_that_do_not_fill_a_block(
    stride: int, dtype: torch.dtype, check_pass: CheckPass, device: str
) -> None:
    check_pass(make_map(2, 6, 9, stride), 72, dtype, device)


@both_passes
@pytest.mark.parametrize("dtype", DTYPES)
@divisions
def test_maps_divided_in_every_way(
    stencil: Map,
    blocks: int,
    columns: int,
    dtype: torch.dtype,
    check_pass: CheckPass,
    device: str,
) -> None:
    check_pass(stencil, 8, dtype, device, blocks, columns)


def make_expand(
    stencil: Map, in_channels: int, channels: int, dtype: torch.dtype
) -> dict[str, Tensor]:
    rows = stencil.batch * stencil.height * stencil.width
    return {
        "rows": torch.randn(rows, in_channels).to(dtype),
        "weight": (torch.randn(channels, in_channels) / in_channels**0.5).to(dtype),
        "bias": torch.randn(channels),
        "taps": torch.randn(9, channels) / 3,
        "depthwise_bias": torch.randn(channels),
    }


def reference_expand(tensors: dict[str, Tensor], dtype: torch.dtype, stencil: Map) -> Tensor:
    rows, weight, bias, taps, depthwise_bias = (tensor.to(dtype) for tensor in tensors.values())
    z1 = rows @ weight.t() + bias
    return reference_forward(z1, None, "gelu", taps, depthwise_bias, "gelu", stencil)


def run_expand(tensors: dict[str, Tensor], stencil: Map, device: str) -> Tensor:
    on_device = {name: tensor.to(device) for name, tensor in tensors.items()}
    return expand_depthwise(
        **on_device, activation="gelu", output_activation="gelu", stencil=stencil
    )


EXPANSIONS = {
    "one pixel": (make_map(1, 1, 1, 1), 8, 8),
    "images together": (make_map(7, 7, 7, 1), 40, 8),
    "many tiles": (make_map(1, 15, 18, 1, (2, 0, 1, 3)), 32, 16),
    "blocks": (make_map(2, 9, 10, 2), 72, 72),
    "stride 2": (make_map(1, 17, 16, 2, (1, 1, 1, 1)), 24, 8),
    "padded far": (make_map(1, 3, 4, 2, (5, 2, 4, 1)), 16, 8),
}
expansions = pytest.mark.parametrize(
    ("stencil", "in_channels", "channels"), EXPANSIONS.values(), ids=EXPANSIONS.keys()
)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@expansions
def test_expand_depthwise(
    stencil: Map, in_channels: int, channels: int, dtype: torch.dtype, device: str
) -> None:
    tensors = make_expand(stencil, in_channels, channels, dtype)
    output = run_expand(tensors, stencil, device)
    exact = reference_expand(tensors, torch.float64, stencil)
    check(output, exact, reference_expand(tensors, dtype, stencil), dtype, "output")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_spreads_as_far_as_its_taps(value: float, device: str) -> None:
    stencil = make_map(1, 5, 6, 1)
    tensors = make_tensors(stencil, 8, torch.float32)
    tensors.z1[8, 3] = value

    def run(function: Callable, source: Tensors) -> Tensor:
        return function(source.z1, None, "gelu", source.taps, None, "identity", stencil)

    expected = run(reference_forward, tensors.to(torch.float64))
    on_device = on(device, tensors)
    output, _ = run(lambda *a: depthwise(*a, measure=False), on_device)
    assert_close(output.cpu(), expected, CUDA_KERNEL)


def test_gelu_and_its_slope_are_as_accurate_as_they_say(device: str) -> None:
    stencil = make_map(1, 64, 64, 1)
    x = torch.linspace(-9, 9, stencil.height * stencil.width).repeat(8, 1).t().contiguous()
    taps = torch.zeros(9, 8)
    taps[4] = 1
    ones, taps, on_device = torch.ones_like(x).to(device), taps.to(device), x.to(device)
    value, _ = depthwise(on_device, None, "gelu", taps, None, "identity", stencil, measure=False)
    slope, _ = depthwise_backward(ones, None, None, on_device, None, "gelu", taps, stencil)
    exact = x.double().requires_grad_()
    torch.nn.functional.gelu(exact).sum().backward()
    expected = torch.nn.functional.gelu(exact).detach()
    assert (value.cpu() - expected).abs().max() < 7e-7
    assert (slope.cpu() - exact.grad).abs().max() < 1e-6


def test_gelu_and_its_slope_of_what_is_not_finite(device: str) -> None:
    x = torch.tensor([float("nan"), float("inf"), -float("inf")]).repeat(8, 1).t().contiguous()
    centre = torch.zeros(9, 8)
    centre[4] = 1
    ones, centre, on_device = torch.ones_like(x).to(device), centre.to(device), x.to(device)
    # Each pixel alone: a tap of 0 times infinity is NaN.
    for pixel, value, slope in ((0, x[0, 0], x[0, 0]), (1, x[1, 0], 1.0), (2, 0.0, 0.0)):
        one, alone = on_device[pixel : pixel + 1], make_map(1, 1, 1, 1)
        output, _ = depthwise(one, None, "gelu", centre, None, "identity", alone, measure=False)
        gradient, _ = depthwise_backward(ones[:1], None, None, one, None, "gelu", centre, alone)
        for result, expected in ((output, value), (gradient, slope)):
            exact = torch.full_like(result, float(expected))
            torch.testing.assert_close(result, exact, atol=1e-6, rtol=0, equal_nan=True)


def test_statistics_do_not_cancel_where_the_mean_is_large(device: str) -> None:
    stencil = make_map(2, 9, 17, 1)
    tensors = make_tensors(stencil, 8, torch.float32)
    identity = torch.zeros(9, 8)
    identity[4] = 1
    rows = 1e3 + torch.randn_like(tensors.z1)
    arguments = (rows.to(device), None, "identity", identity.to(device), None, "identity", stencil)
    output, moments = depthwise(*arguments, measure=True, target_blocks=BLOCKS)
    check_moments(moments, output)


def all_results(seed: int, patch: pytest.MonkeyPatch) -> dict[str, list[Tensor]]:
    """Results of every kernel on several tiles, its threads run in the order of `seed`."""
    patch.setenv("CUDA_ON_CPU_SEED", str(seed))
    torch.manual_seed(0)
    # Four tiles (or six) in three groups, of ten rows in the backward pass: the first row of the
    # next tile takes the last one's place in the ring.
    stencil = make_map(2, 9, 20, 1)
    tensors = make_tensors(stencil, 40, torch.float32)
    # Three steps of C, so that h1 overwrites what the last one reads.
    expand = make_expand(stencil, 72, 8, torch.bfloat16)
    output, moments = depthwise(
        tensors.z1, None, "gelu", tensors.taps, None, "identity", stencil, True, target_blocks=3
    )
    gradient = depthwise_backward(
        *(tensors.grad, tensors.z2, tensors.factors, tensors.z1, tensors.affine),
        *("gelu", tensors.taps, stencil),
        target_blocks=3,
    )
    expanded = run_expand(expand, stencil, "cpu")
    assert moments is not None
    halved = make_map(2, 9, 40, 2)
    tensors = make_tensors(halved, 40, torch.float32)
    arguments = (tensors.z1, None, "gelu", tensors.taps, None, "identity", halved, True)
    halves = [tensor for tensor in depthwise(*arguments, target_blocks=3) if tensor is not None]
    half_gradients = depthwise_backward(
        *(tensors.grad, tensors.z2, tensors.factors, tensors.z1, tensors.affine),
        *("gelu", tensors.taps, halved),
        target_blocks=3,
    )
    return {
        "depthwise_forward.cu": [output, moments, *halves],
        "depthwise_backward.cu": [*gradient, *half_gradients],
        "expand_depthwise.cu": [expanded],
        "expand_tile.cuh": [expanded],
        "reduce.cu": [moments],
    }


def barriers() -> Iterator[str]:
    for path in sorted((Path(cuda_on_cpu.ROOT) / "csrc" / "cuda").glob("*.cu*")):
        for number, line in enumerate(path.read_text().splitlines(), 1):
            if "__syncthreads();" in line:
                yield f"{path.name}:{number}"


@pytest.fixture(scope="module")
def expected() -> dict[str, list[Tensor]]:
    cuda_on_cpu.load()
    with pytest.MonkeyPatch.context() as patch:
        return all_results(0, patch)


def same(left: list[Tensor], right: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(left, right, strict=True))


@pytest.mark.skipif(bool(cuda_on_cpu.reason_unavailable()), reason="no g++")
class TestOnTheHost:
    """What only the emulation, which `expected` loads, can show."""

    @pytest.mark.parametrize("seed", [1, 2, 3])
    def test_the_order_of_threads_and_blocks_changes_no_bit(
        self, seed: int, expected: dict[str, list[Tensor]], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        results = all_results(seed, monkeypatch)
        assert all(same(results[name], expected[name]) for name in expected)

    def test_wrong_arguments_raise(self, tmp_path: Path) -> None:
        assert run_in_process("cuda_calls", 2, tmp_path) >= 400

    @pytest.mark.parametrize("barrier", list(barriers()))
    def test_without_any_one_barrier_results_are_wrong(
        self, barrier: str, expected: dict[str, list[Tensor]], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("CUDA_ON_CPU_SKIP_BARRIER", barrier)
        name = barrier.partition(":")[0]
        assert any(
            not same(all_results(seed, monkeypatch)[name], expected[name]) for seed in range(1, 4)
        )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"z1": torch.zeros(30, 6)}, "the channels must be a multiple of 4"),
        ({"z1": torch.zeros(30, 8, dtype=torch.float64)}, "z1 must be float32, bfloat16"),
        ({"taps": torch.zeros(9, 4)}, r"weights must be \[9, 8\], got \[9, 4\]"),
        ({"taps": torch.zeros(9, 8).half()}, "weights must be float32, got float16"),
        ({"affine": torch.zeros(2, 8, device="meta")}, "all tensors must be on one device"),
        ({"taps": torch.zeros(8, 9).t()}, "weights must be contiguous"),
        ({"activation": "relu"}, "activation must be gelu or identity, got relu"),
        ({"target_blocks": 0}, "target_blocks must be positive"),
        ({"columns": 15}, "columns must be from 1 to 14, got 15"),
    ],
)
def test_bad_arguments_are_named(change: dict, message: str, device: str) -> None:
    arguments = {
        "z": torch.zeros(30, 8),
        "affine": None,
        "activation": "gelu",
        "taps": torch.zeros(9, 8),
        "bias": None,
        "output_activation": "identity",
        "stencil": make_map(1, 5, 6, 1),
        "measure": False,
    }
    arguments |= {("z" if name == "z1" else name): value for name, value in change.items()}
    for name, value in arguments.items():
        if isinstance(value, Tensor) and not value.is_meta:
            arguments[name] = value.to(device)
    with pytest.raises(RuntimeError, match=message):
        depthwise(**arguments)


def test_unsupported_names_the_reason(device: str) -> None:
    rows = torch.zeros(4, 12, dtype=torch.bfloat16, device=device)
    assert "E = 12, not a multiple of 8" in cuda_kernels.unsupported(rows, ("gelu",))
    assert cuda_kernels.unsupported(rows.float(), ("gelu", "identity")) == ""
    assert "'silu'" in cuda_kernels.unsupported(rows.float(), ("silu",))
    assert "torch.float64" in cuda_kernels.unsupported(rows.double(), ("gelu",))
    weight = torch.zeros(16, 12, device=device)
    assert "tensor cores" in cuda_kernels.unsupported_expand(rows.float(), weight, ("gelu",))
    assert "C = 12" in cuda_kernels.unsupported_expand(rows, weight.bfloat16(), ("gelu",))
    assert cuda_kernels.unsupported_expand(rows[:, :8], weight[:, :8].bfloat16(), ("gelu",)) == ""
    assert "empty" in cuda_kernels.unsupported(rows.float()[:0], ("gelu",))
    assert "meta" in cuda_kernels.unsupported(rows.to("meta"), ("gelu",))


def from_outside(device: str, offset: int) -> Tensor:
    """Rows [4, 8] of zeros in memory of another library, `offset` bytes behind an aligned place.

    PyTorch takes the place as the beginning of the memory, whatever it is.
    """
    memory = torch.zeros(1024, dtype=torch.uint8, device=device)
    begin = -memory.data_ptr() % 16 + offset
    foreign = memory[begin : begin + 4 * 8 * 4].view(torch.float32).view(4, 8)
    rows = torch.from_dlpack(foreign)
    assert rows.storage_offset() == 0
    return rows


def test_memory_from_outside_that_is_not_aligned_is_left_to_others(device: str) -> None:
    assert cuda_kernels.unsupported(from_outside(device, 0), ("gelu",)) == ""
    misaligned = from_outside(device, 4)
    assert "multiple of 16 bytes" in cuda_kernels.unsupported(misaligned, ("gelu",))
    with pytest.raises(RuntimeError, match="z1 must be aligned to 16 bytes"):
        depthwise(
            *(misaligned, None, "gelu", torch.zeros(9, 8, device=device), None, "identity"),
            *(make_map(1, 2, 2, 1), False),
        )


def test_tensors_without_data_are_judged_by_where_they_begin_in_their_storage(device: str) -> None:
    def reasons() -> list[str]:
        memory = torch.zeros(33, device=device)
        views = memory[:32].view(4, 8), memory[1:].view(4, 8)
        return [cuda_kernels.unsupported(rows, ("gelu",)) for rows in views]

    with torch._subclasses.fake_tensor.FakeTensorMode():
        aligned, misaligned = reasons()
    assert aligned == "" and "multiple of 16 bytes" in misaligned


def test_fake_tensors_have_the_shapes_of_results(device: str) -> None:
    stencil = make_map(2, 5, 6, 2)
    tensors = make_tensors(stencil, 8, torch.float32, device)
    forward = (tensors.z1, None, "gelu", tensors.taps, None, "identity", stencil, True)
    backward = (tensors.grad, None, None, tensors.z1, None, "gelu", tensors.taps, stencil)
    expand = make_expand(stencil, 16, 8, torch.bfloat16)

    def results() -> tuple[Tensor, ...]:
        return (
            *depthwise(*forward),
            *depthwise_backward(*backward),
            run_expand(expand, stencil, device),
        )

    with torch._subclasses.fake_tensor.FakeTensorMode(allow_non_fake_inputs=True):
        fakes = results()
    real = results()
    for fake, tensor in zip(fakes, real, strict=True):
        assert (fake.shape, fake.dtype) == (tensor.shape, tensor.dtype)


@pytest.mark.parametrize("columns", [3, 7, MOST_COLUMNS])
@pytest.mark.parametrize("blocks", [1, BLOCKS, 4096])
@pytest.mark.parametrize("stencil", MAPS.values(), ids=MAPS.keys())
def test_fake_sums_have_as_many_parts(stencil: Map, blocks: int, columns: int, device: str) -> None:
    tensors = make_tensors(stencil, 72, torch.bfloat16, device)
    arguments = (tensors.grad, None, None, tensors.z1, None, "gelu", tensors.taps, stencil)
    arguments += (blocks, columns)
    with torch._subclasses.fake_tensor.FakeTensorMode(allow_non_fake_inputs=True):
        _, fake = depthwise_backward(*arguments)
    assert fake.shape == depthwise_backward(*arguments)[1].shape
