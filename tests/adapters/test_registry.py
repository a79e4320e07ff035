"""The user's own adapters, and the table of what is known."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path

import pytest
import torch
from support.fusing import check_fused, randomize
from support.native import needs_extension
from support.tolerances import BACKEND_OUTPUT, assert_close
from torch import Tensor, nn

import moat_kernels as mk
from moat_kernels.adapters import MBConvAdapter, read_bottleneck, registry

PAGE = Path(__file__).parents[2] / "docs" / "fuse.md"


class InvertedResidual(nn.Module):
    """Somebody's block: no norm before, ReLU, identity shortcut."""

    def __init__(self) -> None:
        super().__init__()
        self.expand = nn.Conv2d(8, 16, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.depthwise = nn.Conv2d(16, 16, 3, padding=1, groups=16, bias=False)
        self.bn2 = nn.BatchNorm2d(16)
        self.project = nn.Conv2d(16, 8, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(8)
        self.act = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        y = self.act(self.bn1(self.expand(x)))
        y = self.act(self.bn2(self.depthwise(y)))
        return x + self.bn3(self.project(y))


class InvertedResidualAdapter(MBConvAdapter):
    implementation, class_name = "my models", "InvertedResidual"
    children = ("expand", "bn1", "depthwise", "bn2", "project", "bn3", "act")
    covers = "all of them"

    def read(self, block: InvertedResidual):
        return read_bottleneck(
            expand=block.expand,
            expand_norm=block.bn1,
            expand_activation=block.act,
            depthwise=block.depthwise,
            depthwise_norm=block.bn2,
            depthwise_activation=block.act,
            project=block.project,
            project_norm=block.bn3,
        )


class MistakenAdapter(InvertedResidualAdapter):
    def read(self, block: InvertedResidual):
        return read_bottleneck(
            expand=block.expand,
            expand_norm=block.bn1,
            depthwise=block.depthwise,
            depthwise_norm=block.bn2,
            project=block.project,
            project_norm=block.bn3,
        )


@pytest.fixture(autouse=True)
def own_registry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_ADAPTERS", dict(registry._ADAPTERS))


def test_a_users_block() -> None:
    assert mk.fuse(InvertedResidual()).fused == ()
    mk.register_adapter(InvertedResidualAdapter())
    report = check_fused(InvertedResidual(), torch.randn(2, 8, 5, 6), fused=1)
    assert report.fused[0].implementation == "my models"
    table = mk.supported_cases()
    assert "| my models | `InvertedResidual` | `mbconv` | all of them | |" in table


@needs_extension
@torch.no_grad()
def test_a_users_block_is_frozen() -> None:
    mk.register_adapter(InvertedResidualAdapter())
    stock = randomize(InvertedResidual()).eval()
    model = copy.deepcopy(stock).float()
    mk.fuse(model)
    x = torch.randn(2, 8, 5, 6)
    assert_close(mk.freeze(model)(x), stock(x.double()), BACKEND_OUTPUT[torch.float32])


def test_a_mistaken_adapter_is_found_out() -> None:
    mk.register_adapter(MistakenAdapter())
    (entry,) = mk.fuse(InvertedResidual()).skipped
    assert entry.reason.startswith("its results differ")


def test_a_pickle_names_the_adapter_that_it_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    mk.register_adapter(InvertedResidualAdapter())
    block = InvertedResidual()
    mk.fuse(block)
    pickled = pickle.dumps(block)
    assert type(pickle.loads(pickled)) is type(block)
    monkeypatch.setattr("moat_kernels.adapters.fused._CLASSES", {})  # as in another process
    registry._ADAPTERS.pop("my models: InvertedResidual")
    with pytest.raises(LookupError, match=r"'my models: InvertedResidual'.*register_adapter first"):
        pickle.loads(pickled)


def test_bad_registrations_are_named() -> None:
    with pytest.raises(TypeError, match="adapter must be an instance of a subclass of Adapter"):
        mk.register_adapter(InvertedResidualAdapter)  # type: ignore[arg-type]
    mk.register_adapter(InvertedResidualAdapter())
    with pytest.raises(ValueError, match="'my models: InvertedResidual' is registered already"):
        mk.register_adapter(InvertedResidualAdapter())


@pytest.mark.skipif(not PAGE.exists(), reason="no docs/ here")
def test_a_page_has_the_table_of_supported_cases() -> None:
    assert mk.supported_cases() in PAGE.read_text()
