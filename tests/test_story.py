"""A user's story: from a stock model's checkpoint through fast training back into a stock model.

`fuse`, DistributedDataParallel over two processes, synchronised batch norm, autocast to bfloat16
and, of this package's model and of one of others, torch.compile; then `unfuse`, and the trained
checkpoint in a stock model.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from support.foreign_models import RESOLUTION, make_foreign_model
from support.ranks import Ranks
from support.small_model import CLASSES, make_model
from support.tolerances import BACKEND_OUTPUT, assert_close
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import moat_kernels as mk

STEPS, BATCH, RANKS = 3, 8, 2
COMPILED = ("reference", "timm coatnet")


def make_batches() -> list[tuple[Tensor, Tensor]]:
    """The batch of each step; all the same, so that its loss must fall."""
    torch.manual_seed(5)
    images = torch.randn(BATCH, 3, RESOLUTION, RESOLUTION)
    return [(images, torch.randint(CLASSES, (BATCH,)))] * STEPS


def train(model: nn.Module, batches: list[tuple[Tensor, Tensor]]) -> list[float]:
    """What any training loop does, under autocast; the losses."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9)
    losses = []
    for images, labels in batches:
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(images)
        loss = F.cross_entropy(logits.float(), labels)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def make_stock(name: str) -> nn.Module:
    """This package's plain model, or somebody else's."""
    return (
        make_model(fused=False).float() if name == "reference" else make_foreign_model(name).float()
    )


def train_fused(name: str, before: Path, after: Path, rank: int) -> tuple[list[float], Tensor]:
    """One process of the training; its losses, and what the trained model makes of all images."""
    model = make_stock(name)
    model.load_state_dict(torch.load(before, weights_only=True))
    assert mk.fuse(model).fused
    mk.convert_sync_batchnorm(model)
    parallel: nn.Module = DistributedDataParallel(model)
    if name in COMPILED:
        torch._dynamo.reset()
        parallel = torch.compile(parallel, backend="aot_eager")
    batches = make_batches()
    losses = train(parallel, [(x[rank::RANKS], labels[rank::RANKS]) for x, labels in batches])
    if rank == 0:
        torch.save(model.state_dict(), after)
    with torch.no_grad():
        fused = model.eval()(batches[0][0])
        assert mk.unfuse(model)
        assert_close(model(batches[0][0]), fused, BACKEND_OUTPUT[torch.float32], "after unfuse")
    return losses, fused


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ranks]:
    with Ranks(RANKS, tmp_path_factory.mktemp("pair")) as started:
        yield started


@pytest.mark.parametrize("name", ["reference", "timm coatnet", "RooKichenn"])
def test_from_a_stock_checkpoint_and_back(pair: Ranks, tmp_path: Path, name: str) -> None:
    stock = make_stock(name)
    torch.save(stock.state_dict(), tmp_path / "before.pt")
    paths = (tmp_path / "before.pt", tmp_path / "after.pt")
    results = pair.run(train_fused, name, *paths, each=range(RANKS))
    losses = [sum(both) / RANKS for both in zip(*(one for one, _ in results), strict=True)]
    assert losses[-1] < losses[0]
    # bfloat16 keeps 8 bits; what is trained with it drifts apart step by step.
    assert losses == pytest.approx(train(stock, make_batches()), rel=0.05)

    stock.load_state_dict(torch.load(tmp_path / "after.pt", weights_only=True))
    with torch.no_grad():
        outputs = stock.eval()(make_batches()[0][0])
    for _, expected in results:
        assert_close(outputs, expected, BACKEND_OUTPUT[torch.float32])
