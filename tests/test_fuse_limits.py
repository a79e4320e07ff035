"""Every row of the second table of supported cases: what a fused block is combined with."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
from support.foreign_models import make_foreign_model
from support.fusing import check_same, randomize, reasons, run
from support.peers import import_peer
from support.twins import changzy00
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.utils.flop_counter import FlopCounterMode

import moat_kernels as mk
from moat_kernels.adapters.cases import COMBINATIONS
from moat_kernels.ops.common import backends


@pytest.fixture(autouse=True)
def warnings_afresh(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "_warned", set())


class Doubled(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return 2 * weight


def make_block() -> nn.Module:
    torch.manual_seed(0)
    return randomize(changzy00.MBConv(16, 16, use_se=True))


def make_input() -> Tensor:
    return torch.randn(2, 16, 6, 6, dtype=torch.float64)


def fused(block: nn.Module) -> nn.Module:
    """A fused copy."""
    block = copy.deepcopy(block)
    assert len(mk.fuse(block).fused) == 1
    return block


def check_fused(block: nn.Module, changed: nn.Module | None = None) -> None:
    """Both modes equal the stock block's, without a warning."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", mk.FallbackWarning)
        for training in (True, False):
            x = make_input()
            actual = run(changed or fused(block), x, training=training)
            check_same(actual, run(block, x, training=training))


def check_falls_back(block: nn.Module, stock: nn.Module, reason: str) -> None:
    x = make_input()
    with pytest.warns(mk.FallbackWarning, match=f"{reason}; running unfused"):
        check_same(run(block, x, training=True), run(stock, x, training=True))


def synchronised_norms() -> None:
    """In one process; tests/distributed has those of several."""
    block = make_block()
    for convert in (mk.convert_sync_batchnorm, nn.SyncBatchNorm.convert_sync_batchnorm):
        check_fused(block, convert(fused(block)))
        check_fused(block, fused(convert(copy.deepcopy(block))))


def norms_of_every_kind() -> None:
    block = make_block()
    block.bn = nn.BatchNorm2d(16, track_running_stats=False, affine=False).double()
    block.bn1.momentum = None
    check_fused(block)
    changed = fused(block)
    for each in (block, changed):
        each.train = lambda mode=True, each=each: nn.Module.train(each, mode).bn2.eval() and each
    check_fused(block, changed)


def other_norms() -> None:
    for norm in (nn.InstanceNorm2d(64), nn.GroupNorm(4, 64)):
        block = make_block()
        block.bn2 = norm
        assert reasons(block) == {f"{type(norm).__name__} in place of a batch norm"}


def hooks_and_parametrizations() -> None:
    block = make_block()
    parametrize.register_parametrization(block.conv1, "weight", Doubled())
    seen: list[int] = []
    block.register_forward_hook(lambda *_: seen.append(1))
    check_fused(block)
    assert len(seen) == 4


def hooks_inside() -> None:
    stock = make_block()
    block = fused(stock)
    handle = block.bn1.register_forward_hook(lambda *_: None)
    check_falls_back(block, stock, "an inner BatchNorm2d has hooks")
    handle.remove()
    block.bn2.forward = block.bn2.forward
    check_falls_back(block, stock, "the forward of an inner BatchNorm2d was replaced")


def changed_settings() -> None:
    stock = make_block()
    block = fused(stock)
    for each in (block, stock):
        each.conv1.bias = nn.Parameter(torch.ones(64, dtype=torch.float64))
        each.bn1.eps = 0.5
    check_fused(stock, block)
    for each in (block, stock):
        each.conv2.dilation, each.conv2.padding = (2, 2), (2, 2)
    check_falls_back(block, stock, r"dilation \(2, 2\)")


def replaced_modules() -> None:
    stock = make_block()
    block = fused(stock)
    for each in (block, stock):
        each.act = nn.Hardswish()
    check_falls_back(block, stock, "activation Hardswish")


def frozen_norms() -> None:
    FrozenBatchNorm2d = import_peer("torchvision.ops.misc").FrozenBatchNorm2d
    block = make_block()
    norm = FrozenBatchNorm2d(16, block.bn.eps).double()
    norm.load_state_dict(block.bn.state_dict())
    block.bn = norm
    check_fused(block)


class Subclass(Tensor):
    """As a quantised weight is one."""


def tensor_subclasses() -> None:
    stock = make_block()
    block = fused(stock)
    weight = nn.Parameter(stock.conv1.weight.detach().as_subclass(Subclass))
    block.conv1.weight = weight
    check_falls_back(block, stock, "a Subclass among its tensors")
    mk.unfuse(block)
    assert reasons(block) == {"a Subclass among its tensors"}


def hooks_for_all() -> None:
    stock = make_block()
    block = fused(stock)
    handle = nn.modules.module.register_module_forward_hook(lambda *_: None)
    try:
        check_falls_back(block, stock, "hooks for all modules are registered")
    finally:
        handle.remove()
    with FlopCounterMode(display=False):
        check_fused(stock, block)


def fx_tracing() -> None:
    block = fused(make_block()).eval()
    traced = torch.fx.symbolic_trace(nn.Sequential(block, nn.ReLU()))
    assert [node.op for node in traced.graph.nodes].count("call_module") == 2
    x = make_input()
    assert torch.equal(traced(x), block(x).relu())


def meta_device() -> None:
    with torch.device("meta"):
        block = changzy00.MBConv(16, 16)
    assert "meta device" in next(iter(reasons(block)))


def class_changed() -> None:
    stock = make_block()
    block = fused(stock)
    block.__class__ = type("Sharded", (type(block),), {})
    check_fused(stock, block)
    with pytest.raises(RuntimeError, match="became a Sharded"):
        mk.unfuse(block)


def other_dtypes() -> None:
    block = fused(make_block())
    for dtype in (torch.int64, torch.complex128):
        with pytest.raises(TypeError, match=f"x must be float64.*got {dtype}"):
            block(make_input().to(dtype))


def function_transforms() -> None:
    block, x = fused(make_block()).eval(), make_input()

    def mapped() -> Tensor:
        return torch.func.vmap(lambda sample: block(sample[None]))(x)

    with pytest.raises(RuntimeError, match=r"no rules for torch\.func.*'reference'"):
        mapped()
    with mk.use_backend("reference"):
        assert torch.allclose(mapped()[:, 0], block(x))


def second_derivatives() -> None:
    block = fused(make_block())

    def penalty() -> Tensor:
        x = make_input().requires_grad_()
        (grad,) = torch.autograd.grad(block(x).square().sum(), x, create_graph=True)
        grad.square().sum().backward()
        return x.grad

    with pytest.raises(RuntimeError, match="differentiate twice"):
        penalty()
    with mk.use_backend("reference"):
        assert penalty().abs().max() > 0


def forward_derivatives() -> None:
    block, x = fused(make_block()).eval(), make_input()

    def slope() -> Tensor:
        with forward_ad.dual_level():
            return forward_ad.unpack_dual(
                block(forward_ad.make_dual(x, torch.ones_like(x)))
            ).tangent

    with pytest.raises(NotImplementedError, match="jvp"):
        slope()
    with mk.use_backend("reference"):
        step = 1e-6
        difference = (block(x + step) - block(x - step)) / (2 * step)
        assert torch.allclose(slope(), difference, rtol=1e-4, atol=1e-6)


def torchscript() -> None:
    model = nn.Sequential(fused(make_block()).eval())
    for make in (torch.jit.script, lambda module: torch.jit.trace(module, make_input())):
        with pytest.raises(RuntimeError, match="fused blocks do not become TorchScript"):
            make(model)


CHECKS = (
    *(synchronised_norms, norms_of_every_kind, other_norms, hooks_and_parametrizations),
    *(hooks_inside, changed_settings, replaced_modules, frozen_norms, tensor_subclasses),
    *(hooks_for_all, fx_tracing, meta_device, class_changed, other_dtypes),
    *(function_transforms, second_derivatives, forward_derivatives, torchscript),
)


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize(
    "check", [pytest.param(c, id=name) for name, c in zip(COMBINATIONS, CHECKS, strict=True)]
)
def test_combinations(check: Callable[[], None]) -> None:
    check()


@pytest.mark.filterwarnings("ignore:torch.ao.quantization is deprecated")
def test_linear_layers_quantised_after_fuse() -> None:
    """Those around attention are called; a gate made of them makes its block run unfused."""
    from torch.ao.quantization import quantize_dynamic

    stock = make_foreign_model("vit-pytorch maxvit").float().eval()
    model = copy.deepcopy(stock)
    mk.fuse(model)
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        exact, expected = stock(x), quantize_dynamic(stock, {nn.Linear})(x)
        quantised = quantize_dynamic(model, {nn.Linear})
        with pytest.warns(mk.FallbackWarning, match="Linear in place of a convolution"):
            actual = quantised(x)
    assert (actual - expected).abs().max() <= (expected - exact).abs().max()
