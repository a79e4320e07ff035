"""The native CPU kernels of `mbconv` against the reference in float64."""

from __future__ import annotations

import warnings

import pytest
import torch
from support.mbconv_cases import CASES, Case, make_parameters, map_tensors, run
from support.native import needs_extension
from support.tolerances import (
    BACKEND_GRADIENT,
    BACKEND_OUTPUT,
    BACKEND_ZERO_GRADIENT,
    LOW_PRECISION_FACTOR,
    NATIVE_GELU,
    NATIVE_GELU_OF_SMALL_VALUES,
    NATIVE_GELU_SLOPE,
    assert_close,
    relative_error,
)
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from moat_kernels import FallbackWarning, use_backend
from moat_kernels.functional import (
    MBConvDescription,
    MBConvParameters,
    Norm,
    Pool,
    SqueezeExcite,
    mbconv,
)
from moat_kernels.ops.mbconv.cpu import backend as cpu_backend
from moat_kernels.ops.mbconv.description import (
    PARAMETER_NAMES,
    flatten,
)
from moat_kernels.ops.mbconv.dispatch import resolve_frozen

pytestmark = needs_extension

STRIDE_2 = MBConvDescription(stride=2, pool=Pool(kernel_size=3))
GATED = MBConvDescription(squeeze_excite=SqueezeExcite())
# Channel counts that fill, and that do not fill, vectors, panels and blocks.
CHANNELS = [(1, 1, 1), (3, 5, 2), (8, 32, 8), (16, 64, 24), (40, 160, 40), (13, 130, 17)]


def evaluate(
    backend: str, x: Tensor, parameters: MBConvParameters, description: MBConvDescription, **options
) -> Tensor:
    with torch.no_grad(), use_backend(backend), warnings.catch_warnings():
        warnings.simplefilter("error", FallbackWarning)
        return mbconv(x, parameters, description, **options)


def check_eval(x: Tensor, case: Case, threads: int = 1, **options) -> Tensor:
    """The result by the kernels, in float32, is close to the reference in float64."""
    parameters = make_parameters(case)
    single = map_tensors(
        parameters, lambda tensor: tensor.float() if tensor.is_floating_point() else tensor
    )
    exact = map_tensors(
        single, lambda tensor: tensor.double() if tensor.is_floating_point() else tensor
    )
    expected = evaluate("reference", x.double(), exact, case.description, **options)
    torch.set_num_threads(threads)
    try:
        actual = evaluate("cpu", x, single, case.description, **options)
    finally:
        torch.set_num_threads(1)
    assert actual.dtype == x.dtype
    assert_close(actual.double(), expected, BACKEND_OUTPUT[torch.float32], "output")
    return actual


def covered(case: Case) -> bool:
    parameters = make_parameters(case, torch.float32)
    x = torch.randn(1, case.in_channels, 8, 8)
    description = resolve_frozen(case.description, parameters, training=False)
    return not cpu_backend.unsupported(x, parameters, description)


COVERED = {name: case for name, case in CASES.items() if covered(case)}


@pytest.mark.parametrize("case", COVERED.values(), ids=COVERED)
@pytest.mark.parametrize("size", [(7, 6), (14, 9)])
def test_every_covered_choice(case: Case, size: tuple[int, int]) -> None:
    check_eval(torch.randn(3, case.in_channels, *size), case)


def test_the_choices_of_moat_are_covered() -> None:
    names = {"stride 1", "stride 2, pool 2, projected", "stride 2, pool 3", "squeeze-excite"}
    assert names <= COVERED.keys()


@pytest.mark.each_isa
@pytest.mark.parametrize("channels", CHANNELS)
@pytest.mark.parametrize(
    "description", [MBConvDescription(), STRIDE_2, GATED], ids=["1", "2", "se"]
)
def test_any_number_of_channels(
    channels: tuple[int, int, int], description: MBConvDescription
) -> None:
    case = Case(description, *channels, shortcut_conv=True)
    check_eval(torch.randn(2, channels[0], 9, 10), case)


@pytest.mark.parametrize("size", [(1, 1), (1, 7), (2, 1), (31, 5), (64, 33), (3, 200)])
@pytest.mark.parametrize(
    "description", [MBConvDescription(), STRIDE_2, GATED], ids=["1", "2", "se"]
)
def test_any_map(size: tuple[int, int], description: MBConvDescription) -> None:
    check_eval(torch.randn(2, 6, *size), Case(description, wide_channels=70))


@pytest.mark.each_isa
@pytest.mark.parametrize("padding", ["tf_same", (0, 0, 0, 0), (1, 1, 1, 1), (0, 5, 4, 0)])
@pytest.mark.parametrize("width", [143, 144, 427])
@pytest.mark.parametrize("stride", [1, 2])
def test_squeeze_excite_of_rows_in_parts(padding, width: int, stride: int) -> None:
    """Maps so wide that columns are computed in groups, of which neighbours share some."""
    description = MBConvDescription(
        stride=stride, padding=padding, squeeze_excite=SqueezeExcite(), residual=False
    )
    case = Case(description, wide_channels=140)
    for threads in (1, 3):
        check_eval(torch.randn(2, 6, 9, width), case, threads)


@pytest.mark.each_isa
@pytest.mark.parametrize("padding", [(0, 0, 0, 0), (2, 0, 1, 3), (0, 5, 4, 0), (1, 1, 1, 1)])
@pytest.mark.parametrize("stride", [1, 2])
def test_any_padding(padding: tuple[int, int, int, int], stride: int) -> None:
    description = MBConvDescription(stride=stride, padding=padding, residual=False)
    check_eval(torch.randn(2, 6, 9, 8), Case(description))


@pytest.mark.each_isa
@pytest.mark.parametrize("batch", [1, 2, 3, 5])
@pytest.mark.parametrize("height", [7, 30])
@pytest.mark.parametrize(
    "description", [MBConvDescription(), STRIDE_2, GATED], ids=["1", "2", "se"]
)
def test_any_division_among_threads(
    batch: int, height: int, description: MBConvDescription
) -> None:
    case = Case(description, wide_channels=300)
    check_eval(torch.randn(batch, 6, height, 8), case, threads=4)


@pytest.mark.parametrize("size", [(1, 1), (5, 9), (8, 8), (28, 4)])
@pytest.mark.parametrize("padding", ["tf_same", (0, 1, 2, 0), (2, 0, 0, 1)])
@pytest.mark.parametrize("batch", [4, 9])
def test_any_small_maps_of_a_large_batch(batch: int, padding, size: tuple[int, int]) -> None:
    """Several images in a tile, the last tile with fewer; each as if it were alone."""
    description = MBConvDescription(padding=padding, residual=False)
    if min(size) + 1 < 3 and padding != "tf_same":
        description = MBConvDescription(residual=False)
    case = Case(description, wide_channels=70)
    for threads in (1, 2):
        check_eval(torch.randn(batch, 6, *size), case, threads=threads)


def test_deep_and_wide_products() -> None:
    check_eval(torch.randn(2, 800, 3, 4), Case(MBConvDescription(), 800, 400, 800))


def test_drop_path_scale() -> None:
    check_eval(torch.randn(3, 6, 9, 8), Case(), drop_path_scale=torch.tensor([0.0, 1.0, 1.25]))


@pytest.mark.parametrize("description", [MBConvDescription(), GATED], ids=["plain", "se"])
def test_empty_batch(description: MBConvDescription) -> None:
    parameters = make_parameters(Case(description), torch.float32)
    assert evaluate("cpu", torch.randn(0, 6, 5, 4), parameters, description).shape == (0, 6, 5, 4)


def test_memory_formats() -> None:
    torch.manual_seed(1)
    x = torch.randn(2, 6, 9, 8)
    wide = torch.randn(2, 9, 8, 12).permute(0, 3, 1, 2)
    layouts = [x, x.to(memory_format=torch.channels_last), wide[:, ::2], wide[:, 3:9, ::2, 1:7]]
    for layout in layouts:
        y = check_eval(layout, Case())
        channels_last = torch.channels_last
        assert y.is_contiguous() or y.is_contiguous(memory_format=channels_last)
    assert check_eval(layouts[1], Case()).is_contiguous(memory_format=torch.channels_last)


@pytest.mark.each_isa
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "description", [MBConvDescription(), STRIDE_2, GATED], ids=["1", "2", "se"]
)
def test_low_precision(dtype: torch.dtype, description: MBConvDescription) -> None:
    case = Case(description, 13, 52, 13)
    parameters = make_parameters(case, dtype)
    x = torch.randn(2, 13, 9, 8).to(dtype)
    exact = map_tensors(
        parameters, lambda tensor: tensor.double() if tensor.is_floating_point() else tensor
    )
    expected = evaluate("reference", x.double(), exact, description)
    stock = relative_error(evaluate("reference", x, parameters, description).double(), expected)
    actual = evaluate("cpu", x, parameters, description)
    assert actual.dtype == dtype
    assert relative_error(actual.double(), expected) <= LOW_PRECISION_FACTOR * stock


def test_autocast_gives_the_dtype_of_the_reference() -> None:
    for case in (Case(), Case(STRIDE_2, out_channels=8, shortcut_conv=True)):
        parameters = make_parameters(case, torch.float32)
        x = torch.randn(2, 6, 8, 8)
        with torch.autocast("cpu", torch.bfloat16):
            expected = evaluate("reference", x, parameters, case.description)
            actual = evaluate("cpu", x, parameters, case.description)
        assert actual.dtype == expected.dtype
        assert relative_error(actual.double(), expected.double()) < 0.02


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_bad_value_spoils_its_neighbourhood_only(value: float) -> None:
    case = Case(in_channels=6, out_channels=6)
    parameters = make_parameters(case, torch.float32)
    x = torch.randn(1, 6, 9, 9)
    clean = evaluate("cpu", x, parameters, case.description)
    x[0, 2, 4, 4] = value
    spoilt = evaluate("cpu", x, parameters, case.description)
    near = torch.zeros(9, 9, dtype=torch.bool)
    near[3:6, 3:6] = True
    assert not spoilt[0, 2, 4, 4].isfinite()
    assert torch.equal(spoilt[..., ~near], clean[..., ~near])
    if value != value:
        assert spoilt[..., near].isnan().all()


@pytest.mark.each_isa
def test_gelu_is_as_exact_of_small_values_as_of_large_ones() -> None:
    """A bottleneck that is one GELU, its result in eval, and its result and slope in training."""
    sizes = torch.logspace(-6, 0.9, 20_000)
    x = torch.cat((sizes, -sizes)).view(1, 1, 1, -1)
    middle = torch.zeros(1, 1, 3, 3)
    middle[..., 1, 1] = 1
    parameters = MBConvParameters(torch.ones(1, 1), middle, torch.ones(1, 1))
    description = MBConvDescription(
        *(1, "tf_same", None, "identity", None, "gelu", None, "identity"), residual=False
    )
    exact_x = x.double().requires_grad_()
    exact = torch.nn.functional.gelu(exact_x)
    (exact_slope,) = torch.autograd.grad(exact.sum(), exact_x)
    trained_x = x.clone().requires_grad_()
    with use_backend("cpu"):
        trained = mbconv(trained_x, parameters, description, training=True)
        (slope,) = torch.autograd.grad(trained.sum(), trained_x)
    for result in (evaluate("cpu", x, parameters, description), trained):
        error = (result - exact).abs().detach()
        assert error.max() < NATIVE_GELU
        assert (error / exact.abs())[x.abs() <= 1].max() < NATIVE_GELU_OF_SMALL_VALUES
    assert (slope - exact_slope).abs().max() < NATIVE_GELU_SLOPE


@pytest.mark.each_isa
@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh", "silu", "relu"])
@pytest.mark.parametrize("value", [float("-inf"), float("inf")])
def test_infinity_before_an_activation(value: float, activation: str) -> None:
    """GELU and SiLU of -infinity are NaN in PyTorch (-infinity times 0), ReLU of it is 0."""
    description = MBConvDescription(
        pre_norm=None, expand_norm=None, depthwise_norm=None, expand_activation=activation
    )
    case = Case(description, in_channels=1, wide_channels=1, out_channels=1)
    parameters = make_parameters(case, torch.float32)._replace(expand_weight=torch.ones(1, 1))
    x = torch.zeros(1, 1, 8, 8)
    x[..., 4, 4] = value
    exact = map_tensors(parameters, torch.Tensor.double)
    expected = evaluate("reference", x.double(), exact, description)
    actual = evaluate("cpu", x, parameters, description)
    assert torch.equal(actual.isnan(), expected.isnan())
    assert torch.equal(actual.isinf(), expected.isinf())


def test_results_do_not_depend_on_the_schedule() -> None:
    case = Case(wide_channels=300)
    parameters = make_parameters(case, torch.float32)
    x = torch.randn(3, 6, 20, 20)
    torch.set_num_threads(4)
    try:
        runs = [evaluate("cpu", x, parameters, case.description) for _ in range(5)]
    finally:
        torch.set_num_threads(1)
    assert all(torch.equal(runs[0], other) for other in runs[1:])


def check_training(x: Tensor, case: Case, training: bool = True, **options) -> None:
    """Output, gradients and running statistics in float32 are close to those in float64."""
    parameters = map_tensors(
        make_parameters(case),
        lambda tensor: tensor.float().double() if tensor.is_floating_point() else tensor,
    )
    scale = torch.rand(x.shape[0]) if case.description.residual else None
    x = x.float()
    with use_backend("reference"):
        wide_scale = None if scale is None else scale.double()
        expected = run(
            x.double(),
            parameters,
            case.description,
            training=training,
            drop_path_scale=wide_scale,
        )
    with use_backend("cpu"), warnings.catch_warnings():
        warnings.simplefilter("error", FallbackWarning)
        actual = run(
            x,
            parameters,
            case.description,
            torch.float32,
            training=training,
            drop_path_scale=scale,
            **options,
        )
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        tolerance = BACKEND_OUTPUT if name == "output" else BACKEND_GRADIENT
        if value.abs().max() < 1e-9:  # zero but for rounding
            assert actual[name].abs().max() < BACKEND_ZERO_GRADIENT, name
        else:
            assert_close(actual[name], value, tolerance[torch.float32], name)


@pytest.mark.parametrize("recompute", ["none", "expand", "block"])
@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
@pytest.mark.parametrize("case", COVERED.values(), ids=COVERED)
def test_gradients_of_every_covered_choice(case: Case, training: bool, recompute: str) -> None:
    x = torch.randn(3, case.in_channels, 7, 6) + 1
    check_training(x, case, training, recompute=recompute)


@pytest.mark.parametrize("recompute", ["none", "expand", "block"])
@pytest.mark.parametrize("frozen", [True, False])
def test_gradients_of_a_norm_after_a_strided_block(frozen: bool, recompute: str) -> None:
    description = MBConvDescription(
        stride=2,
        pool=Pool(kernel_size=3),
        squeeze_excite=SqueezeExcite(),
        project_norm=Norm(eps=1e-5, momentum=0.1, unbiased=True, frozen=frozen),
    )
    case = Case(description, out_channels=8, shortcut_conv=True)
    check_training(torch.randn(3, 6, 7, 6) + 1, case, recompute=recompute)


@pytest.mark.each_isa
# A single channel is left out: behind a batch norm its weight's gradient is but a trace of eps.
@pytest.mark.parametrize("channels", CHANNELS[1:])
@pytest.mark.parametrize(
    "description", [MBConvDescription(), STRIDE_2, GATED], ids=["1", "2", "se"]
)
def test_gradients_with_any_number_of_channels(
    channels: tuple[int, int, int], description: MBConvDescription
) -> None:
    case = Case(description, *channels, shortcut_conv=True)
    check_training(torch.randn(4, channels[0], 9, 10).to(memory_format=torch.channels_last), case)


@pytest.mark.parametrize("size", [(2, 1), (1, 7), (41, 5), (64, 33), (3, 200)])
@pytest.mark.parametrize(
    "description", [MBConvDescription(), STRIDE_2, GATED], ids=["1", "2", "se"]
)
def test_gradients_on_any_map(size: tuple[int, int], description: MBConvDescription) -> None:
    check_training(torch.randn(3, 6, *size), Case(description, wide_channels=70))


@pytest.mark.each_isa
@pytest.mark.parametrize("padding", [(0, 0, 0, 0), (2, 0, 1, 3), (0, 5, 4, 0), (3, 1, 3, 1)])
@pytest.mark.parametrize("stride", [1, 2])
def test_gradients_with_any_padding(padding: tuple[int, int, int, int], stride: int) -> None:
    description = MBConvDescription(stride=stride, padding=padding, residual=False)
    check_training(torch.randn(2, 6, 9, 8), Case(description))


# Squeeze-excite holds small products by stock PyTorch, whose order may follow the thread count.
@pytest.mark.parametrize(
    "description, counts",
    [(MBConvDescription(), (1, 2, 4, 4)), (STRIDE_2, (1, 3, 4)), (GATED, (4, 4, 4))],
    ids=["1", "2", "se"],
)
def test_gradients_do_not_depend_on_the_schedule(
    description: MBConvDescription, counts: tuple[int, ...]
) -> None:
    case = Case(description, wide_channels=140)
    parameters = make_parameters(case, torch.float32)
    x = torch.randn(5, 6, 20, 19)
    results = []
    for threads in counts:
        torch.set_num_threads(threads)
        try:
            with use_backend("cpu"):
                results.append(run(x, parameters, description, training=True))
        finally:
            torch.set_num_threads(1)
    for name in ("output", "expand_weight", "depthwise_weight", "project_weight", "x"):
        assert all(torch.equal(results[0][name], other[name]) for other in results[1:]), name


@pytest.mark.parametrize("ratio", [1e2, 1e4])
def test_statistics_of_data_far_from_zero(ratio: float) -> None:
    """Mean/std of `ratio`: as close to float64 as what rounding x itself leaves."""
    case = Case()
    parameters = make_parameters(case, torch.float32)
    x = torch.randn(4, 6, 16, 16) + ratio
    exact = map_tensors(
        parameters, lambda tensor: tensor.double() if tensor.is_floating_point() else tensor.clone()
    )
    with torch.no_grad(), use_backend("reference"):
        expected = mbconv(x.double(), exact, case.description, training=True)
    with torch.no_grad(), use_backend("cpu"):
        actual = mbconv(x, parameters, case.description, training=True)
    shortcut = x.double()
    assert relative_error(actual.double() - shortcut, expected - shortcut) < 1e-6 * ratio


def test_recompute_decides_what_is_saved() -> None:
    """In floats per pixel: x, E per wide tensor, and little else."""
    case = Case(in_channels=16, wide_channels=64, out_channels=16)
    parameters = make_parameters(case, torch.float32)
    parameters.expand_weight.requires_grad_()
    x = torch.randn(4, 16, 16, 16).to(memory_format=torch.channels_last)
    for recompute, expected in (("none", 16 + 128), ("expand", 16 + 64), ("block", 16)):
        saved: list[int] = []

        def count(tensor: Tensor, saved: list[int] = saved) -> Tensor:
            saved.append(tensor.numel())
            return tensor

        hooks = torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor)
        with use_backend("cpu"), hooks:
            mbconv(x, parameters, case.description, training=True, recompute=recompute)
        weights = sum(tensor.numel() for tensor in flatten(parameters)[0] if tensor is not None)
        per_pixel = (sum(saved) - weights) / (4 * 16 * 16)
        assert expected <= per_pixel < expected + 1


def test_what_is_not_covered_falls_back_in_silence_unless_asked_for() -> None:
    parameters = make_parameters(Case())
    x = torch.randn(2, 6, 8, 8, dtype=torch.float64)
    with warnings.catch_warnings():
        warnings.simplefilter("error", FallbackWarning)
        mbconv(x, parameters, MBConvDescription(), training=True)
    with use_backend("cpu"), pytest.warns(FallbackWarning, match="dtype torch.float64"):
        mbconv(x, parameters, MBConvDescription(), training=True)


@pytest.mark.parametrize(
    "description",
    [MBConvDescription(), GATED, MBConvDescription(project_norm=Norm())],
    ids=["plain", "se", "project_norm"],
)
def test_fake_results_have_the_shapes_of_real_ones(description: MBConvDescription) -> None:
    """torch.compile sees the kernels through their fakes."""
    case = Case(description, wide_channels=70)
    parameters = make_parameters(case, torch.float32)
    x = torch.randn(3, 6, 9, 8)
    for frozen in (False, True):
        resolved = resolve_frozen(description, parameters, training=not frozen)
        level = "block" if frozen else "none"
        real = cpu_backend.forward(x, parameters, resolved, level, None, None, {})
        needed = frozenset(("x", *PARAMETER_NAMES))
        arguments = (parameters, resolved, level, None, None)
        grad = torch.randn_like(real.output)
        gradients = cpu_backend.backward(grad, x, *arguments, real.saved, needed)
        with FakeTensorMode() as mode:
            convert = mode.from_tensor
            fake_arguments = (map_tensors(parameters, convert), resolved, level, None, None)
            fake = cpu_backend.forward(convert(x), *fake_arguments, {})
            fake_gradients = cpu_backend.backward(
                convert(grad), convert(x), *fake_arguments, fake.saved, needed
            )
        assert fake.output.shape == real.output.shape
        assert fake.output.stride() == real.output.stride()
        assert [t.shape for t in fake.saved] == [t.shape for t in real.saved]
        assert {n: t.shape for n, t in fake_gradients.items()} == {
            n: t.shape for n, t in gradients.items()
        }
