"""Other packages' stems, frozen."""

from __future__ import annotations

import copy
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
from moat_kernels.frozen_modules import FrozenBlock

pytestmark = [
    needs_extension,
    pytest.mark.filterwarnings("ignore:freeze. this CPU does not multiply"),
]
maxxvit = import_peer("timm.models.maxxvit")
maxvit = import_peer("torchvision.models.maxvit")

SIZES = [(16, 12), (15, 13), (1, 1), (37, 70)]


class Model(nn.Module):
    """A stem, and a block without which there would be nothing to freeze."""

    def __init__(self, stem: nn.Module) -> None:
        super().__init__()
        self.block = mk.FusedMBConv(8, 8)
        self.eval()
        self.stem = stem

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.stem(x)


def make_stem(in_channels: int = 3, widths: tuple[int, int] = (8, 24), **settings) -> nn.Module:
    return randomize(maxxvit.Stem(in_channels, widths, **settings)).eval()


def make_torchvision_stem(**settings) -> nn.Module:
    torch.manual_seed(0)
    model = maxvit.MaxVit((64, 64), 24, 2, [16], [1], 16, 0.0, **settings)
    return randomize(model.stem).eval()


def freeze_stem(
    stem: nn.Module, maps: torch.dtype | None = None, dtype: torch.dtype = torch.float32
) -> nn.Module:
    """The stem as it is in a frozen model."""
    model = Model(copy.deepcopy(stem)).to(dtype)
    mk.fuse(model)
    return mk.freeze(model, maps).stem


def check_stem(stem: nn.Module, maps: torch.dtype) -> None:
    """It is frozen, and gives the same for images of every size and memory format."""
    frozen = freeze_stem(stem, maps)
    assert isinstance(frozen, FrozenBlock) and not frozen.state_dict()
    channels = next(stem.parameters()).shape[1]
    for size in SIZES:
        x = torch.randn(3, channels, *size)
        exact = copy.deepcopy(stem).double()(x.double())
        tolerance = BACKEND_OUTPUT[torch.float32]
        if maps != torch.float32:
            stock = copy.deepcopy(stem).to(maps)(x.to(maps))
            rounding = FOLDED_ROUNDING * torch.finfo(maps).eps
            tolerance = LOW_PRECISION_FACTOR * relative_error(stock, exact) + rounding
        found = frozen(x)
        assert_close(found, exact, tolerance)
        assert found.is_contiguous()
        last = frozen(x.contiguous(memory_format=torch.channels_last))
        assert torch.equal(last, found)
        assert torch.equal(frozen(x[1:2]), found[1:2])
        assert frozen(x[:0]).shape == (0, *found.shape[1:])


@pytest.mark.each_isa
@pytest.mark.parametrize("maps", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"act_layer": "gelu_tanh", "padding": "same", "bias": True, "norm_eps": 1e-3},
        {"act_layer": "silu", "widths": (32, 64)},
        {"act_layer": "relu", "widths": (64, 20), "in_channels": 1},
        {"widths": (40, 40), "in_channels": 5},
    ],
    ids=str,
)
@torch.no_grad()
def test_stems(settings: dict, maps: torch.dtype) -> None:
    check_stem(make_stem(**settings), maps)


@pytest.mark.each_isa
@pytest.mark.parametrize("maps", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("activation", [nn.GELU, nn.SiLU, nn.ReLU])
@torch.no_grad()
def test_stems_of_torchvision(activation: type[nn.Module], maps: torch.dtype) -> None:
    check_stem(make_torchvision_stem(activation_layer=activation), maps)


@pytest.mark.each_isa
@torch.no_grad()
def test_values_that_are_not_finite_stay_where_they_are_seen() -> None:
    stem = make_stem(widths=(8, 24))
    frozen = freeze_stem(stem)
    x = torch.randn(2, 3, 20, 20)
    x[1, 0, 9, 11] = float("nan")
    expected = copy.deepcopy(stem).float()(x)
    found = frozen(x)
    assert torch.equal(found.isnan(), expected.isnan())
    assert_close(found[:1], expected[:1].double(), BACKEND_OUTPUT[torch.float32])


@torch.no_grad()
def test_a_frozen_stem_keeps_the_weights_that_it_was_made_of() -> None:
    model = Model(make_stem()).float()
    mk.fuse(model)
    frozen = mk.freeze(model)
    x = torch.randn(1, 3, 16, 16)
    expected = frozen(x)
    for tensor in model.state_dict().values():
        tensor.fill_(3)
    assert torch.equal(frozen(x), expected)


def test_a_stem_alone_is_nothing_to_freeze() -> None:
    with pytest.raises(ValueError, match="nothing in model can be frozen"):
        mk.freeze(make_stem().float())


def replace_norm(stem: nn.Module) -> None:
    stem.norm1 = nn.Identity()


def replace_activation(stem: nn.Module) -> None:
    stem.norm1.act = nn.Tanh()


def measure(stem: nn.Module) -> None:
    stem.norm1.train()


def hook(stem: nn.Module) -> None:
    stem.conv2.register_forward_hook(lambda *_: None)


def add_child(stem: nn.Module) -> None:
    stem.extra = nn.Identity()


def dilate(stem: nn.Module) -> None:
    stem.conv2.dilation, stem.conv2.padding = (2, 2), (2, 2)


def change_forward(stem: nn.Module) -> None:
    class Stem(maxxvit.Stem):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x) + 1

    stem.__class__ = Stem


@pytest.mark.parametrize(
    "change",
    [replace_norm, replace_activation, measure, hook, add_child, dilate, change_forward],
)
@torch.no_grad()
def test_stems_that_were_changed_are_copied(change: Callable[[nn.Module], None]) -> None:
    stem = make_stem()
    change(stem)
    frozen = freeze_stem(stem)
    assert type(frozen) is type(stem)
    x = torch.randn(2, 3, 16, 16)
    assert torch.equal(frozen(x), copy.deepcopy(stem).float()(x))


@pytest.mark.parametrize("settings", [{"kernel_size": 5}, {"kernel_size": 2}], ids=str)
def test_other_stems_are_copied(settings: dict) -> None:
    assert type(freeze_stem(make_stem(**settings))) is maxxvit.Stem


def append(stem: nn.Module) -> None:
    stem.append(nn.Identity())


def append_to_second(stem: nn.Module) -> None:
    stem[1].append(nn.Tanh())


def replace_activation_of_first(stem: nn.Module) -> None:
    stem[0][2] = nn.Tanh()


def hook_first(stem: nn.Module) -> None:
    stem[0].register_forward_hook(lambda *_: None)


@pytest.mark.parametrize(
    "change",
    [append, append_to_second, replace_activation_of_first, hook_first],
)
@torch.no_grad()
def test_stems_of_torchvision_that_were_changed_are_copied(
    change: Callable[[nn.Module], None],
) -> None:
    stem = make_torchvision_stem()
    change(stem)
    frozen = freeze_stem(stem)
    assert type(frozen) is nn.Sequential
    x = torch.randn(2, 3, 16, 16)
    assert torch.equal(frozen(x), copy.deepcopy(stem).float()(x))
