"""Fused models of other packages, frozen in int8: which steps, how exact, and what is told."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from support.foreign_models import RESOLUTION, make_foreign_model
from support.fusing import randomize
from support.native import needs_extension
from support.peers import import_peer
from support.tolerances import INT8_ERROR, relative_error
from torch import Tensor, nn

import moat_kernels as mk
from moat_kernels.calibration import LayerError
from moat_kernels.frozen_modules import FrozenModule, FrozenTransformerBlock
from moat_kernels.ops.frozen import multiplies

pytestmark = [
    needs_extension,
    pytest.mark.each_isa,
    pytest.mark.filterwarnings("ignore:freeze"),
]
maxxvit = import_peer("timm.models.maxxvit")
maxvit = import_peer("torchvision.models.maxvit")
max_vit = import_peer("vit_pytorch.max_vit")
timm = import_peer("timm")

KINDS = ("inverted bottleneck", "attention half", "MLP")
# name -> kinds of steps that multiply in int8.
MODELS = {
    "timm coatnet": ("inverted bottleneck", "MLP"),
    "timm maxvit tf": KINDS,
    "torchvision maxvit": KINDS,
    "vit-pytorch maxvit": KINDS,
    "changzy00": KINDS[:1],
}


@pytest.fixture(autouse=True)
def needs_int8() -> None:
    if not multiplies(torch.int8):
        pytest.skip("these instructions do not multiply int8 and bfloat16")


def images(batch: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, 3, RESOLUTION, RESOLUTION, generator=generator, dtype=torch.float32)


def batches(count: int = 3) -> list[Tensor]:
    return [images(4, seed) for seed in range(1, count + 1)]


def fused_copy(stock: nn.Module) -> nn.Module:
    model = copy.deepcopy(stock).float()
    assert mk.fuse(model).fused
    return model


def freeze(model: nn.Module, calibration: list[Tensor]) -> tuple[nn.Module, list[LayerError]]:
    frozen = mk.freeze(model, torch.int8, calibration)
    report = frozen.int8_report
    assert isinstance(report, list)
    return frozen, report


def in_int8(frozen: nn.Module) -> int:
    """Steps that do."""
    parts = [module for module in frozen.modules() if isinstance(module, FrozenModule)]
    return sum(step.int8 for part in parts for step in part.sequence.steps)


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_whole_models(name: str) -> None:
    stock = make_foreign_model(name).eval()
    model = fused_copy(stock)
    frozen, report = freeze(model, batches())
    chosen = [layer for layer in report if layer.int8]
    assert {layer.step.split(": ")[1] for layer in chosen} <= set(MODELS[name])
    assert in_int8(frozen) == len(chosen) > 0
    assert sum(layer.error**2 for layer in chosen) <= 0.015**2
    names = dict(model.named_modules())
    assert all(layer.step.split(": ")[0] in names for layer in report)
    x = images(2)
    found, exact = frozen(x), stock(x.double())
    difference = (found - exact).square().mean().sqrt() / exact.square().mean().sqrt()
    assert float(difference) < INT8_ERROR
    assert torch.equal(frozen(x), found)
    assert torch.equal(copy.deepcopy(frozen)(x), found)


def make_partition(kind: str = "Cl", **settings) -> nn.Module:
    config = maxxvit.MaxxVitTransformerCfg(window_size=(2, 3), dim_head=8, **settings)
    return randomize(getattr(maxxvit, f"PartitionAttention{kind}")(24, "block", config)).eval()


def make_layer() -> nn.Module:
    layer = maxvit.PartitionAttentionLayer(
        24, 8, 2, "window", (6, 4), 2, nn.GELU, nn.LayerNorm, 0.0, 0.0, 0.0
    )
    return randomize(layer).eval()


def make_residuals() -> nn.Module:
    layers = (
        max_vit.Attention(dim=24, dim_head=8, window_size=3),
        max_vit.FeedForward(dim=24),
    )
    return randomize(nn.Sequential(*(max_vit.Residual(24, layer) for layer in layers))).eval()


BLOCKS = {
    "timm rows": (make_partition, (4, 6, 24)),
    "timm maps": (lambda: make_partition("2d"), (24, 4, 6)),
    "timm layer scale": (lambda: make_partition("2d", init_values=0.3), (24, 4, 6)),
    "timm other activation": (lambda: make_partition(act_layer="silu"), (4, 6, 24)),
    "torchvision": (make_layer, (24, 6, 4)),
    "vit-pytorch": (make_residuals, (2, 1, 3, 3, 24)),
}


@pytest.mark.parametrize("name", BLOCKS)
@torch.no_grad()
def test_all_of_a_block_may_be_in_int8(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("moat_kernels.calibration._MOST_ERROR", 1.0)
    make, size = BLOCKS[name]
    stock = make()
    torch.manual_seed(0)
    frozen, report = freeze(fused_copy(stock), [torch.randn(8, *size) for _ in range(2)])
    assert [layer.step.split(": ")[-1] for layer in report] == ["attention half", "MLP"]
    assert all(0 < layer.error < INT8_ERROR and layer.int8 for layer in report)
    assert in_int8(frozen) == 2
    for batch in (1, 3):
        x = torch.randn(batch, *size)
        exact = copy.deepcopy(stock).double()(x.double())
        assert relative_error(frozen(x).double(), exact) < INT8_ERROR


@torch.no_grad()
def test_what_hurts_stays_in_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    """A channel a thousand times the others spoils the scale of a tensor."""
    monkeypatch.setattr("moat_kernels.calibration._MOST_ERROR", 0.005)
    model = fused_copy(make_foreign_model("torchvision maxvit").eval())
    names = {module: name for name, module in model.named_modules()}
    *_, layer = (m for m in model.modules() if type(m).__name__ == "FusedPartitionAttentionLayer")
    norm, fc1, *_ = layer.mlp_layer
    norm.weight[3] = 1000.0
    fc1.weight[:, 3] /= 1000.0
    frozen, report = freeze(model, batches())
    chosen = {entry.step: entry.int8 for entry in report}
    assert not chosen[f"{names[layer]}: MLP"]
    assert sum(chosen.values()) == in_int8(frozen) >= 3
    assert "int8 in 1 of 2 layers" in repr(frozen.get_submodule(names[layer]))


@torch.no_grad()
def test_the_report_names_what_is_left() -> None:
    model = fused_copy(make_foreign_model("changzy00").eval())
    _, report = freeze(model, batches(1))
    left = [layer for layer in report if layer.reason]
    assert left and all(math.isnan(layer.error) and not layer.int8 for layer in left)
    names = dict(model.named_modules())
    assert all(layer.step in names for layer in left)
    stock = make_partition()
    stock.mlp.act = nn.Tanh()
    frozen, report = freeze(fused_copy(stock), [torch.randn(2, 4, 6, 24)])
    assert isinstance(frozen, FrozenTransformerBlock)
    reasons = {layer.step: layer.reason for layer in report}
    assert reasons.pop("attention half") == ""
    assert set(reasons) == {"norm2", "mlp", "ls2", "drop_path2"}
    assert set(reasons.values()) == {"no step computes it"}


@torch.no_grad()
def test_the_model_is_left_as_it_was() -> None:
    model = fused_copy(make_foreign_model("timm maxvit tf").eval())
    kinds = [type(module) for module in model.modules()]
    before = copy.deepcopy(model.state_dict())
    frozen, _ = freeze(model, batches(1))
    assert [type(module) for module in model.modules()] == kinds
    assert not any(module._forward_pre_hooks for module in model.modules())
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])
    assert not {id(module) for module in model.modules()} & {id(m) for m in frozen.modules()}
    for module in frozen.modules():
        assert getattr(module, "_part", None) is None


@torch.no_grad()
def test_calibrations_that_tell_nothing() -> None:
    model = fused_copy(make_foreign_model("torchvision maxvit").eval())
    with pytest.raises(ValueError, match="at least one batch"):
        mk.freeze(model, torch.int8, [])
    spoilt = images(1)
    spoilt[0, 0, 0, 0] = float("nan")
    with pytest.raises(ValueError, match="values that are not finite inside"):
        mk.freeze(model, torch.int8, [spoilt])
    nn.init.constant_(model.classifier[-1].weight, float("inf"))
    with pytest.raises(ValueError, match="results that are not finite"):
        mk.freeze(model, torch.int8, batches(1))


class Largest(nn.Module):
    """As many results as there are positive ones, some of them twice or not at all."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.calls = 0

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        self.calls += 1
        return {"numbers": self.model(x).flatten()[: self.calls], "labels": torch.arange(3)}


@torch.no_grad()
def test_results_that_cannot_be_compared() -> None:
    model = fused_copy(Largest(make_foreign_model("torchvision maxvit")).eval())
    frozen, report = freeze(model, batches(2))
    assert report and not any(layer.int8 for layer in report) and not in_int8(frozen)
    assert all(layer.error == math.inf for layer in report)
    assert frozen(images(1))["numbers"].dim() == 1


class Half(nn.Module):
    """Never calls one of its blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.used, self.unused = make_partition(), make_partition()

    def forward(self, x: Tensor) -> tuple[Tensor, list[Tensor]]:
        y = self.used(x)
        return y, [y + 1]


@torch.no_grad()
def test_blocks_that_no_batch_comes_to() -> None:
    frozen, report = freeze(fused_copy(Half().eval()), [torch.randn(2, 4, 6, 24)])
    assert {layer.step.split(": ")[0] for layer in report} == {"used"}
    assert in_int8(frozen.unused) == 0
    x = torch.randn(1, 4, 6, 24)
    assert torch.equal(frozen(x)[0] + 1, frozen(x)[1][0])


@torch.no_grad()
def test_beside_blocks_of_this_package() -> None:
    torch.manual_seed(0)
    block = mk.FusedMOATBlock(24, 24, head_dim=12, window_size=3)
    model = nn.Sequential(block, make_partition("2d").float()).eval()
    mk.fuse(model)
    frozen, report = freeze(model, [torch.randn(4, 24, 4, 6)])
    assert [layer.step for layer in report] == [
        *("0: inverted bottleneck 0", "0: attention half 1", "1: attention half", "1: MLP"),
    ]
    assert in_int8(frozen) == sum(layer.int8 for layer in report)
