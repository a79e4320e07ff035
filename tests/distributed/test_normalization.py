"""Synchronised norm modules, alone and inside fused blocks, by every way that makes them."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist
from support.tolerances import BACKEND_GRADIENT, BACKEND_OUTPUT, assert_close
from torch import Tensor, nn

import moat_kernels as mk
from moat_kernels.normalization import BatchNorm2d, SyncBatchNorm
from moat_kernels.reference import MBConvBlock, MOATBlock

SIZES = [3, 1, 2, 2]
FUSED = {MBConvBlock: mk.FusedMBConv, MOATBlock: mk.FusedMOATBlock}
CHANNELS = 32


def make_block(kind: type[MBConvBlock], *, unbiased: bool = False) -> MBConvBlock:
    torch.manual_seed(0)
    block = kind(CHANNELS, CHANNELS, unbiased_running_var=unbiased).double()
    for parameter in block.parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=0.2)
    return block


def fuse(block: MBConvBlock) -> MBConvBlock:
    """The same block, parameters and norms included, with the fused forward."""
    fused = FUSED[type(block)](CHANNELS, CHANNELS).double()
    fused._modules.update(block._modules)
    return fused


def step(module: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """Output, gradients and buffers; the loss is a sum over samples."""
    x = x.clone().requires_grad_()
    output = module(x)
    (output.square() * torch.linspace(0, 1, output.shape[1]).view(-1, 1, 1)).sum().backward()
    gradients = {f"{name}.grad": p.grad for name, p in module.named_parameters()}
    return {
        "output": output.detach(),
        "x.grad": x.grad,
        **gradients,
        **dict(module.named_buffers()),
    }


def check_joined(results: list[dict[str, Tensor]], expected: dict[str, Tensor]) -> None:
    for name, value in expected.items():
        shares = [one[name] for one in results]
        if name in ("output", "x.grad"):
            actual = torch.cat(shares)
        elif name.endswith(".grad"):
            actual = torch.stack(shares).sum(0)
        else:
            assert all(torch.equal(share, shares[0]) for share in shares), name
            actual = shares[0]
        tolerance = BACKEND_OUTPUT if name == "output" else BACKEND_GRADIENT
        assert_close(actual, value, tolerance[torch.float64], name, floor=1e-3)


def convert_then_fuse(kind: type[MBConvBlock], convert: Callable, x: Tensor) -> dict[str, Tensor]:
    with warnings.catch_warnings():
        warnings.simplefilter("error", mk.FallbackWarning)
        return step(fuse(convert(make_block(kind))), x)


def fuse_then_convert(kind: type[MBConvBlock], convert: Callable, x: Tensor) -> dict[str, Tensor]:
    with warnings.catch_warnings():
        warnings.simplefilter("error", mk.FallbackWarning)
        return step(convert(fuse(make_block(kind))), x)


@pytest.mark.parametrize("order", [convert_then_fuse, fuse_then_convert])
@pytest.mark.parametrize(
    ("convert", "unbiased"),
    [(mk.convert_sync_batchnorm, False), (nn.SyncBatchNorm.convert_sync_batchnorm, True)],
    ids=["ours", "torch's"],
)
@pytest.mark.parametrize("kind", [MBConvBlock, MOATBlock])
def test_fused_blocks_stay_fused(ranks, kind, convert, unbiased: bool, order) -> None:
    """PyTorch's conversion gives our norms PyTorch's running variance, ours keeps theirs."""
    x = torch.randn(sum(SIZES), CHANNELS, 6, 5, dtype=torch.float64)
    results = ranks.run(order, kind, convert, each=x.split(SIZES))
    check_joined(results, step(make_block(kind, unbiased=unbiased), x))


def step_with_a_hook(x: Tensor) -> dict[str, Tensor]:
    block = mk.convert_sync_batchnorm(fuse(make_block(MBConvBlock)))
    block.expand_norm.register_forward_hook(lambda module, inputs, output: None)
    return step(block, x)


def test_an_unfused_block_is_synchronised_too(ranks) -> None:
    x = torch.randn(sum(SIZES), CHANNELS, 6, 5, dtype=torch.float64)
    results = ranks.run(step_with_a_hook, each=x.split(SIZES))
    check_joined(results, step(make_block(MBConvBlock), x))


def step_of_pairs(x: Tensor) -> dict[str, Tensor]:
    groups = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    own = groups[dist.get_rank() // 2]
    return step(mk.convert_sync_batchnorm(fuse(make_block(MBConvBlock)), own), x)


def test_a_process_group_of_one_s_own(ranks) -> None:
    x = torch.randn(sum(SIZES), CHANNELS, 6, 5, dtype=torch.float64)
    results = ranks.run(step_of_pairs, each=x.split(SIZES))
    for pair, share in zip((results[:2], results[2:]), x.split([4, 4]), strict=True):
        check_joined(pair, step(make_block(MBConvBlock), share))


def norm_step(unbiased: bool, momentum: float | None, x: Tensor) -> dict[str, Tensor]:
    norm = SyncBatchNorm(6, 1e-5, momentum, unbiased_running_var=unbiased).double()
    return step(norm, x)


@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("unbiased", [True, False])
def test_a_norm_alone(ranks, unbiased: bool, momentum: float | None) -> None:
    x = 5 + torch.randn(sum(SIZES), 6, 3, 4, dtype=torch.float64)
    expected = step(BatchNorm2d(6, 1e-5, momentum, unbiased_running_var=unbiased).double(), x)
    check_joined(ranks.run(norm_step, unbiased, momentum, each=x.split(SIZES)), expected)
    if unbiased:
        check_joined([step(nn.BatchNorm2d(6, 1e-5, momentum).double(), x)], expected)


def outputs_in_eval(x: Tensor) -> tuple[Tensor, Tensor]:
    block = make_block(MBConvBlock).eval()
    expected = block(x)
    return mk.convert_sync_batchnorm(fuse(block)).eval()(x), expected


def test_eval_mode_talks_to_nobody(ranks) -> None:
    """Ranks hold different samples and one none at all; each gives what it gives alone."""
    shares = torch.randn(6, CHANNELS, 5, 4, dtype=torch.float64).split([3, 0, 1, 2])
    for actual, expected in ranks.run(outputs_in_eval, each=shares):
        assert_close(actual, expected, BACKEND_OUTPUT[torch.float64])
