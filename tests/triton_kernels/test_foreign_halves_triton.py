"""Attention halves of timm's and torchvision's blocks by Triton kernels, against float64."""

from __future__ import annotations

import copy
import dataclasses
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
from support.peers import import_peer
from support.tolerances import (
    BACKEND_GRADIENT,
    BACKEND_OUTPUT,
    LOW_PRECISION_FACTOR,
    assert_close,
    relative_error,
)
from torch import Tensor, nn

import moat_kernels as mk
from moat_kernels import FallbackWarning, use_backend

pytest.importorskip("triton")

from moat_kernels.ops.triton_support.launching import listening

timm = import_peer("timm.models.maxxvit")
torchvision = import_peer("torchvision.models.maxvit")

# What the half launches in training; attention's kernels stand between.
FORWARD = ["norm_and_cast_kernel", "forward_kernel"]
BACKWARD = ["branch_gradient_kernel", "fold_sums_kernel"]


def settings(**options) -> object:
    defaults = {"window_size": (2, 3), "grid_size": (2, 3), "dim_head": 16}
    return dataclasses.replace(timm.MaxxVitTransformerCfg(), **{**defaults, **options})


def coatnet(rel_pos_type: str = "bias", **options) -> tuple[nn.Module, Tensor]:
    config = settings(rel_pos_type=rel_pos_type, **options)
    bias = timm.get_rel_pos_cls(config, (3, 5))
    block = timm.TransformerBlock2d(32, 32, 1, bias, config, drop_path=0.5)
    return block, torch.randn(2, 32, 3, 5)


def maxvit(kind: str, partition: str, **options) -> tuple[nn.Module, Tensor]:
    block = getattr(timm, kind)(32, partition, settings(**options), drop_path=0.5)
    return block, torch.randn(2, *((4, 6, 32) if kind.endswith("Cl") else (32, 4, 6)))


def layer(partition: str) -> tuple[nn.Module, Tensor]:
    size = (4, 4) if partition == "grid" else (4, 2)
    block = torchvision.PartitionAttentionLayer(
        32, 16, 2, partition, size, 2, nn.GELU, nn.LayerNorm, 0.0, 0.0, 0.5
    )
    return block, torch.randn(2, 32, *size)


# Both layouts of qkv, each table of positions, layer scales.
BLOCKS: dict[str, Callable[[], tuple[nn.Module, Tensor]]] = {
    "coatnet": coatnet,
    "coatnet, layer scale, no table": lambda: coatnet("", init_values=0.5),
    "windows of rows": lambda: maxvit(
        "PartitionAttentionCl", "block", rel_pos_type="bias_tf", head_first=False
    ),
    "grid of rows, layer scale": lambda: maxvit("PartitionAttentionCl", "grid", init_values=0.5),
    "grid of maps": lambda: maxvit("PartitionAttention2d", "grid", rel_pos_type="bias"),
    "torchvision, windows": lambda: layer("window"),
    "torchvision, grid": lambda: layer("grid"),
}


class DrawnInFloat32(nn.Module):
    """Stochastic depth in float64 of the draws that float32 has: on a GPU they are others."""

    def __init__(self, drop_path: nn.Module) -> None:
        super().__init__()
        self.drop_path = drop_path

    def forward(self, x: Tensor) -> Tensor:
        return x * self.drop_path(x.new_ones(len(x), 1, 1, 1, dtype=torch.float32)).to(x.dtype)


def make(name: str, device: str) -> tuple[nn.Module, nn.Module, Tensor]:
    """The stock block, the same fused, and an input; nothing is 0 or 1."""
    torch.manual_seed(0)
    stock, x = BLOCKS[name]()
    for parameter in stock.parameters():
        nn.init.normal_(parameter, 0.1, 0.3)
    fused = nn.Sequential(copy.deepcopy(stock))
    assert len(mk.fuse(fused).fused) == 1
    return stock.to(device), fused[0].to(device), x.to(device)


def exact(stock: nn.Module) -> nn.Module:
    stock = copy.deepcopy(stock).double()
    for name in ("drop_path1", "drop_path2", "stochastic_dropout"):
        if name in stock._modules:
            setattr(stock, name, DrawnInFloat32(stock._modules[name]))
    return stock


def step(block: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """Output and gradients of one step; drop paths draw the same each time."""
    torch.manual_seed(4)  # on a CPU the second sample loses both branches
    leaf = x.detach().requires_grad_()
    output = block(leaf)
    generator = torch.Generator().manual_seed(2)
    output.backward(torch.randn(output.shape, generator=generator).to(output))
    gradients = {name: p.grad for name, p in block.named_parameters() if p.grad is not None}
    return {"output": output.detach(), "x": leaf.grad, **gradients}


@contextmanager
def by_triton(launched: list[str]) -> Iterator[None]:
    listener = listening(lambda launch: launched.append(launch.kernel.fn.__name__))
    with use_backend("triton"), warnings.catch_warnings(), listener:
        warnings.simplefilter("error", FallbackWarning)
        yield


@pytest.mark.parametrize("name", BLOCKS)
def test_training(name: str, device: str) -> None:
    stock, fused, x = make(name, device)
    launched: list[str] = []
    with by_triton(launched):
        actual = step(fused, x)
    assert launched[:2] == FORWARD
    assert [launched[2], launched[-1]] == BACKWARD
    expected = step(exact(stock), x.double())
    assert actual.keys() == expected.keys()
    for key, value in expected.items():
        tolerance = BACKEND_OUTPUT if key == "output" else BACKEND_GRADIENT
        assert actual[key].dtype == torch.float32, key
        assert_close(actual[key], value, tolerance[torch.float32], key, floor=0.1)


@pytest.mark.parametrize("name", ["coatnet", "grid of rows, layer scale", "torchvision, windows"])
@torch.no_grad()
def test_without_gradients(name: str, device: str) -> None:
    stock, fused, x = make(name, device)
    launched: list[str] = []
    with by_triton(launched):
        actual = fused.eval()(x)
    assert launched == FORWARD
    expected = exact(stock).eval()(x.double())
    assert actual.stride() == expected.stride()
    assert_close(actual, expected, BACKEND_OUTPUT[torch.float32], "output", floor=0.1)


@pytest.mark.parametrize(
    ("name", "x_dtype"),
    [("coatnet", torch.float32), ("grid of rows, layer scale", torch.bfloat16)],
    ids=str,
)
def test_autocast(name: str, x_dtype: torch.dtype, device: str) -> None:
    """Of the dtypes of stock, and as close to float64."""
    stock, fused, x = make(name, device)
    x = x.to(x_dtype)
    launched: list[str] = []
    sums: list[torch.dtype] = []
    for block in (stock, fused):
        block.norm2.register_forward_pre_hook(lambda _, inputs: sums.append(inputs[0].dtype))
    with torch.autocast(device, torch.bfloat16):
        eager = step(stock, x)
        with by_triton(launched):
            actual = step(fused, x)
    assert launched[:2] == ["norm_and_cast_kernel", "forward_kernel"]
    assert sums[0] == sums[1]
    for key, value in step(exact(stock), x.double()).items():
        assert actual[key].dtype == eager[key].dtype, key
        allowed = LOW_PRECISION_FACTOR * relative_error(eager[key], value)
        assert_close(actual[key], value, allowed + torch.finfo(torch.bfloat16).eps, key)


def test_float16_does_not_scale_the_weights(device: str) -> None:
    """Layer scales begin at 1e-6: weights times that are nothing in float16."""
    _, fused, x = make("grid of rows, layer scale", device)
    launched: list[str] = []
    with torch.autocast(device, torch.float16), by_triton(launched):
        fused(x)
    assert launched == ["spread_bias_kernel", "forward_kernel"]  # attention alone


@pytest.mark.parametrize("memory_format", [torch.channels_last, torch.contiguous_format], ids=str)
@pytest.mark.parametrize("name", ["coatnet", "windows of rows"])
def test_memory_formats_are_kept(
    name: str, memory_format: torch.memory_format, device: str
) -> None:
    stock, fused, x = make(name, device)
    if name == "coatnet":
        x = x.contiguous(memory_format=memory_format)
    else:
        maps = x.permute(0, 3, 1, 2).contiguous(memory_format=memory_format)
        x = maps.permute(0, 2, 3, 1)
    with by_triton([]):
        assert fused(x).stride() == stock(x).stride()


def test_compiled_without_graph_breaks(device: str) -> None:
    stock, fused, x = make("windows of rows", device)
    torch._dynamo.reset()
    compiled = torch.compile(fused, fullgraph=True, backend="aot_eager")
    launched: list[str] = []
    with by_triton(launched):
        actual = step(compiled, x)
    assert launched[:2] == FORWARD
    expected = step(stock, x)
    assert_close(actual["output"], expected["output"], 2 * BACKEND_OUTPUT[torch.float32])
    assert_close(actual["x"], expected["x"], 2 * BACKEND_GRADIENT[torch.float32])
