"""The Triton kernels of `mbconv` against the reference in float64.

Maps are small: the interpreter takes a tenth of a second per program.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable

import pytest
import torch
from support.mbconv_cases import CASES, Case, make_parameters, map_tensors, run
from support.mbconv_passes import training_passes, wide_crossings
from support.sample_independence import check_samples_never_mix
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
from moat_kernels.functional import MBConvDescription, MBConvParameters, Pool, SqueezeExcite, mbconv
from moat_kernels.ops.common import backends
from moat_kernels.ops.mbconv.description import NORMS, flatten
from moat_kernels.ops.mbconv.running_statistics import count_values, list_updated
from moat_kernels.ops.mbconv.triton import backend as triton_backend
from moat_kernels.ops.mbconv.triton import launch_table as triton_launch

pytest.importorskip("triton")

from moat_kernels.ops.mbconv.triton.kernels.shortcut import BLOCK_POOLED, BLOCK_POOLED_C
from moat_kernels.ops.mbconv.triton.launch_table import GemmBlocks, StencilBlocks
from moat_kernels.ops.triton_support.choice import choosing

FEW_ROWS, MANY_ROWS = (2, 7, 6), (2, 7, 8)
STRIDE_2 = MBConvDescription(stride=2, pool=Pool(kernel_size=3))
GATED = MBConvDescription(squeeze_excite=SqueezeExcite())


def to(parameters: MBConvParameters, device: str, dtype: torch.dtype) -> MBConvParameters:
    return map_tensors(
        parameters,
        lambda tensor: tensor.to(device, dtype if tensor.is_floating_point() else None),
    )


def covered(case: Case) -> bool:
    parameters = make_parameters(case, torch.float32)
    x = torch.randn(1, case.in_channels, 8, 8)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(triton_backend, "unsupported_tensor", lambda _: "")
        return not triton_backend.unsupported(x, parameters, case.description)


COVERED = {name: case for name, case in CASES.items() if covered(case)}


def run_all(
    backend: str,
    x: Tensor,
    case: Case,
    parameters: MBConvParameters,
    dtype: torch.dtype,
    **options,
) -> dict[str, Tensor]:
    """`run`, with a drop path where the case allows it; falling back is an error."""
    if case.description.residual:
        scale = torch.linspace(0, 2, len(x), dtype=torch.float64)
        options["drop_path_scale"] = scale.to(x.device, dtype)
    with use_backend(backend), warnings.catch_warnings():
        warnings.simplefilter("error", FallbackWarning)
        return run(x, parameters, case.description, dtype, **options)


def check(shape: tuple[int, int, int], case: Case, device: str, **options) -> None:
    """One training step (or evaluation) in float32 is close to the reference in float64."""
    parameters = to(make_parameters(case), device, torch.float64)
    x = torch.randn(shape[0], case.in_channels, *shape[1:], dtype=torch.float64).to(device) + 1
    recompute = options.pop("recompute", "none")
    expected = run_all("reference", x, case, parameters, torch.float64, **options)
    actual = run_all("triton", x, case, parameters, torch.float32, recompute=recompute, **options)
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        tolerance = BACKEND_OUTPUT if name == "output" else BACKEND_GRADIENT
        if value.abs().max() < 1e-9:
            assert actual[name].abs().max() < BACKEND_ZERO_GRADIENT, name
        else:
            assert_close(actual[name], value, tolerance[torch.float32], name)


@pytest.mark.oldest_triton
@pytest.mark.parametrize("case", COVERED.values(), ids=COVERED)
def test_every_covered_choice(case: Case, device: str) -> None:
    check(MANY_ROWS, case, device, training=True)


@pytest.mark.parametrize("description", [STRIDE_2, GATED], ids=["2", "se"])
def test_products_as_small_as_a_weight_in_larger_tiles(
    description: MBConvDescription, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those of wide blocks."""
    assert (triton_launch.weight_tile(24, 8), triton_launch.weight_tile(3072, 768)) == (32, 64)
    monkeypatch.setattr(triton_launch, "_PROGRAMS", 1)
    assert triton_launch.weight_tile(24, 8) == 64
    check(FEW_ROWS, Case(description), device, training=True)


@pytest.mark.parametrize("recompute", ["expand", "block"])
@pytest.mark.parametrize("shape", [FEW_ROWS, MANY_ROWS], ids=str)
def test_recomputing(recompute: str, shape: tuple[int, int, int], device: str) -> None:
    check(shape, Case(GATED), device, training=True, recompute=recompute)


@pytest.mark.oldest_triton
@pytest.mark.parametrize("description", [STRIDE_2, GATED], ids=["2", "se"])
def test_evaluation(description: MBConvDescription, device: str) -> None:
    """Without saving anything (the kernels of inference), and the gradient recomputed after it."""
    check(FEW_ROWS, Case(description), device, training=False, recompute="block")


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("projected", [True, False], ids=["projected", "pool alone"])
@pytest.mark.parametrize("gated", [False, True], ids=["plain", "se"])
def test_a_shortcut_of_maps_of_even_sizes(
    gated: bool, projected: bool, training: bool, device: str
) -> None:
    """Whose pool is a part of other launches: in more than one tile along both axes."""
    gate = SqueezeExcite() if gated else None
    description = MBConvDescription(stride=2, pool=Pool(), squeeze_excite=gate)
    channels = BLOCK_POOLED_C + 6
    out_channels = 20 if projected else channels
    assert BLOCK_POOLED < 2 * 3 * 7
    case = Case(description, channels, 24, out_channels, shortcut_conv=projected)
    recompute = "none" if training else "block"
    check((2, 6, 14), case, device, training=training, recompute=recompute)


@pytest.mark.parametrize(("stride", "gated"), [(1, False), (2, True)], ids=["1", "2, se"])
def test_more_than_one_tile_along_every_axis(
    stride: int, gated: bool, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With tiles small enough for few steps of the interpreter."""
    small = {
        GemmBlocks: GemmBlocks(16, 16, 16, 4, 1),
        StencilBlocks: StencilBlocks(4, 16, 2, 4),
    }
    monkeypatch.setattr(triton_launch, "_REDUCTION_PROGRAMS", 8)
    gate = SqueezeExcite() if gated else None
    padding = (2, 0, 1, 3)
    description = MBConvDescription(
        stride=stride, padding=padding, residual=False, squeeze_excite=gate
    )
    with (
        choosing(lambda _, static: small.get(type(static), static)),
        torch.autograd.set_multithreading_enabled(False),
    ):
        check((2, 5, 6), Case(description, 17, 20, 18), device, training=True)
        check((2, 5, 6), Case(description, 3, 20, 18), device, training=True)
        # Whole tiles alone, which are compiled without masks.
        check((2, 4, 8), Case(description, 3, 32, 18), device, training=True)


@pytest.mark.parametrize("shape", [(1, 1, 1), (3, 2, 1), (1, 1, 9)], ids=str)
def test_small_maps(shape: tuple[int, int, int], device: str) -> None:
    check(shape, Case(), device, training=False)


@pytest.mark.oldest_triton
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    ("name", "shape", "options"),
    [
        ("stride 1", FEW_ROWS, {"training": True}),
        ("stride 1", MANY_ROWS, {"training": True}),
        ("stride 1", (1, 5, 3), {"training": True, "recompute": "block"}),
        ("stride 2, pool 2, projected", FEW_ROWS, {"training": True}),
        ("squeeze-excite", MANY_ROWS, {"training": True}),
        # Every norm folded into the weights: the kernels of inference.
        ("squeeze-excite", FEW_ROWS, {"training": False, "recompute": "block"}),
    ],
    ids=str,
)
def test_low_precision_is_as_close_to_float64_as_stock_modules(
    name: str,
    shape: tuple[int, int, int],
    options: dict[str, object],
    dtype: torch.dtype,
    device: str,
) -> None:
    case = CASES[name]
    # Values that the low precision holds exactly, so that only the computation is judged.
    parameters = to(to(make_parameters(case), device, dtype), device, torch.float64)
    x = torch.randn(shape[0], case.in_channels, *shape[1:]).to(device, dtype).double()
    exact = run_all("reference", x, case, parameters, torch.float64, **options)
    stock = run_all("reference", x, case, parameters, dtype, **options)
    fused = run_all("triton", x, case, parameters, dtype, **options)
    for key, value in exact.items():
        assert fused[key].dtype == stock[key].dtype, key
        if value.abs().max() < 1e-9:
            continue
        allowed = LOW_PRECISION_FACTOR * relative_error(stock[key], value)
        assert_close(fused[key], value, allowed + torch.finfo(dtype).eps, key)


def test_correlated_channels_are_as_close_to_float64_as_stock_modules(device: str) -> None:
    """Nearly one signal in all channels, so that differences of them cancel in z1."""
    case = Case(in_channels=16, wide_channels=32, out_channels=16, biases=False)
    parameters = to(to(make_parameters(case), device, torch.bfloat16), device, torch.float64)
    common = torch.randn(2, 1, 12, 12)
    x = (common + 0.03 * torch.randn(2, 16, 12, 12)).to(device, torch.bfloat16).double()
    exact = run_all("reference", x, case, parameters, torch.float64, training=True)
    stock = run_all("reference", x, case, parameters, torch.bfloat16, training=True)
    fused = run_all("triton", x, case, parameters, torch.bfloat16, training=True)
    for key, value in exact.items():
        if value.abs().max() > 1e-9:
            allowed = LOW_PRECISION_FACTOR * relative_error(stock[key], value)
            assert_close(fused[key], value, allowed + torch.finfo(torch.bfloat16).eps, key)


def test_autocast(device: str) -> None:
    """Convolutions in bfloat16 of a float32 x far from zero: no further off than stock."""
    case = CASES["stride 1"]
    parameters = to(make_parameters(case), device, torch.float32)
    x = torch.randn(2, case.in_channels, 7, 8).to(device) + 20
    exact = run_all("reference", x, case, parameters, torch.float64, training=True)
    with torch.autocast(device, torch.bfloat16):
        stock = run_all("reference", x, case, parameters, torch.float32, training=True)
        fused = run_all("triton", x, case, parameters, torch.float32, training=True)
    for key, value in exact.items():
        assert fused[key].dtype == stock[key].dtype, key
        if value.abs().max() > 1e-9:
            allowed = LOW_PRECISION_FACTOR * relative_error(stock[key], value)
            assert_close(fused[key], value, allowed + torch.finfo(torch.bfloat16).eps, key)


@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
def test_empty_batch(training: bool, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another backend's: with a warning where this one was asked for."""
    monkeypatch.setattr(backends, "_warned", set())
    case = CASES["stride 2, pool 3"]
    parameters = to(make_parameters(case), device, torch.float32)
    x = torch.randn(0, case.in_channels, 8, 8).to(device)
    reason = "'triton' does not cover an empty batch"
    with use_backend("triton"), pytest.warns(FallbackWarning, match=reason):
        results = run(x, parameters, case.description, torch.float32, training=training)
    assert results["output"].shape == (0, case.out_channels, 4, 4)


@pytest.mark.oldest_triton
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_and_inf_reach_the_same_elements(value: float, device: str) -> None:
    case = CASES["stride 1"]
    parameters = to(make_parameters(case), device, torch.float32)
    x = torch.randn(2, case.in_channels, 7, 8).to(device)
    x[1, 2, 3, 4] = value
    outputs = []
    for backend in ("reference", "triton"):
        with use_backend(backend), torch.no_grad():
            outputs.append(mbconv(x, parameters, case.description))
    assert torch.equal(outputs[0].isfinite(), outputs[1].isfinite())
    assert not outputs[0].isfinite().all()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("stride", [1, 2])
def test_nan_and_inf_in_the_gradient_reach_the_same_elements(
    value: float, stride: int, device: str
) -> None:
    """Backward with fixed statistics: one pixel of one image reaches its neighbours only."""
    case = Case(MBConvDescription(stride=stride, residual=False))
    parameters = to(make_parameters(case), device, torch.float32)
    x = torch.randn(2, case.in_channels, 9, 7).to(device)
    cotangent = torch.randn(2, case.out_channels, -(-9 // stride), -(-7 // stride)).to(device)
    cotangent[1, 2, 3, 1] = value
    expected, actual = (
        run_all(backend, x, case, parameters, torch.float32, cotangent=cotangent)
        for backend in ("reference", "triton")
    )
    for name, gradient in expected.items():
        assert torch.equal(actual[name].isfinite(), gradient.isfinite()), name
    assert 0 < expected["x"].isfinite().double().mean() < 1


@pytest.mark.parametrize("recompute", ["none", "expand", "block"])
def test_samples_never_mix(recompute: str, device: str) -> None:
    check_samples_never_mix("triton", Case(GATED), (3, 5, 6), device, recompute=recompute)


def test_gradients_of_any_memory_format_and_strides(device: str) -> None:
    case = CASES["stride 2, pool 2, projected"]
    parameters = to(make_parameters(case), device, torch.float32)
    x = torch.randn(2, case.in_channels, 7, 8).to(device)
    plain = torch.randn(2, case.out_channels, 4, 4).to(device)
    sliced = torch.randn(2, case.out_channels, 8, 5).to(device)
    sliced[:, :, ::2, 1:] = plain
    cotangents = [plain, plain.to(memory_format=torch.channels_last), sliced[:, :, ::2, 1:]]
    gradients = []
    for memory_format in (torch.contiguous_format, torch.channels_last):
        for cotangent in cotangents:
            leaf = x.clone(memory_format=memory_format).requires_grad_()
            with use_backend("triton"):
                output = mbconv(leaf, parameters, case.description, training=True)
            gradients += torch.autograd.grad(output, leaf, cotangent)
            assert gradients[-1].is_contiguous(memory_format=memory_format)
    assert all(torch.equal(gradient, gradients[0]) for gradient in gradients)


def test_memory_format_and_strides_of_the_input_do_not_matter(device: str) -> None:
    case = CASES["stride 2, pool 2, projected"]
    parameters = to(make_parameters(case), device, torch.float32)
    plain = torch.randn(2, case.in_channels, 7, 8).to(device)
    sliced = torch.randn(2, 2 * case.in_channels, 9, 16).to(device)
    sliced[:, ::2, 1:8, ::2] = plain
    inputs = {
        "plain": plain,
        "channels_last": plain.to(memory_format=torch.channels_last),
        "sliced": sliced[:, ::2, 1:8, ::2],
    }
    with use_backend("triton"), torch.no_grad():
        outputs = {name: mbconv(x, parameters, case.description) for name, x in inputs.items()}
    assert outputs["plain"].is_contiguous() and outputs["sliced"].is_contiguous()
    assert outputs["channels_last"].is_contiguous(memory_format=torch.channels_last)
    for name, output in outputs.items():
        assert torch.equal(output, outputs["plain"]), name


def test_running_statistics_wider_than_the_kernels_keep_their_digits(device: str) -> None:
    """In float64, beside float32 weights: updated by PyTorch, from moments in float32."""
    case = CASES["stride 1"]
    parameters = to(make_parameters(case), device, torch.float32)
    norm = parameters.depthwise_norm
    wide = norm._replace(running_mean=norm.running_mean.double() + 1e9)
    x = torch.randn(2, case.in_channels, 7, 8).to(device)
    with use_backend("triton"):
        mbconv(x, parameters._replace(depthwise_norm=wide), case.description, training=True)
        mbconv(x, parameters, case.description, training=True)
    momentum = case.description.depthwise_norm.momentum
    shift = (wide.running_mean - norm.running_mean.double()) / (1 - momentum)
    assert_close(shift, torch.full_like(shift, 1e9), 1e-14)


@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
def test_vectors_of_any_strides(training: bool, device: str) -> None:
    """Norms, biases and running statistics with gaps in memory."""

    def with_gaps(tensor: Tensor) -> Tensor:
        if tensor.dim() != 1:
            return tensor.clone()
        return torch.stack((tensor, tensor * 0 - 7), 1)[:, 0]

    case = CASES["squeeze-excite"]
    dense = to(make_parameters(case), device, torch.float32)
    x = torch.randn(2, case.in_channels, 7, 8).to(device)

    def step(function: Callable[[Tensor], Tensor]) -> list[Tensor]:
        parameters = map_tensors(dense, function)
        leaves, running = flatten(parameters)
        leaves = [leaf.requires_grad_() for leaf in leaves if leaf is not None]
        with use_backend("triton"):
            output = mbconv(x, parameters, case.description, training=training)
        gradients = torch.autograd.grad(output.square().sum(), leaves)
        return [output, *gradients, *(tensor for tensor in running if tensor is not None)]

    assert not with_gaps(dense.pre_norm.running_mean).is_contiguous()
    for spaced, expected in zip(step(with_gaps), step(torch.clone), strict=True):
        assert_close(spaced, expected, 1e-6)


@pytest.mark.parametrize(
    ("recompute", "forward", "backward"), [("none", 4, 9), ("expand", 4, 10), ("block", 4, 12)]
)
@pytest.mark.parametrize("gated", [False, True])
def test_how_often_wide_tensors_cross_memory(
    recompute: str, forward: int, backward: int, gated: bool
) -> None:
    """Stock PyTorch: 14 times forward, 24 backward. A gate's mean needs one more read, forward.

    Not seen here, without a gate: the product of the weight's gradient, by BLAS, reads one more
    (tests/plan/test_launches.py).
    """
    case = Case(GATED if gated else MBConvDescription(), 16, 64, 16)
    passes = training_passes(case, torch.bfloat16, recompute, 8, 32, 32)
    assert [wide_crossings(each, 64) for each in passes] == [forward + gated, backward]


def test_what_a_projected_shortcut_moves() -> None:
    """Its pooled rows, written and read once each way; nothing that is as wide as the output."""
    case = Case(MBConvDescription(stride=2, pool=Pool()), 16, 64, 32, shortcut_conv=True)
    passes = training_passes(case, torch.bfloat16, "none", 8, 32, 32)
    pooled, output = (8 * 16 * 16, 16), (8 * 16 * 16, 32)

    def moving(shape: tuple[int, int], side: str) -> list[list[str]]:
        return [
            [one.kernel for one in each if shape in [map.shape for map in getattr(one, side)]]
            for each in passes
        ]

    assert moving(pooled, "writes") == [["fold_weights_kernel"], ["norm_gradient_kernel"]]
    assert moving(pooled, "reads")[0] == ["project_kernel"]
    assert "expand_products_kernel" in moving(pooled, "reads")[1]
    assert moving(output, "writes") == [["project_kernel"], []]
    assert moving(output, "reads")[0] == []


def test_products_of_each_pass() -> None:
    """Two products of 2 N C E each way that a product goes, and small ones of C x C.

    That of rows and correction is two in bfloat16, of its two halves. The one missing is BLAS'.
    """
    case = Case(MBConvDescription(), 16, 64, 16)
    forward, backward = training_passes(case, torch.bfloat16, "none", 8, 32, 32)
    rows = 8 * 32 * 32
    product = 2 * rows * 16 * 64
    assert {one.kernel: (one.flops, one.arithmetic) for one in forward + backward} == {
        "row_moments_kernel": (0, "float32"),
        "fold_weights_kernel": (0, "float32"),
        "norm_kernel": (0, "float32"),
        "norm_gradient_kernel": (0, "float32"),
        "expand_kernel": (product, "bfloat16"),
        "depthwise_kernel": (18 * rows * 64, "float32"),
        "project_kernel": (product, "bfloat16"),
        "project_input_kernel": (product, "bfloat16"),
        "depthwise_backward_kernel": (36 * rows * 64, "float32"),
        "expand_products_kernel": (product + 2 * rows * 16 * 16, "bfloat16"),
        "fold_gradient_kernel": (2 * 64 * 16 * 16, "float32"),
        "correction_kernel": (2 * 64 * 16 * 16, "float32"),
        "expand_input_kernel": (product + 2 * 2 * rows * 16 * 16, "bfloat16"),
    }


@pytest.mark.parametrize("name", ["x", "expand_weight", "shortcut_bias"])
def test_only_the_gradient_that_is_needed(name: str, device: str) -> None:
    case = CASES["stride 2, pool 2, projected"]
    parameters = to(make_parameters(case), device, torch.float32)
    x = torch.randn(2, case.in_channels, 7, 8).to(device)
    leaf = x if name == "x" else getattr(parameters, name)
    leaf.requires_grad_()
    gradients = []
    for backend in ("reference", "triton"):
        with use_backend(backend):
            output = mbconv(x, parameters, case.description, training=True)
        (gradient,) = torch.autograd.grad(output.square().sum(), leaf)
        gradients.append(gradient)
    assert_close(gradients[1], gradients[0], BACKEND_GRADIENT[torch.float32])


def test_the_same_bits_every_time(device: str) -> None:
    case = Case(GATED)
    parameters = to(make_parameters(case), device, torch.float32)
    x = torch.randn(2, 6, 7, 8).to(device)
    first, second = (
        run_all("triton", x, case, parameters, torch.float32, training=True) for _ in range(2)
    )
    for name, value in first.items():
        assert torch.equal(value, second[name]), name


@pytest.mark.parametrize("name", ["squeeze-excite", "frozen norms"])
def test_opcheck(name: str, device: str) -> None:
    """The operator's schema holds, and fake tensors go through it as real ones do."""
    case = CASES[name]
    parameters = to(make_parameters(case), device, torch.float32)
    tensors, running = flatten(parameters)
    x = torch.randn(2, case.in_channels, 7, 8).to(device)
    counts = count_values(x, parameters, case.description)
    kept = [None if NORMS[i // 2] in counts else tensor for i, tensor in enumerate(running)]
    updated, places = list_updated(parameters, counts)
    settings = (None, case.description.encode(), places, None, "expand", "triton")
    torch.library.opcheck(
        torch.ops.moat_kernels.mbconv_forward.default,
        (x, tensors, kept, updated, *settings),
        test_utils=("test_schema", "test_faketensor"),
    )


def test_a_map_beyond_32_bit_offsets_is_not_covered() -> None:
    with torch.device("meta"):
        parameters = make_parameters(Case(wide_channels=2**15), torch.float32)
        x = torch.empty(1, 6, 256, 256)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(triton_backend, "unsupported_tensor", lambda _: "")
        assert triton_backend.unsupported(x[..., 1:], parameters, MBConvDescription()) == ""
        reason = triton_backend.unsupported(x, parameters, MBConvDescription())
        assert "elements or more" in reason


def test_what_is_not_covered_says_why(device: str) -> None:
    assert CASES.keys() - COVERED.keys() >= {"kernel 5", "depthwise first", "pre_activation"}
    case = CASES["kernel 5"]
    parameters = to(make_parameters(case), device, torch.float32)
    x = torch.randn(1, case.in_channels, 8, 8).to(device)
    with use_backend("triton"), pytest.warns(FallbackWarning, match="a depthwise kernel of"):
        mbconv(x, parameters, case.description)
