"""`functional.mbconv`: every option, backend and dtype against the reference in float64."""

from __future__ import annotations

import dataclasses
import itertools

import pytest
import torch
from support.mbconv_cases import CASES, Case, copy_parameters, make_parameters, map_tensors, run
from support.tolerances import (
    BACKEND_GRADIENT,
    BACKEND_OUTPUT,
    BACKEND_ZERO_GRADIENT,
    LOW_PRECISION_FACTOR,
    assert_close,
    relative_error,
)

from moat_kernels import use_backend
from moat_kernels.functional import MBConvDescription, Norm, Pool, mbconv
from moat_kernels.ops.mbconv import dispatch
from moat_kernels.ops.mbconv.description import flatten
from moat_kernels.ops.mbconv.running_statistics import list_updated

RECOMPUTE_LEVELS = ["none", "expand", "block"]
# 84 rows measure expand_norm directly (6 channels), 504 rows by covariance.
MAPS = [(2, 7, 6), (9, 7, 8)]


def check(actual: dict, expected: dict, dtype: torch.dtype = torch.float64) -> None:
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        tolerance = BACKEND_OUTPUT if name == "output" else BACKEND_GRADIENT
        if value is None:
            assert actual[name] is None, name
        elif value.numel() and value.abs().max() < 1e-9:
            assert actual[name].abs().max() < BACKEND_ZERO_GRADIENT, name
        else:
            assert_close(actual[name], value, tolerance[dtype], name)


@pytest.mark.parametrize("recompute", RECOMPUTE_LEVELS)
@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_torch_equals_reference(case, training: bool, recompute: str) -> None:
    description, parameters = case.description, make_parameters(case)
    for (batch, height, width), channels_last in itertools.product(MAPS, (False, True)):
        x = torch.randn(batch, case.in_channels, height, width, dtype=torch.float64) + 1
        if channels_last:
            x = x.to(memory_format=torch.channels_last)
        scale = torch.rand(batch, dtype=torch.float64) if description.residual else None
        options = {"training": training, "drop_path_scale": scale}
        with use_backend("reference"):
            expected = run(x, parameters, description, **options)
        with use_backend("torch"):
            actual = run(x, parameters, description, recompute=recompute, **options)
        check(actual, expected)


@pytest.mark.parametrize("backend", ["reference", "torch"])
@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_gradcheck(case, training: bool, backend: str) -> None:
    parameters = copy_parameters(make_parameters(case))
    tensors = [tensor for tensor in flatten(parameters)[0] if tensor is not None]
    # 30 or 210 rows of 6 channels: the direct and the folded statistics
    for batch in (1, 7):
        x = torch.randn(batch, case.in_channels, 5, 6, dtype=torch.float64, requires_grad=True)
        with use_backend(backend):
            assert torch.autograd.gradcheck(
                lambda x, *_: mbconv(
                    x,
                    map_tensors(parameters, lambda tensor: tensor),
                    case.description,
                    training=training,
                ),
                (x, *tensors),
                fast_mode=True,
            )


@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
@pytest.mark.parametrize("name", ["stride 1", "stride 2, pool 2, projected", "squeeze-excite"])
def test_float32(name: str, training: bool) -> None:
    case = CASES[name]
    parameters = make_parameters(case)
    for batch, height, width in MAPS:
        x = torch.randn(batch, case.in_channels, height, width, dtype=torch.float64)
        with use_backend("reference"):
            expected = run(x, parameters, case.description, training=training)
        with use_backend("torch"):
            actual = run(x, parameters, case.description, torch.float32, training=training)
        check(actual, expected, torch.float32)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ["stride 1", "stride 2, pool 2, projected", "squeeze-excite"])
def test_low_precision_is_as_close_to_float64_as_stock_modules(
    name: str, dtype: torch.dtype
) -> None:
    case = CASES[name]
    # Values that the low precision holds exactly, so that only the computation is judged.
    parameters = map_tensors(
        make_parameters(case), lambda t: t.to(dtype).double() if t.is_floating_point() else t
    )
    x = torch.randn(9, case.in_channels, 7, 8).to(dtype).double()
    with use_backend("reference"):
        exact = run(x, parameters, case.description, training=True)
        stock = run(x, parameters, case.description, dtype, training=True)
    with use_backend("torch"):
        fused = run(x, parameters, case.description, dtype, training=True)
    for key, value in exact.items():
        assert fused[key].dtype == stock[key].dtype, key
        # A gradient that is zero in exact arithmetic is noise in both; it has no relative error.
        if value.abs().max() < 1e-9:
            continue
        # One rounding to `dtype` of the result itself is granted beside the factor.
        allowed = LOW_PRECISION_FACTOR * relative_error(stock[key], value)
        allowed += torch.finfo(dtype).eps
        assert_close(fused[key], value, allowed, key)


@pytest.mark.parametrize("backend", ["reference", "torch"])
@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
@pytest.mark.parametrize("name", ["stride 1", "stride 2, pool 3", "squeeze-excite"])
def test_empty_batch(name: str, training: bool, backend: str) -> None:
    case = CASES[name]
    parameters = make_parameters(case)
    before = [tensor.clone() for tensor in flatten(parameters)[1] if tensor is not None]
    x = torch.randn(0, case.in_channels, 8, 8, dtype=torch.float64)
    with use_backend(backend):
        results = run(x, parameters, case.description, training=training)
        mbconv(x, parameters, case.description, training=training)
    size = 4 if case.description.stride == 2 else 8
    assert results["output"].shape == (0, case.out_channels, size, size)
    after = [tensor for tensor in flatten(parameters)[1] if tensor is not None]
    for old, new in zip(before, after, strict=True):
        assert torch.equal(old, new)


def test_one_pixel() -> None:
    case = CASES["stride 1"]
    parameters = make_parameters(case)
    x = torch.randn(1, case.in_channels, 1, 1, dtype=torch.float64)
    with use_backend("reference"):
        expected = run(x, parameters, case.description, training=False)
    with use_backend("torch"):
        actual = run(x, parameters, case.description, training=False)
    check(actual, expected)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
def test_nan_and_inf_reach_the_same_elements(training: bool, value: float) -> None:
    case = CASES["stride 1"]
    parameters = make_parameters(case)
    x = torch.randn(9, case.in_channels, 7, 8, dtype=torch.float64)
    x[1, 2, 3, 4] = value
    outputs = []
    for backend in ("reference", "torch"):
        with use_backend(backend), torch.no_grad():
            copied = copy_parameters(parameters)
            outputs.append(mbconv(x, copied, case.description, training=training))
    assert torch.equal(outputs[0].isfinite(), outputs[1].isfinite())
    assert not outputs[0].isfinite().all()


@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
def test_memory_format_and_strides_of_the_input_do_not_matter(training: bool) -> None:
    case = CASES["stride 2, pool 2, projected"]
    parameters = make_parameters(case)
    plain = torch.randn(9, case.in_channels, 7, 8, dtype=torch.float64)
    channels_last = plain.to(memory_format=torch.channels_last)
    sliced = torch.randn(9, 2 * case.in_channels, 9, 16, dtype=torch.float64)
    sliced[:, ::2, 1:8, ::2] = plain
    sliced = sliced[:, ::2, 1:8, ::2]
    outputs = {}
    for name, x in (("plain", plain), ("channels_last", channels_last), ("sliced", sliced)):
        with use_backend("torch"):
            outputs[name] = mbconv(
                x, copy_parameters(parameters), case.description, training=training
            )
        assert torch.equal(x, plain), "the input was changed"
        assert_close(outputs[name], outputs["plain"], BACKEND_OUTPUT[torch.float64], name)
    assert outputs["plain"].is_contiguous()
    assert outputs["sliced"].is_contiguous()
    assert outputs["channels_last"].is_contiguous(memory_format=torch.channels_last)


def test_only_the_gradients_that_are_needed() -> None:
    case = CASES["squeeze-excite"]
    parameters = map_tensors(make_parameters(case), torch.Tensor.detach)
    parameters.se_reduce_weight.requires_grad_()
    x = torch.randn(9, case.in_channels, 7, 8, dtype=torch.float64)
    with use_backend("torch"):
        mbconv(x, parameters, case.description, training=True).sum().backward()
    assert parameters.se_reduce_weight.grad is not None
    assert all(
        tensor is None or tensor.grad is None
        for tensor in flatten(parameters)[0]
        if tensor is not parameters.se_reduce_weight
    )


def test_unbiased_and_cumulative_running_statistics() -> None:
    norm = Norm(momentum=None, unbiased=True)
    description = MBConvDescription(pre_norm=norm)
    case = dataclasses.replace(CASES["stride 1"], description=description)
    parameters = make_parameters(case)
    parameters.pre_norm.num_batches_tracked.zero_()
    batches = torch.randn(3, 4, case.in_channels, 5, 5, dtype=torch.float64)
    for x in batches:
        mbconv(x, parameters, description, training=True)
    means = batches.mean((1, 3, 4)).mean(0)
    variances = batches.var((1, 3, 4), correction=1).mean(0)
    assert_close(parameters.pre_norm.running_mean, means, BACKEND_OUTPUT[torch.float64])
    assert_close(parameters.pre_norm.running_var, variances, BACKEND_OUTPUT[torch.float64])
    assert int(parameters.pre_norm.num_batches_tracked) == 3


def test_the_unbiased_variance_of_one_value_is_refused_where_it_is_asked_for() -> None:
    """A 2 x 2 map at stride 2 leaves four values before the stride and one after it."""
    x = torch.randn(1, 6, 2, 2, dtype=torch.float64)
    for name, refused in (("pre_norm", False), ("expand_norm", False), ("depthwise_norm", True)):
        description = MBConvDescription(stride=2, pool=Pool(), **{name: Norm(unbiased=True)})
        parameters = make_parameters(Case(description))
        if refused:
            with pytest.raises(ValueError, match="one value per channel: the unbiased variance"):
                mbconv(x, parameters, description, training=True)
        else:
            mbconv(x, parameters, description, training=True)


def test_opcheck() -> None:
    case = CASES["stride 2, pool 2, projected"]
    parameters = make_parameters(case)
    tensors, running = flatten(parameters)
    updated, places = list_updated(parameters, ["pre_norm", "expand_norm", "depthwise_norm"])
    x = torch.randn(9, case.in_channels, 7, 8, dtype=torch.float64)
    measured = [None] * len(running)
    for layout in (x, x.to(memory_format=torch.channels_last)):
        description = case.description.encode()
        for operator, arguments in (
            (
                torch.ops.moat_kernels.mbconv_forward.default,
                (measured, updated, None, description, places, None, "expand", "torch"),
            ),
            (
                torch.ops.moat_kernels.mbconv_evaluate.default,
                (running, None, description, None, "torch"),
            ),
        ):
            torch.library.opcheck(
                operator,
                (layout, tensors, *arguments),
                test_utils=("test_schema", "test_faketensor"),
            )


BAD_CALLS = {
    "x of rank 3": ({"x": torch.zeros(6, 5, 5)}, ValueError, r"x must be \[B, C, H, W\]"),
    "integer x": ({"x": torch.zeros(1, 6, 5, 5).long()}, TypeError, "x must be float64"),
    "empty map": ({"x": torch.zeros(1, 6, 0, 5)}, ValueError, "x must have H, W >= 1"),
    "channels": ({"x": torch.zeros(1, 7, 5, 5)}, ValueError, "parameters.expand_weight must have"),
    "recompute": ({"recompute": "all"}, ValueError, "recompute must be one of"),
    "scale": ({"drop_path_scale": torch.zeros(3)}, ValueError, "drop_path_scale must have shape"),
    "pool": (
        {"description": MBConvDescription(pool=Pool())},
        ValueError,
        "does not fit stride 1",
    ),
    "gate without description": (
        {"parameters": {"se_reduce_weight": torch.zeros(3, 12)}},
        ValueError,
        "se_reduce_weight must be None",
    ),
    "expand bias": (
        {"parameters": {"expand_bias": torch.zeros(11)}},
        ValueError,
        r"expand_bias must have shape \(12,\)",
    ),
    "depthwise": (
        {"parameters": {"depthwise_weight": torch.zeros(6, 1, 3, 3)}},
        ValueError,
        r"depthwise_weight must be \[12, 1, K, K\]",
    ),
    "norm without description": (
        {"description": MBConvDescription(pre_norm=None)},
        ValueError,
        "pre_norm holds tensors but",
    ),
    "no shortcut": (
        {"parameters": {"project_weight": torch.zeros(8, 12), "project_bias": None}},
        ValueError,
        "shortcut_weight is needed",
    ),
}


@pytest.mark.parametrize(("changes", "error", "message"), BAD_CALLS.values(), ids=BAD_CALLS)
def test_bad_calls_name_the_argument(changes: dict, error: type, message: str) -> None:
    case = CASES["stride 1"]
    arguments = {
        "x": torch.zeros(2, 6, 5, 5),
        "description": case.description,
        "parameters": {},
    } | changes
    parameters = make_parameters(case, torch.float32)._replace(**arguments.pop("parameters"))
    with pytest.raises(error, match=message):
        mbconv(parameters=parameters, training=True, **arguments)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: MBConvDescription(stride=0), "stride must be a positive integer"),
        (lambda: MBConvDescription(padding=(1, 1)), "padding must be 'tf_same' or four"),
        (lambda: MBConvDescription(expand_activation="elu"), "expand_activation must be one of"),
        (lambda: MBConvDescription(order="other"), "order must be one of"),
        (lambda: MBConvDescription(pool=Pool(), residual=False), "no shortcut to pool"),
        (lambda: Norm(eps=0.0), "eps must be > 0"),
        (lambda: Norm(momentum=2.0), "momentum must be None or within"),
        (lambda: Pool("median"), "kind must be one of"),
        (lambda: Pool(kernel_size=2, padding=(2, 0, 0, 0)), "smaller than its kernel_size"),
    ],
)
def test_bad_descriptions_name_the_field(make, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_descriptions_survive_encoding() -> None:
    for case in CASES.values():
        assert MBConvDescription.decode(case.description.encode()) == case.description


def test_a_checked_call_vouches_only_for_calls_like_it() -> None:
    """What is remembered of a call covers shapes, dtypes and settings, nothing less."""
    case = Case()
    parameters = make_parameters(case, torch.float32)
    x = torch.randn(2, case.in_channels, 8, 8)
    with torch.no_grad():
        mbconv(x, parameters, case.description)
        with pytest.raises(ValueError, match=r"depthwise_weight must be \["):
            transposed = parameters.expand_weight.transpose(0, 1).contiguous()
            mbconv(x, parameters._replace(expand_weight=transposed), case.description)
        with pytest.raises(ValueError, match="recompute must be one of"):
            mbconv(x, parameters, case.description, recompute="some")
        with pytest.raises(ValueError, match="project_bias must have shape"):
            mbconv(x, parameters._replace(project_bias=torch.ones(1)), case.description)
        with pytest.raises(TypeError, match="project_bias must be a tensor"):
            mbconv(x, parameters._replace(project_bias=[1.0]), case.description)
        assert mbconv(x.double(), parameters, case.description).dtype == torch.float64
    assert mbconv(x.requires_grad_(), parameters, case.description).requires_grad


def test_few_plans_are_remembered() -> None:
    case = Case()
    parameters = make_parameters(case, torch.float32)
    with torch.no_grad():
        for width in range(1, dispatch._MOST_PLANS + 10):
            dispatch.plan_call(
                torch.empty(1, 6, 1, width), parameters, case.description, False, "auto", None
            )
    assert 0 < len(dispatch._plans) <= dispatch._MOST_PLANS
