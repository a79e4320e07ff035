"""Attention halves that change the size of maps, frozen: the step, and timm's blocks of it."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable

import pytest
import torch
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
from torch import nn

import moat_kernels as mk
from moat_kernels.frozen_modules import FrozenTransformerBlock
from moat_kernels.functional import WindowAttentionDescription
from moat_kernels.ops.frozen import CannotFreeze, Shortcut, pooled_half_step
from moat_kernels.ops.mbconv.description import Pool

pytestmark = [
    needs_extension,
    pytest.mark.filterwarnings("ignore:freeze. this CPU does not multiply"),
]
maxxvit = import_peer("timm.models.maxxvit")

# Of the block's input and output: the same, of no whole vector or word, and of several panels.
CHANNELS = [(16, 16), (7, 21), (40, 24), (200, 392)]
SETTINGS: list[dict] = [
    {},
    {"pool_type": "max2"},
    {"pool_type": "avg"},
    {"pool_type": "max"},
    {"expand_first": False, "rel_pos_type": ""},
    {"shortcut_bias": False, "init_values": 0.3, "attn_bias": False},
    {"head_first": False, "rel_pos_type": "bias_tf"},
]


def make_block(
    channels: tuple[int, int] = (16, 24), size: tuple[int, int] = (3, 4), **settings
) -> nn.Module:
    """size: of its results."""
    config = dataclasses.replace(
        maxxvit.MaxxVitTransformerCfg(), dim_head=min(8, channels[0]), **settings
    )
    bias = maxxvit.get_rel_pos_cls(config, size)
    return randomize(maxxvit.TransformerBlock2d(*channels, 2, bias, config)).eval()


def sizes_before(block: nn.Module, size: tuple[int, int]) -> list[tuple[int, int]]:
    """Of maps whose results are of a size: those of even sides, and of odd ones."""
    odd = -1 if block.shortcut.pool.padding else 1
    return [(2 * size[0] + more, 2 * size[1] + more) for more in (0, odd)]


def frozen_of(
    block: nn.Module, maps: torch.dtype | None = None, dtype: torch.dtype = torch.float32
) -> FrozenTransformerBlock:
    model = copy.deepcopy(block).to(dtype)
    assert mk.fuse(model).fused
    frozen = mk.freeze(model, maps)
    assert isinstance(frozen, FrozenTransformerBlock) and not frozen.state_dict()
    assert [step.kind for step in frozen.sequence._steps] == ["attention half", "MLP"]
    return frozen


@pytest.mark.each_isa
@pytest.mark.parametrize("maps", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("channels", CHANNELS, ids=str)
@torch.no_grad()
def test_blocks(channels: tuple[int, int], settings: dict, maps: torch.dtype) -> None:
    for size in ((3, 4), (9, 7)):
        block = make_block(channels, size, **settings)
        frozen = frozen_of(block, maps)
        for height, width in sizes_before(block, size):
            x = torch.randn(3, channels[0], height, width)
            exact = copy.deepcopy(block).double()(x.double())
            tolerance = BACKEND_OUTPUT[torch.float32]
            if maps != torch.float32:
                stock = copy.deepcopy(block).to(maps)(x.to(maps))
                rounding = FOLDED_ROUNDING * torch.finfo(maps).eps
                tolerance = LOW_PRECISION_FACTOR * relative_error(stock, exact) + rounding
            found = frozen(x)
            assert_close(found, exact, tolerance)
            assert found.is_contiguous()
            last = frozen(x.contiguous(memory_format=torch.channels_last))
            assert torch.equal(last, found)
            assert last.is_contiguous(memory_format=torch.channels_last)
            assert torch.equal(frozen(x[1:2]), found[1:2])
            assert frozen(x[:0]).shape == (0, channels[1], *size)


@pytest.mark.each_isa
@pytest.mark.parametrize("maps", [torch.float32, torch.bfloat16], ids=str)
@torch.no_grad()
def test_any_number_of_threads_gives_the_same(maps: torch.dtype) -> None:
    threads = torch.get_num_threads()
    for size, batch in (((14, 14), 1), ((7, 5), 3), ((3, 4), 8)):
        block = make_block((40, 72), size)
        frozen = frozen_of(block, maps)
        x = torch.randn(batch, 40, *sizes_before(block, size)[1])
        expected = frozen(x)
        try:
            for count in (1, 2, 3, 5):
                torch.set_num_threads(count)
                assert torch.equal(frozen(x), expected), (size, count)
        finally:
            torch.set_num_threads(threads)


@pytest.mark.each_isa
@pytest.mark.parametrize("pool", ["avg2", "max2", "avg", "max"])
@torch.no_grad()
def test_values_that_are_not_finite_stay_in_their_image(pool: str) -> None:
    block = make_block(pool_type=pool)
    frozen = frozen_of(block)
    x = torch.randn(3, 16, *sizes_before(block, (3, 4))[0])
    clean = frozen(x)
    for value in (float("nan"), float("inf")):
        spoilt = x.clone()
        spoilt[1, 5, 2, 3] = value
        found = frozen(spoilt)
        assert torch.equal(found[[0, 2]], clean[[0, 2]])
        assert found[1].isnan().all()


@torch.no_grad()
def test_pixels_beyond_the_pool_do_not_matter() -> None:
    frozen = frozen_of(make_block())
    x = torch.randn(1, 16, 7, 9)
    expected = frozen(x)
    x[:, :, 6] = x[:, :, :, 8] = float("nan")
    assert torch.equal(frozen(x), expected)


def test_maps_that_a_block_refuses() -> None:
    frozen = frozen_of(make_block())
    with pytest.raises(ValueError, match=r"x, once pooled, must be a map of 3 x 4, got 4 x 4"):
        frozen(torch.randn(1, 16, 8, 8))
    with pytest.raises(RuntimeError, match="y must have 16 channels, got 17"):
        frozen(torch.randn(1, 17, 6, 8))


def pool_alone(block: nn.Module) -> None:
    block.norm1 = block.norm1.norm


def another_pool(block: nn.Module) -> None:
    block.norm1.down.pool = nn.MaxPool2d(2)


def another_expansion(block: nn.Module) -> None:
    block.norm1.down.expand = nn.Conv2d(16, 16, 1).double()


def unknown_pool(block: nn.Module) -> None:
    block.shortcut.pool = nn.LPPool2d(2, 2)


def unknown_shortcut(block: nn.Module) -> None:
    block.shortcut = nn.Conv2d(16, 24, 2, 2).double()


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (pool_alone, "a pool of its shortcut alone"),
        (another_pool, "another pool than its shortcut's before its attention"),
        (another_expansion, "another pool than its shortcut's before its attention"),
        (unknown_pool, "LPPool2d in the shortcut"),
        (unknown_shortcut, "Conv2d of unknown structure as shortcut"),
    ],
)
def test_blocks_that_were_changed_are_left(
    change: Callable[[nn.Module], None], reason: str
) -> None:
    model = make_block()
    mk.fuse(model)
    change(model)
    model.float()
    with pytest.raises(ValueError, match=reason):
        mk.freeze(model)


def make_tensors() -> list[torch.Tensor | None]:
    return [
        *(torch.ones(16), torch.zeros(16), torch.randn(48, 16), torch.zeros(48)),
        *(torch.randn(24, 16), torch.zeros(24), None),
    ]


def test_layers_that_do_not_fit_together() -> None:
    description = WindowAttentionDescription(2, 8)
    shortcut = Shortcut(Pool(padding=(0, 0, 0, 0)), torch.randn(24, 16), torch.zeros(24))
    assert pooled_half_step(make_tensors(), shortcut, 1e-5, description).kind == "attention half"
    for index in range(6):
        tensors = make_tensors()
        tensors[index] = tensors[index][:-1]
        with pytest.raises(CannotFreeze, match="does not cover"):
            pooled_half_step(tensors, shortcut, 1e-5, description)
    for index in (2, 4):
        tensors = make_tensors()
        tensors[index] = None
        with pytest.raises(CannotFreeze, match="without weights"):
            pooled_half_step(tensors, shortcut, 1e-5, description)
    for other in (
        Shortcut(shortcut.pool),
        Shortcut(shortcut.pool, torch.randn(24, 15)),
        Shortcut(shortcut.pool, torch.randn(24, 16), torch.zeros(23)),
    ):
        with pytest.raises(CannotFreeze, match="does not cover"):
            pooled_half_step(make_tensors(), other, 1e-5, description)
