"""The MLP of transformer blocks, frozen: the step by itself, and in blocks of other packages."""

from __future__ import annotations

import copy
import dataclasses
import warnings
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from support.fusing import randomize
from support.native import needs_extension
from support.peers import import_peer
from support.tolerances import (
    BACKEND_OUTPUT,
    FOLDED_ROUNDING,
    LOW_PRECISION_FACTOR,
    assert_close,
    relative_error,
)
from torch import Tensor, nn

import moat_kernels as mk
from moat_kernels.frozen_modules import FrozenTransformerBlock
from moat_kernels.ops.frozen import CannotFreeze, FrozenSequence, mlp_step

pytestmark = [
    needs_extension,
    pytest.mark.filterwarnings("ignore:freeze. this CPU does not multiply"),
]
maxxvit = import_peer("timm.models.maxxvit")
maxvit = import_peer("torchvision.models.maxvit")
max_vit = import_peer("vit_pytorch.max_vit")

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
EPS = 1e-5
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "silu": F.silu,
    "relu": F.relu,
}
# Channels and hidden channels: below a vector, of no whole vector, of no whole block, and so many
# that products are made in pieces.
CHANNELS = [(5, 7), (24, 96), (40, 300), (33, 257), (520, 130), (1030, 70)]
# Few rows, which threads share, and many.
MAPS = [(1, 1, 1), (3, 7, 5), (1, 13, 11), (2, 16, 17)]


def make_tensors(channels: int, hidden: int) -> list[Tensor | None]:
    """Weight and bias of the norm, fc1 and fc2."""
    torch.manual_seed(0)
    return [
        *(torch.rand(channels) + 0.5, torch.randn(channels)),
        *(torch.randn(hidden, channels) / channels**0.5, torch.randn(hidden)),
        *(torch.randn(channels, hidden) / hidden**0.5, torch.randn(channels)),
    ]


def reference(
    x: Tensor,
    tensors: list[Tensor | None],
    activation: str = "gelu",
    dtype: torch.dtype = torch.float64,
) -> Tensor:
    """By stock operations in a dtype."""
    weight, bias, *layers = [None if t is None else t.to(dtype) for t in tensors]
    rows = x.to(dtype).permute(0, 2, 3, 1)
    hidden = F.linear(F.layer_norm(rows, rows.shape[3:], weight, bias, EPS), *layers[:2])
    result = rows + F.linear(ACTIVATIONS[activation](hidden), *layers[2:])
    return result.permute(0, 3, 1, 2)


def run(
    x: Tensor,
    tensors: list[Tensor | None],
    activation: str = "gelu",
    maps: torch.dtype = torch.float32,
) -> Tensor:
    return FrozenSequence([mlp_step(tensors, activation, EPS, maps)]).outputs(x, [0])[0]


def assert_as_close_as_stock(
    found: Tensor, x: Tensor, tensors: list[Tensor | None], activation: str, dtype: torch.dtype
) -> None:
    exact = reference(x, tensors, activation)
    allowed = BACKEND_OUTPUT.get(dtype, 0.0)
    if dtype != torch.float32:
        stock = relative_error(reference(x, tensors, activation, dtype), exact)
        allowed = LOW_PRECISION_FACTOR * stock + FOLDED_ROUNDING * torch.finfo(dtype).eps
    assert_close(found, exact, allowed)


@pytest.mark.each_isa
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("channels", CHANNELS)
@torch.no_grad()
def test_sizes(channels: tuple[int, int], dtype: torch.dtype) -> None:
    tensors = make_tensors(*channels)
    for size in MAPS:
        x = torch.randn(size[0], channels[0], *size[1:])
        found = run(x, tensors, maps=dtype)
        assert_as_close_as_stock(found, x, tensors, "gelu", dtype)
        assert found.dtype == torch.float32
        assert found.is_contiguous(memory_format=torch.channels_last)
        last = x.contiguous(memory_format=torch.channels_last)
        assert torch.equal(run(last, tensors, maps=dtype), found)
    assert run(x[:0], tensors, maps=dtype).shape == (0, channels[0], 16, 17)


@pytest.mark.each_isa
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@torch.no_grad()
def test_activations_and_what_may_be_missing(activation: str, dtype: torch.dtype) -> None:
    x = torch.randn(2, 24, 7, 5)
    for missing in ((), (1,), (3,), (5,), (0, 1, 3, 5)):
        tensors = make_tensors(24, 100)
        for index in missing:
            tensors[index] = None
        found = run(x, tensors, activation, dtype)
        assert_as_close_as_stock(found, x, tensors, activation, dtype)


@pytest.mark.each_isa
@pytest.mark.parametrize("dtype", DTYPES)
@torch.no_grad()
def test_any_number_of_threads_gives_the_same(dtype: torch.dtype) -> None:
    tensors = make_tensors(40, 300)
    threads = torch.get_num_threads()
    for size in MAPS:
        x = torch.randn(size[0], 40, *size[1:])
        expected = run(x, tensors, maps=dtype)
        try:
            for count in (1, 2, 3, 5):
                torch.set_num_threads(count)
                assert torch.equal(run(x, tensors, maps=dtype), expected), (size, count)
        finally:
            torch.set_num_threads(threads)


@pytest.mark.each_isa
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@torch.no_grad()
def test_values_that_are_not_finite_stay_in_their_pixel(
    activation: str, dtype: torch.dtype
) -> None:
    tensors = make_tensors(24, 100)
    for size in MAPS[1:]:
        x = torch.randn(size[0], 24, *size[1:])
        clean = run(x, tensors, activation, dtype)
        for value in (float("nan"), float("inf")):
            spoilt = x.clone()
            spoilt[0, 3, 2, 4] = value
            found = run(spoilt, tensors, activation, dtype)
            assert found[0, :, 2, 4].isnan().all()
            found[0, :, 2, 4] = clean[0, :, 2, 4]
            assert torch.equal(found, clean)


@torch.no_grad()
def test_a_step_keeps_the_weights_that_it_was_made_of() -> None:
    tensors = make_tensors(24, 100)
    x = torch.randn(1, 24, 4, 5)
    sequence = FrozenSequence([mlp_step(tensors, "gelu", EPS)])
    (before,) = sequence.outputs(x, [0])
    for tensor in tensors:
        tensor.fill_(float("nan"))
    assert torch.equal(sequence.outputs(x, [0])[0], before)
    with pytest.raises(RuntimeError, match="y must have 24 channels, got 25"):
        sequence.outputs(torch.randn(1, 25, 4, 5), [0])


def test_layers_that_do_not_fit_together() -> None:
    for index in (2, 4):
        tensors = make_tensors(24, 100)
        tensors[index] = None
        with pytest.raises(CannotFreeze, match="without weights"):
            mlp_step(tensors, "gelu", EPS)
    for index in range(6):
        tensors = make_tensors(24, 100)
        tensors[index] = tensors[index][:-1]
        with pytest.raises(CannotFreeze, match="do not fit together"):
            mlp_step(tensors, "gelu", EPS)


# Blocks of other packages -----------------------------------------------------------------------


def make_partition(kind: str, **settings) -> nn.Module:
    options = {"window_size": (2, 3), "dim_head": 8, **settings}
    config = dataclasses.replace(maxxvit.MaxxVitTransformerCfg(), **options)
    return randomize(getattr(maxxvit, f"PartitionAttention{kind}")(16, "block", config)).eval()


def make_layer() -> nn.Module:
    layer = maxvit.PartitionAttentionLayer(
        16, 8, 2, "window", (6, 4), 2, nn.GELU, nn.LayerNorm, 0.0, 0.0, 0.2
    )
    return randomize(layer).eval()


def make_residuals() -> nn.Module:
    """Attention and MLP, each with a sum around it."""
    layers = (
        max_vit.Attention(dim=16, dim_head=8, dropout=0.1, window_size=3),
        max_vit.FeedForward(dim=16, dropout=0.1),
    )
    return randomize(nn.Sequential(*(max_vit.Residual(16, layer) for layer in layers))).eval()


# name -> (how a block is made, the size of an input without the batch)
BLOCKS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "timm rows": (lambda: make_partition("Cl"), (4, 6, 16)),
    "timm maps": (lambda: make_partition("2d"), (16, 4, 6)),
    "timm layer scale": (lambda: make_partition("2d", init_values=0.3), (16, 4, 6)),
    "timm other activation": (lambda: make_partition("Cl", act_layer="silu"), (4, 6, 16)),
    "torchvision": (make_layer, (16, 6, 4)),
    "vit-pytorch": (make_residuals, (2, 1, 3, 3, 16)),
}


def fused_copy(stock: nn.Module, dtype: torch.dtype = torch.float32) -> nn.Module:
    model = copy.deepcopy(stock).to(dtype)
    assert mk.fuse(model).fused
    return model


def frozen_blocks(model: nn.Module) -> list[FrozenTransformerBlock]:
    return [module for module in model.modules() if isinstance(module, FrozenTransformerBlock)]


@pytest.mark.each_isa
@pytest.mark.parametrize("maps", [None, torch.bfloat16])
@pytest.mark.parametrize("name", BLOCKS)
@torch.no_grad()
def test_blocks_hold_nothing_but_steps(name: str, maps: torch.dtype | None) -> None:
    make, size = BLOCKS[name]
    stock = make()
    frozen = mk.freeze(fused_copy(stock), maps)
    assert frozen_blocks(frozen) and not frozen.state_dict()
    steps = [step.kind for block in frozen_blocks(frozen) for step in block.sequence._steps]
    assert steps == ["attention half", "MLP"]
    x = torch.randn(3, *size)
    exact = copy.deepcopy(stock).double()(x.double())
    tolerance = BACKEND_OUTPUT[torch.float32]
    if maps is not None:
        plain = copy.deepcopy(stock).to(maps)(x.to(maps))
        rounding = FOLDED_ROUNDING * torch.finfo(maps).eps
        tolerance = LOW_PRECISION_FACTOR * relative_error(plain, exact) + rounding
    assert_close(frozen(x), exact, tolerance)
    assert frozen(x[:0]).shape == (0, *size)


def change_norm(block: nn.Module) -> None:
    block.mlp.norm = nn.LayerNorm(block.mlp.fc1.out_features)


def change_activation(block: nn.Module) -> None:
    block.mlp.act = nn.Tanh()


def change_dropout(block: nn.Module) -> None:
    block.mlp.drop1 = nn.Dropout(0.0)
    block.mlp.drop2 = nn.Identity()
    block.mlp.extra = nn.Identity()


def change_forward(block: nn.Module) -> None:
    class Mlp(type(block.mlp)):  # type: ignore[misc]
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    block.mlp.__class__ = Mlp


@pytest.mark.parametrize("change", [change_norm, change_activation, change_dropout, change_forward])
@torch.no_grad()
def test_an_mlp_that_no_step_computes_is_copied(change: Callable[[nn.Module], None]) -> None:
    stock = make_partition("Cl")
    change(stock)
    model = fused_copy(stock)
    frozen = mk.freeze(model)
    assert [step.kind for step in frozen.sequence._steps] == ["attention half"]
    assert "mlp.fc1.weight" in frozen.state_dict()
    assert frozen.mlp.fc1.weight is not model.mlp.fc1.weight
    x = torch.randn(2, 4, 6, 16)
    assert_close(frozen(x), stock.double()(x.double()), BACKEND_OUTPUT[torch.float32])


@torch.no_grad()
def test_an_mlp_without_an_attention_before_it_is_left() -> None:
    first, second = make_residuals()
    model = nn.Sequential(second, first).eval()
    frozen = mk.freeze(fused_copy(model))
    assert len(frozen_blocks(frozen)) == 1
    assert type(frozen[0]) is max_vit.Residual
    first, second = make_residuals()
    second.fn.net[2] = nn.Tanh()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        frozen = mk.freeze(fused_copy(nn.Sequential(first, second).eval()))
    assert type(frozen[1]) is max_vit.Residual
