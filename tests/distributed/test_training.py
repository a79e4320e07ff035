"""Whole fused models on several ranks: DDP, FSDP2 and SyncBatchNorm equal one process."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from support.joined_batch import Batch, check_ranks, make_batches, train_step
from support.small_model import CLASSES, make_model
from support.stand_in_graphs import StandIn, standing_in
from support.tolerances import BACKEND_GRADIENT, assert_close
from torch import Tensor, nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel

import moat_kernels as mk
from moat_kernels.normalization import BatchNorm2d
from moat_kernels.reference import MBConvBlock

RANKS = 4
EQUAL, UNEQUAL = [2, 2, 2, 2], [3, 1, 2, 2]


def graphed_step_with_synchronised_norms(samples: int, batch: Batch) -> dict[str, Tensor]:
    with standing_in(), pytest.warns(mk.FallbackWarning, match="norms that are synchronised"):
        model = mk.graphed_model(mk.convert_sync_batchnorm(make_model()))
        return train_step(DistributedDataParallel(model), batch, samples)


def test_synchronised_norms_run_without_a_graph(ranks) -> None:
    joined, shares = make_batches(UNEQUAL)
    results = ranks.run(graphed_step_with_synchronised_norms, sum(UNEQUAL), each=shares)
    check_ranks(results, train_step(make_model(fused=False), joined, sum(UNEQUAL)))


def ddp_step(options: dict[str, Any], samples: int, batch: Batch) -> dict[str, Tensor]:
    model = mk.convert_sync_batchnorm(make_model())
    return train_step(DistributedDataParallel(model, **options), batch, samples)


@pytest.mark.parametrize(
    "options",
    [{}, {"static_graph": True}, {"find_unused_parameters": True}],
    ids=["plain", "static graph", "find unused"],
)
def test_ddp_equals_one_process_on_the_joined_batch(ranks, options: dict[str, Any]) -> None:
    joined, shares = make_batches(UNEQUAL)
    results = ranks.run(ddp_step, options, sum(UNEQUAL), each=shares)
    check_ranks(results, train_step(make_model(fused=False), joined, sum(UNEQUAL)))


def ddp_step_with_local_norms(batch: Batch) -> dict[str, Tensor]:
    return train_step(DistributedDataParallel(make_model()), batch, sum(EQUAL))


def test_ddp_without_synchronised_norms_takes_the_mean_of_the_ranks(ranks) -> None:
    _, shares = make_batches(EQUAL)
    results = ranks.run(ddp_step_with_local_norms, each=shares)
    alone = [train_step(make_model(fused=False), share, len(share[0])) for share in shares]
    for name in (name for name in alone[0] if name.endswith(".grad")):
        mean = torch.stack([one[name] for one in alone]).mean(0)
        for result in results:
            assert_close(result[name], mean, BACKEND_GRADIENT[torch.float64], name, floor=1e-3)


def accumulated_step(graphed: bool, halves: list[Batch]) -> dict[str, Tensor]:
    with standing_in():
        model = make_model()
        model = DistributedDataParallel(mk.graphed_model(model) if graphed else model)
        with model.no_sync():
            train_step(model, halves[0], sum(EQUAL))
        results = train_step(model, halves[1], sum(EQUAL))
        assert StandIn.captures == (2 if graphed else 0)
        return results


@pytest.mark.parametrize("graphed", [False, True], ids=["as it is", "graphed"])
def test_gradient_accumulation(ranks, graphed: bool) -> None:
    _, shares = make_batches(EQUAL)
    halves = [[(x[:1], y[:1]), (x[1:], y[1:])] for x, y in shares]
    results = ranks.run(accumulated_step, graphed, each=halves)
    alone = []
    for first, second in halves:
        model = make_model(fused=False)
        train_step(model, first, 2)
        alone.append(train_step(model, second, 2))
    for name in (name for name in alone[0] if name.endswith(".grad")):
        mean = torch.stack([one[name] for one in alone]).mean(0)
        for result in results:
            assert_close(result[name], mean, BACKEND_GRADIENT[torch.float64], name, floor=1e-3)


def fsdp_step(samples: int, batch: Batch) -> dict[str, Tensor]:
    model = mk.convert_sync_batchnorm(make_model())
    mesh = dist.init_device_mesh("cpu", (RANKS,))
    for block in list(model.modules()):
        if isinstance(block, MBConvBlock):
            fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return train_step(model, batch, samples)


def test_fsdp2_equals_one_process_on_the_joined_batch(ranks) -> None:
    joined, shares = make_batches(UNEQUAL)
    results = ranks.run(fsdp_step, sum(UNEQUAL), each=shares)
    check_ranks(results, train_step(make_model(fused=False), joined, sum(UNEQUAL)))


def fsdp_losses(batch: Batch) -> list[float]:
    """Losses of three steps with parameters in bfloat16 inside forward."""
    model = mk.convert_sync_batchnorm(make_model(torch.float32))
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    mesh = dist.init_device_mesh("cpu", (RANKS,))
    for block in list(model.modules()):
        if isinstance(block, MBConvBlock):
            fully_shard(block, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=policy)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02)
    losses = []
    for _ in range(3):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(batch[0]).float(), batch[1])
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def test_fsdp2_mixed_precision_trains(ranks) -> None:
    _, shares = make_batches(EQUAL, torch.float32)
    for losses in ranks.run(fsdp_losses, each=shares):
        assert losses[-1] < losses[0]


def make_small() -> nn.Module:
    """One block between norms of its own: what takes the compiler least time."""
    torch.manual_seed(0)
    block = mk.FusedMBConv(3, 8, stride=2)
    head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, CLASSES))
    return nn.Sequential(BatchNorm2d(3), block, BatchNorm2d(8), head).double()


def compiled_step(samples: int, batch: Batch) -> dict[str, Tensor]:
    torch._dynamo.reset()
    model = mk.convert_sync_batchnorm(make_small())
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager", dynamic=False)
    results = train_step(DistributedDataParallel(compiled), batch, samples)
    return {name.removeprefix("_orig_mod."): value for name, value in results.items()}


def test_ddp_around_a_compiled_model_with_synchronised_norms(ranks) -> None:
    joined, shares = make_batches(UNEQUAL)
    results = ranks.run(compiled_step, sum(UNEQUAL), each=shares)
    check_ranks(results, train_step(make_small(), joined, sum(UNEQUAL)))
