"""Batch norms of fixed statistics, of three packages: fused when frozen before `fuse` or after."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from support.foreign_models import RESOLUTION, make_foreign_model
from support.fusing import check_same, randomize, run
from support.native import needs_extension
from support.peers import import_peer
from support.small_model import make_model
from support.tolerances import BACKEND_MODEL_OUTPUT, BACKEND_OUTPUT, assert_close
from torch import Tensor, nn

import moat_kernels as mk


class FrozenBatchNorm2d(nn.Module):
    """As detectron2's: eps is part of the initial variance; with gradients, a scale and a sum.

    counts: keep the number of batches, as it does since 2023 (0.6 does not).
    """

    __module__ = "detectron2.layers.batch_norm"

    def __init__(self, num_features: int, eps: float = 1e-5, *, counts: bool = False) -> None:
        super().__init__()
        self.num_features, self.eps = num_features, eps
        self.register_buffer("weight", torch.ones(num_features))
        self.register_buffer("bias", torch.zeros(num_features))
        self.register_buffer("running_mean", torch.zeros(num_features))
        self.register_buffer("running_var", torch.ones(num_features) - eps)
        if counts:
            self.register_buffer("num_batches_tracked", None)

    def forward(self, x: Tensor) -> Tensor:
        if not x.requires_grad:
            statistics = (self.running_mean, self.running_var)
            return F.batch_norm(x, *statistics, self.weight, self.bias, eps=self.eps)
        scale = self.weight / (self.running_var + self.eps).sqrt()
        shift = self.bias - self.running_mean * scale
        return x * scale.to(x.dtype).view(-1, 1, 1) + shift.to(x.dtype).view(-1, 1, 1)


def replace_norms(model: nn.Module, kind: Callable[..., nn.Module]) -> nn.Module:
    """As the packages' own converters do it: the norms are replaced, their tensors are kept."""
    for module in list(model.modules()):
        for name, norm in list(module.named_children()):
            if isinstance(norm, nn.BatchNorm2d):
                frozen = kind(norm.num_features, norm.eps)
                for part in frozen._buffers:
                    frozen._buffers[part] = getattr(norm, part).detach().clone()
                setattr(module, name, frozen)
    return model


def by_torchvision(model: nn.Module) -> nn.Module:
    return replace_norms(model, import_peer("torchvision.ops.misc").FrozenBatchNorm2d)


def by_detectron2(model: nn.Module) -> nn.Module:
    return replace_norms(model, FrozenBatchNorm2d)


def by_detectron2_counting(model: nn.Module) -> nn.Module:
    return replace_norms(model, partial(FrozenBatchNorm2d, counts=True))


def by_timm(model: nn.Module) -> nn.Module:
    return import_peer("timm.layers.norm_act").freeze_batch_norm_2d(model)


def by_timm_freeze(model: nn.Module) -> nn.Module:
    """Freezes the parameters too."""
    import_peer("timm.utils").freeze(model)
    return model


FREEZERS = [by_torchvision, by_detectron2, by_detectron2_counting, by_timm, by_timm_freeze]


@pytest.fixture(autouse=True)
def falling_back_fails() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("error", mk.FallbackWarning)
        yield


def make_timm_block() -> nn.Module:
    maxxvit = import_peer("timm.models.maxxvit")
    return randomize(maxxvit.MbConvBlock(16, 24, stride=2))


def make_torchvision_block() -> nn.Module:
    maxvit = import_peer("torchvision.models.maxvit")
    return randomize(maxvit.MBConv(16, 24, 4.0, 0.25, 2, nn.GELU, nn.BatchNorm2d, 0.0))


def check_equal(fused: nn.Module, stock: nn.Module) -> None:
    """Outputs, gradients and state, in both modes; tensors keep their names."""
    assert fused.state_dict().keys() == stock.state_dict().keys()
    x = torch.randn(2, 16, 10, 8, dtype=torch.float64)
    for training in (True, False):
        before = {name: tensor.clone() for name, tensor in fused.state_dict().items()}
        check_same(run(fused, x, training=training), run(stock, x, training=training))
        for name, tensor in fused.state_dict().items():
            assert torch.equal(tensor, before[name]), name


@pytest.mark.parametrize("freeze_norms", FREEZERS)
@pytest.mark.parametrize("make", [make_timm_block, make_torchvision_block])
def test_blocks_of_others(
    make: Callable[[], nn.Module], freeze_norms: Callable[[nn.Module], nn.Module]
) -> None:
    stock = make()
    first_fused = copy.deepcopy(stock)
    assert len(mk.fuse(first_fused).fused) == 1
    freeze_norms(first_fused)
    freeze_norms(stock)
    first_frozen = copy.deepcopy(stock)
    assert len(mk.fuse(first_frozen).fused) == 1
    assert not any(isinstance(module, nn.BatchNorm2d) for module in stock.modules())
    check_equal(first_fused, stock)
    check_equal(first_frozen, stock)


@pytest.mark.parametrize("freeze_norms", FREEZERS)
def test_blocks_of_this_package(freeze_norms: Callable[[nn.Module], nn.Module]) -> None:
    torch.manual_seed(0)
    fused = randomize(mk.FusedMBConv(16, 24, stride=2))
    stock = mk.reference.MBConvBlock(16, 24, stride=2).double()
    stock.load_state_dict(fused.state_dict())
    check_equal(freeze_norms(fused), freeze_norms(stock))


def make_moat() -> nn.Module:
    return randomize(make_model(fused=False, depths=(1, 2, 1, 1)))


# name -> (how it is made, how many of its modules are fused)
MODELS: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "MOAT": (make_moat, 7),
    "timm coatnet": (partial(make_foreign_model, "timm coatnet"), 4),
    "timm maxvit": (partial(make_foreign_model, "timm maxvit tf"), 12),
    "torchvision maxvit": (partial(make_foreign_model, "torchvision maxvit"), 9),
}


def fuse_whole(model: nn.Module, fused: int) -> nn.Module:
    report = mk.fuse(model)
    assert len(report.fused) == fused and not report.skipped, str(report)
    return model


@pytest.mark.parametrize("freeze_norms", FREEZERS)
@pytest.mark.parametrize("name", MODELS)
def test_whole_models_train_as_stock(
    name: str, freeze_norms: Callable[[nn.Module], nn.Module]
) -> None:
    make, fused = MODELS[name]
    stock = freeze_norms(make())
    first_fused = freeze_norms(fuse_whole(make(), fused))
    first_frozen = fuse_whole(copy.deepcopy(stock), fused)
    buffers = {name: buffer.clone() for name, buffer in stock.named_buffers()}
    assert any(name.endswith("running_var") for name in buffers)
    x = torch.randn(2, 3, RESOLUTION, RESOLUTION, dtype=torch.float64)
    expected = run(stock, x, training=True)
    for model in (first_fused, first_frozen):
        check_same(run(model, x, training=True), expected)
        for name, buffer in model.named_buffers():
            assert torch.equal(buffer, buffers[name]), name


@needs_extension
@pytest.mark.parametrize("freeze_norms", FREEZERS)
@torch.no_grad()
def test_freeze_packs_them(freeze_norms: Callable[[nn.Module], nn.Module]) -> None:
    model = freeze_norms(make_model(torch.float32)).eval()
    frozen = mk.freeze(model)
    assert isinstance(frozen, mk.FrozenMOAT)
    x = torch.randn(2, 3, 48, 32)
    assert_close(frozen(x), model(x), BACKEND_OUTPUT[torch.float32])


@needs_extension
@pytest.mark.parametrize("freeze_norms", FREEZERS)
@pytest.mark.parametrize("name", ["timm coatnet", "timm maxvit", "torchvision maxvit"])
@torch.no_grad()
def test_freeze_packs_those_of_others(
    name: str, freeze_norms: Callable[[nn.Module], nn.Module]
) -> None:
    make, fused = MODELS[name]
    stock = freeze_norms(make()).eval()
    frozen = mk.freeze(fuse_whole(copy.deepcopy(stock).float(), fused))
    assert not any("running_var" in name for name in frozen.state_dict())
    x = torch.randn(2, 3, RESOLUTION, RESOLUTION)
    assert_close(frozen(x), stock(x.double()), BACKEND_MODEL_OUTPUT)
