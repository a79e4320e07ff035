"""Models frozen in bfloat16, float16 and int8: as close to float64 as stock is in that dtype."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
import torch.nn.functional as F
from support.guarded_memory import guarded
from support.native import needs_extension
from support.small_model import CLASSES, make_model
from support.tolerances import (
    FOLDED_ROUNDING,
    INT8_ERROR,
    LOW_PRECISION_FACTOR,
    relative_error,
)
from torch import Tensor, nn

import moat_kernels as mk
from moat_kernels.calibration import quantization_of
from moat_kernels.frozen_modules import FrozenBlock
from moat_kernels.functional import WindowAttentionDescription
from moat_kernels.ops.frozen import (
    FrozenSequence,
    attention_half_step,
    mbconv_step,
    multiplies,
)
from moat_kernels.ops.mbconv.description import MBConvDescription, MBConvParameters

pytestmark = [
    needs_extension,
    pytest.mark.filterwarnings("ignore:freeze. this CPU does not multiply"),
]

HALVES = [torch.bfloat16, torch.float16]
SIZES = [(64, 64), (33, 47), (1, 1)]
OPTIONS = [
    {},
    {"num_classes": 0},
    {"window_size": (None, None, 3, (2, 5))},
    {"position_embedding": False, "pool_size": 3},
    {"stem_width": 20, "widths": (24, 40, 56, 80), "num_classes": 37},
    {"stem_width": 7, "widths": (5, 9, 35, 67)},
]
needs_int8 = pytest.mark.skipif(
    not multiplies(torch.int8), reason="this CPU does not multiply int8 and bfloat16"
)


def make_eval_model(**options) -> mk.MOAT:
    """In float32, with running statistics that are not those of a fresh model."""
    model = make_model(torch.float32, **options)
    return randomize_norms(model).eval()


def randomize_norms(model: nn.Module) -> nn.Module:
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean, std=0.3)
            nn.init.uniform_(module.running_var, 0.5, 2.0)
    return model


def images(*size: int) -> Tensor:
    return torch.randn(size[0], 3, *size[1:])


@torch.no_grad()
def reference(model: nn.Module, x: Tensor, dtype: torch.dtype = torch.float64) -> Tensor:
    """By stock operations in a dtype."""
    with mk.use_backend("reference"):
        return copy.deepcopy(model).to(dtype)(x.to(dtype)).double()


def assert_close_for(dtype: torch.dtype, found: Tensor, model: nn.Module, x: Tensor) -> None:
    """At most LOW_PRECISION_FACTOR times as far from float64 as stock in that dtype."""
    exact = reference(model, x)
    stock = relative_error(reference(model, x, dtype), exact)
    allowed = LOW_PRECISION_FACTOR * stock + FOLDED_ROUNDING * torch.finfo(dtype).eps
    assert relative_error(found.double(), exact) <= allowed


@pytest.mark.each_isa
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("options", OPTIONS, ids=lambda options: ", ".join(options) or "plain")
@torch.no_grad()
def test_options(options: dict, dtype: torch.dtype) -> None:
    model = make_eval_model(**options)
    frozen = mk.freeze(model, dtype)
    for size in SIZES:
        for batch in (1, 5):
            x = images(batch, *size)
            found = frozen(x)
            assert found.dtype == torch.float32
            assert_close_for(dtype, found, model, x)
            assert torch.equal(frozen(x.to(memory_format=torch.channels_last)), found)


@pytest.mark.each_isa
@pytest.mark.parametrize("dtype", HALVES)
@torch.no_grad()
def test_a_model_of_that_dtype_keeps_it(dtype: torch.dtype) -> None:
    model = make_eval_model(features_only=True).to(dtype)
    frozen = mk.freeze(model)
    x = images(2, 48, 40).to(dtype)
    for found, exact in zip(
        frozen.forward_stages(x),
        copy.deepcopy(model).double().forward_stages(x.double()),
        strict=True,
    ):
        assert found.dtype == dtype
        assert found.is_contiguous(memory_format=torch.channels_last)
        assert relative_error(found.double(), exact) < 10 * torch.finfo(dtype).eps
    with pytest.raises(TypeError, match=f"x must be {dtype} on the CPU"):
        frozen(x.float())


@pytest.mark.each_isa
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("channels", [(24, 24), (7, 13), (40, 72)])
@pytest.mark.parametrize("kind", ["mbconv", "mbconv without SE", "moat"])
@torch.no_grad()
def test_single_blocks(
    kind: str, channels: tuple[int, int], stride: int, dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    options: dict = {"stride": stride}
    if kind == "moat":
        options |= {"head_dim": 12, "window_size": 3}
        block: nn.Module = mk.FusedMOATBlock(*channels, **options)
    else:
        ratio = None if "without" in kind else 0.25
        block = mk.FusedMBConv(*channels, **options, se_ratio=ratio)
    block = randomize_norms(block).eval()
    frozen = mk.freeze(block, dtype)
    assert isinstance(frozen, FrozenBlock)
    for x in (torch.randn(2, channels[0], 9, 13), torch.randn(1, channels[0], 5, 31)):
        assert_close_for(dtype, frozen(x), block, x)


@pytest.mark.each_isa
@pytest.mark.parametrize("dtype", [*HALVES, torch.int8])
@pytest.mark.parametrize("size", [(33, 160), (5, 300), (64, 129)])
@pytest.mark.parametrize(("se_ratio", "stride"), [(None, 1), (0.25, 1), (0.25, 2)])
@torch.no_grad()
def test_wide_maps(
    se_ratio: float | None, stride: int, size: tuple[int, int], dtype: torch.dtype
) -> None:
    """A strip has two rows: below a single one there is padding only. Or columns are in parts."""
    if dtype is torch.int8 and not multiplies(dtype):
        pytest.skip("these instructions do not multiply int8 and bfloat16")
    block = randomize_norms(mk.FusedMBConv(32, 32, se_ratio=se_ratio, stride=stride)).eval()
    x = torch.randn(1, 32, *size)
    frozen = mk.freeze(block, dtype, [x] if dtype is torch.int8 else None)
    if dtype is torch.int8:
        assert relative_error(frozen(x).double(), reference(block, x)) < INT8_ERROR
    else:
        assert_close_for(dtype, frozen(x), block, x)


@pytest.mark.each_isa
@pytest.mark.parametrize("channels", [16, 24, 40])
@pytest.mark.parametrize("kind", [mk.FusedMBConv, mk.FusedMOATBlock])
@torch.no_grad()
def test_nothing_behind_the_map_is_read(kind: type[nn.Module], channels: int) -> None:
    options = {"head_dim": 8} if kind is mk.FusedMOATBlock else {"se_ratio": None}
    block = randomize_norms(kind(channels, channels, **options)).bfloat16().eval()
    x = guarded(torch.randn(1, 5, 7, channels).bfloat16()).movedim(3, 1)
    assert_close_for(torch.bfloat16, mk.freeze(block)(x), block, x)


@pytest.mark.each_isa
@pytest.mark.parametrize("head_dim", [8, 24, 32, 40, 64])
@pytest.mark.parametrize("window", [(1, 1), (3, 5), (4, 4), (1, 17), (3, 11), (7, 7), (14, 14)])
@torch.no_grad()
def test_attention_of_any_number_of_tokens(window: tuple[int, int], head_dim: int) -> None:
    """Matrix tiles of 16 tokens, which these fill or not, in several windows."""
    torch.manual_seed(0)
    block = mk.FusedMOATBlock(16, 2 * head_dim, head_dim=head_dim, window_size=window)
    frozen = mk.freeze(randomize_norms(block).eval(), torch.bfloat16)
    height, width = window
    for size in (window, (2 * height - 1, 3 * width)):
        x = torch.randn(2, 16, *size)
        assert_close_for(torch.bfloat16, frozen(x), block, x)


@pytest.mark.each_isa
@pytest.mark.parametrize("tokens", [5, 16, 20, 40])
@torch.no_grad()
def test_tokens_that_are_not_finite_stay_in_their_window(tokens: int) -> None:
    description = WindowAttentionDescription(2, 24, (1, tokens))
    weights = [torch.randn(144, 48) / 7, None, torch.randn(48, 48) / 7, None]
    table = torch.randn(2, 1, 2 * tokens - 1)
    step = attention_half_step([None, None, *weights, table], 1e-5, description, torch.bfloat16)
    sequence = FrozenSequence([step])
    x = torch.randn(1, 48, 3, tokens).contiguous(memory_format=torch.channels_last)
    (clean,) = sequence.outputs(x, [0])
    for value in (float("nan"), float("inf")):
        x[0, 5, 1, tokens // 2] = value
        (found,) = sequence.outputs(x, [0])
        assert torch.equal(found[:, :, [0, 2]], clean[:, :, [0, 2]])
        assert found[:, :, 1].isnan().all()


@pytest.mark.each_isa
@torch.no_grad()
def test_gelu_is_rounded_well() -> None:
    """An inverted bottleneck that is one GELU, for every number in bfloat16 up to 16."""
    bits = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
    x = bits.view(torch.bfloat16)
    x = x[x.abs() <= 16].view(1, 1, 1, -1)
    one = torch.ones(1, 1, 1, 1)
    middle = torch.zeros(1, 1, 3, 3)
    middle[..., 1, 1] = 1
    parameters = MBConvParameters(one, middle, one)
    description = MBConvDescription(
        pre_norm=None,
        expand_norm=None,
        depthwise_norm=None,
        depthwise_activation="identity",
        residual=False,
    )
    step = mbconv_step(parameters, description, torch.bfloat16)
    (found,) = FrozenSequence([step]).outputs(x.float(), [0])
    exact = F.gelu(x.double())
    rounding = torch.finfo(torch.bfloat16).eps / 2
    assert ((found - exact).abs() <= 1.25 * rounding * exact.abs() + 2.0**-14).all()


@pytest.mark.each_isa
@pytest.mark.parametrize("dtype", HALVES)
@torch.no_grad()
def test_values_that_are_not_finite_stay_in_their_image(dtype: torch.dtype) -> None:
    model = make_eval_model()
    frozen = mk.freeze(model, dtype)
    x = images(3, 64, 64)
    clean = frozen(x)
    for value in (float("nan"), float("inf")):
        x[1, 0, 20, 30] = value
        found = frozen(x)
        assert torch.equal(found[[0, 2]], clean[[0, 2]])
        assert found[1].isnan().all()


@pytest.mark.each_isa
@pytest.mark.parametrize("dtype", HALVES)
@torch.no_grad()
def test_any_number_of_threads_and_empty_batches(dtype: torch.dtype) -> None:
    frozen = mk.freeze(make_eval_model(), dtype)
    x = images(3, 40, 56)
    expected = frozen(x)
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            assert relative_error(frozen(x).double(), expected.double()) < 0.02
            assert torch.equal(frozen(x), frozen(x))
    finally:
        torch.set_num_threads(threads)
    assert frozen(x[:0]).shape == (0, CLASSES)


def test_the_weights_take_half_and_less() -> None:
    model = make_eval_model(stem_width=32, widths=(64, 96, 192, 256))
    whole = mk.freeze(model).sequence.bytes
    if not multiplies(torch.bfloat16):
        pytest.skip("this CPU does not multiply bfloat16")
    half = mk.freeze(model, torch.bfloat16).sequence.bytes
    assert half < 0.56 * whole
    in_bytes = mk.freeze(model, torch.int8, [images(2, 64, 64)])
    assert in_bytes.sequence.bytes < half


def test_a_cpu_without_the_instructions_is_told() -> None:
    model = make_eval_model()
    mk.ops.common.backends._warned.clear()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        mk.freeze(model, torch.float16)
    assert "does not multiply torch.float16" in str(caught[0].message)


# int8 -------------------------------------------------------------------------------------------


@needs_int8
@pytest.mark.parametrize("options", OPTIONS, ids=lambda options: ", ".join(options) or "plain")
@torch.no_grad()
def test_int8_is_within_the_error_that_it_may_have(options: dict) -> None:
    model = make_eval_model(**options)
    sizes = ((64, 64), (33, 47), (96, 70))
    frozen = mk.freeze(model, torch.int8, [images(8, *size) for size in sizes])
    assert any(layer.int8 for layer in frozen.int8_report)
    for size in sizes:
        x = images(5, *size)
        exact = reference(model, x)
        difference = (frozen(x) - exact).square().mean().sqrt() / exact.square().mean().sqrt()
        assert float(difference) < INT8_ERROR, size


@needs_int8
@pytest.mark.parametrize("channels", [(24, 24), (7, 13), (40, 72)])
@pytest.mark.parametrize("kind", ["mbconv", "mbconv without SE", "moat"])
@torch.no_grad()
def test_int8_blocks(kind: str, channels: tuple[int, int]) -> None:
    torch.manual_seed(0)
    if kind == "moat":
        block: nn.Module = mk.FusedMOATBlock(*channels, head_dim=12, window_size=3)
    else:
        ratio = None if "without" in kind else 0.25
        block = mk.FusedMBConv(*channels, se_ratio=ratio, stride=2)
    block = randomize_norms(block).eval()
    model = nn.Sequential(nn.Identity(), block).eval()
    frozen = mk.freeze(model, torch.int8, [torch.randn(4, channels[0], 17, 15)])
    for x in (torch.randn(2, channels[0], 9, 13), torch.randn(1, channels[0], 5, 31)):
        exact = reference(model, x)
        assert relative_error(frozen(x).double(), exact) < INT8_ERROR
        assert torch.equal(frozen(x), frozen(x))


@needs_int8
@torch.no_grad()
def test_int8_leaves_what_hurts_in_bfloat16() -> None:
    """A channel a thousand times the others spoils the scale of a tensor."""
    model = make_eval_model()
    model.stages[2][0].attention_norm.weight[3] = 1000.0
    model.stages[2][0].attention.qkv.weight[:, 3] /= 1000.0
    frozen = mk.freeze(model, torch.int8, [images(4, 64, 64)])
    in_int8 = {layer.step: layer.int8 for layer in frozen.int8_report}
    assert not in_int8["attention half 4"]
    assert sum(in_int8.values()) >= 3
    assert f"int8 in {sum(in_int8.values())} of {len(in_int8)} layers" in repr(frozen)


def test_what_int8_needs() -> None:
    model = make_eval_model()
    with pytest.raises(ValueError, match="calibration must be given"):
        mk.freeze(model, torch.int8)
    with pytest.raises(ValueError, match="only with it"):
        mk.freeze(model, torch.bfloat16, calibration=[images(1, 32, 32)])
    with pytest.raises(ValueError, match=r"dtype must be None, torch\.int8 or one of"):
        mk.freeze(model, torch.float64)


@needs_int8
def test_calibrations_that_tell_nothing() -> None:
    model = make_eval_model()
    with pytest.raises(ValueError, match="at least one batch"):
        mk.freeze(model, torch.int8, [])
    spoilt = images(1, 32, 32)
    spoilt[0, 0, 0, 0] = float("nan")
    with pytest.raises(ValueError, match="values that are not finite inside"):
        mk.freeze(model, torch.int8, [spoilt])
    nn.init.constant_(model.logits_head.bias, float("inf"))
    with pytest.raises(ValueError, match="results that are not finite"):
        mk.freeze(model, torch.int8, [images(1, 32, 32)])


@pytest.mark.each_isa
def test_int8_is_refused_where_the_cpu_lacks_it() -> None:
    if multiplies(torch.int8):
        pytest.skip("this CPU has it")
    with pytest.raises(ValueError, match="AVX512_VNNI"):
        mk.freeze(make_eval_model(), torch.int8, [images(1, 32, 32)])


@needs_int8
@torch.no_grad()
def test_the_model_is_left_as_it_was() -> None:
    model = make_eval_model()
    before = copy.deepcopy(model.state_dict())
    mk.freeze(model, torch.int8, [images(1, 32, 32)])
    assert type(model.stages[2][0]) is mk.FusedMOATBlock
    assert not model.stages[2][0]._forward_pre_hooks
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])


def test_bytes_span_what_pays() -> None:
    values = torch.cat([torch.linspace(-1, 1, 100000), torch.tensor([3.0])])
    scale, zero = quantization_of(values)
    assert 2 / 255 < scale < 3.6 / 255
    assert -zero * scale == pytest.approx(-1, abs=0.05)
    assert quantization_of(torch.zeros(3)).scale > 0
    positive = quantization_of(torch.linspace(2, 6, 100))
    assert positive.zero == 0
