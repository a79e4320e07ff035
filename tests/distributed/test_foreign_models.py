"""Other people's models, fused, with synchronised norms: ranks equal one stock process."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from itertools import cycle
from unittest import mock

import pytest
import torch
from support.foreign_models import MODELS, RESOLUTION, make_foreign_model
from support.joined_batch import Batch, check_ranks, make_batches, train_step
from support.tolerances import BACKEND_GRADIENT, assert_close
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import moat_kernels as mk
from moat_kernels.adapters.fused import FusedModule
from moat_kernels.ops.common import synchronization
from moat_kernels.ops.mbconv.algebra import synchronized as mbconv_synchronized

UNEQUAL = [3, 1, 2, 2]


def convert_then_fuse(model: nn.Module, convert: Callable) -> nn.Module:
    model = convert(model)
    mk.fuse(model)
    return model


def fuse_then_convert(model: nn.Module, convert: Callable) -> nn.Module:
    mk.fuse(model)
    return convert(model)


def ddp_step(name: str, prepare: Callable, samples: int, batch: Batch) -> dict[str, Tensor]:
    with warnings.catch_warnings():
        warnings.simplefilter("error", mk.FallbackWarning)
        model = prepare(make_foreign_model(name), mk.convert_sync_batchnorm)
        assert sum(isinstance(m, FusedModule) for m in model.modules()) == MODELS[name][1]
        return train_step(DistributedDataParallel(model), batch, samples)


@pytest.mark.parametrize(
    ("name", "prepare"),
    list(zip(MODELS, cycle([convert_then_fuse, fuse_then_convert]), strict=False)),
)
def test_ranks_equal_one_stock_process_on_the_joined_batch(ranks, name: str, prepare) -> None:
    """Logits, gradients and running statistics, these with PyTorch's unbiased variance."""
    model = make_foreign_model(name)
    joined, shares = make_batches(UNEQUAL, resolution=RESOLUTION)
    results = ranks.run(ddp_step, name, prepare, sum(UNEQUAL), each=shares)
    check_ranks(results, train_step(model, joined, sum(UNEQUAL)))


def blocks_of(name: str) -> nn.Module:
    """The convolutional blocks alone: PyTorch's synchronised norm itself runs on GPUs only."""
    model = make_foreign_model(name)
    report = mk.fuse(model)
    mk.unfuse(model)
    paths = [entry.path for entry in report.fused if entry.op == "mbconv"]
    return nn.ModuleList(model.get_submodule(path) for path in paths[:2])


def by_torch(name: str, model: nn.Module) -> nn.Module:
    """What the implementation's users call."""
    if name.startswith("timm"):
        from timm.layers import convert_sync_batchnorm

        return convert_sync_batchnorm(model)
    return nn.SyncBatchNorm.convert_sync_batchnorm(model)


def run_blocks(blocks: nn.Module, inputs: list[Tensor]) -> list[Tensor]:
    """Outputs, gradients of the inputs, gradients of the parameters, buffers."""
    inputs = [x.clone().requires_grad_() for x in inputs]
    outputs = [block(x) for block, x in zip(blocks, inputs, strict=True)]
    # A sum over samples, in which channels count differently: norms remove what they share.
    weights = [torch.linspace(0, 1e-2, y.shape[1]).view(-1, 1, 1) for y in outputs]
    sum((y.square() * w).sum() for y, w in zip(outputs, weights, strict=True)).backward()
    own = [*outputs, *(x.grad for x in inputs)]
    return [t.detach() for t in (*own, *(p.grad for p in blocks.parameters()), *blocks.buffers())]


def run_converted_blocks(name: str, prepare: Callable, inputs: list[Tensor]) -> list[Tensor]:
    with warnings.catch_warnings():
        warnings.simplefilter("error", mk.FallbackWarning)
        return run_blocks(prepare(blocks_of(name), lambda model: by_torch(name, model)), inputs)


@pytest.mark.parametrize(
    ("name", "prepare"),
    list(
        zip(
            [name for name in MODELS if name != "RooKichenn"],
            cycle([fuse_then_convert, convert_then_fuse]),
            strict=False,
        )
    ),
)
def test_blocks_converted_by_torch_or_timm_are_fused(ranks, name: str, prepare) -> None:
    """RooKichenn's twin has no timm norm, whose activation PyTorch's conversion would drop."""
    blocks = blocks_of(name)
    parameters, buffers = len(list(blocks.parameters())), len(list(blocks.buffers()))
    widths = [next(p for p in block.parameters() if p.dim() == 4).shape[1] for block in blocks]
    inputs = [torch.randn(sum(UNEQUAL), width, 6, 6, dtype=torch.float64) for width in widths]
    shares = list(zip(*(x.split(UNEQUAL) for x in inputs), strict=True))
    expected = run_blocks(blocks, inputs)
    results = ranks.run(run_converted_blocks, name, prepare, each=shares)
    for index, value in enumerate(expected):
        actual = [one[index] for one in results]
        if index < 2 * len(blocks):
            joined = torch.cat(actual)
        elif index < 2 * len(blocks) + parameters:
            joined = torch.stack(actual).sum(0)
        else:
            assert index < 2 * len(blocks) + parameters + buffers
            joined = actual[0]
        assert_close(joined, value, BACKEND_GRADIENT[torch.float64], str(index), floor=1e-3)


def reductions_of_a_block(x: Tensor) -> int:
    """How many all-reduces a training forward of one block takes."""
    block = convert_then_fuse(blocks_of("changzy00")[0], mk.convert_sync_batchnorm)
    reduce = mock.Mock(side_effect=synchronization.all_reduce)
    with (
        mk.use_backend("torch"),
        mock.patch.object(synchronization, "all_reduce", reduce),
        mock.patch.object(mbconv_synchronized, "all_reduce", reduce),
    ):
        block(x)
    return reduce.call_count


def test_three_norms_take_two_all_reduces(ranks) -> None:
    """One for the two around the expand convolution, one for the third."""
    shares = torch.randn(8, 16, 8, 8, dtype=torch.float64).split(UNEQUAL)
    assert ranks.run(reductions_of_a_block, each=shares) == [2] * 4


def fuse_on_one_rank(rank: int) -> int:
    """Trying blocks out before they are fused waits for nobody."""
    model = mk.convert_sync_batchnorm(make_foreign_model("changzy00"))
    return len(mk.fuse(model).fused) if rank == 0 else 0


def test_fuse_talks_to_no_other_rank(ranks) -> None:
    assert ranks.run(fuse_on_one_rank, each=range(4)) == [6, 0, 0, 0]
