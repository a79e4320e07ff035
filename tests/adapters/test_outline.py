"""What fused blocks of timm and torchvision keep of themselves, and that every change is seen.

Compared in float64 by the specification, which computes attention halves as kernels do: by one op,
of tensors that are read.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterator

import pytest
import torch
from support.fusing import check_same, randomize, run
from support.native import needs_extension
from support.peers import import_peer
from support.tolerances import BACKEND_OUTPUT, assert_close
from torch import Tensor, nn
from torch.nn.utils import parametrizations

import moat_kernels as mk
from moat_kernels.adapters import transformer
from moat_kernels.adapters.outline import Seen
from moat_kernels.adapters.registry import find_adapter
from moat_kernels.ops.attention_half import cpu

import_peer("timm")
timm = import_peer("timm.models.maxxvit")
torchvision = import_peer("torchvision.models.maxvit")


def make_transformer(kind: str = "PartitionAttentionCl", **options) -> nn.Module:
    defaults = {"window_size": (2, 3), "grid_size": (2, 3), "dim_head": 8, "init_values": 0.5}
    config = dataclasses.replace(timm.MaxxVitTransformerCfg(), **{**defaults, **options})
    if kind == "TransformerBlock2d":
        return timm.TransformerBlock2d(16, 16, 1, timm.get_rel_pos_cls(config, (4, 6)), config, 0.3)
    return getattr(timm, kind)(16, "block", config, 0.3)


def make_mbconv() -> nn.Module:
    return timm.MbConvBlock(16, 16, cfg=timm.MaxxVitConvCfg(), drop_path=0.3)


def make_layer() -> nn.Module:
    return torchvision.PartitionAttentionLayer(
        16, 8, 2, "window", (4, 6), 2, nn.GELU, nn.LayerNorm, 0.0, 0.0, 0.3
    )


BLOCKS = {
    "rows": make_transformer,
    "maps": lambda: make_transformer("TransformerBlock2d", rel_pos_type="mlp"),
    "mbconv": make_mbconv,
    "layer": make_layer,
}


def make_input(name: str) -> Tensor:
    return torch.randn(3, *((4, 6, 16) if name == "rows" else (16, 4, 6))).double()


def make(name: str) -> tuple[nn.Module, nn.Module]:
    """The stock block in float64 and the same fused, which has been called."""
    torch.manual_seed(0)
    stock = randomize(BLOCKS[name]())
    holder = nn.Sequential(copy.deepcopy(stock))
    assert len(mk.fuse(holder).fused) == 1
    return stock, holder[0]


def look(block: nn.Module) -> Seen | None:
    return find_adapter(block.adapter_key).outline.look(block)


@pytest.fixture
def specified() -> Iterator[None]:
    with mk.use_backend("reference"):
        yield


@pytest.mark.usefixtures("specified")
@pytest.mark.parametrize("name", BLOCKS)
def test_blocks_alike_are_read_once(name: str) -> None:
    _, first = make(name)
    seen = look(first.train())
    assert seen is not None
    run(first, make_input(name), training=True)
    again = look(first)
    assert again is not None and again.kept is not None and again.key == seen.key
    assert look(copy.deepcopy(first)).kept is again.kept
    assert look(first.eval()).key != seen.key  # its drop path and its norms compute something else


def double(_: nn.Module, __: object, output: Tensor) -> Tensor:
    return 2 * output


def replace_norm(block: nn.Module, name: str) -> None:
    norm = copy.deepcopy(block.get_submodule(name))
    nn.init.constant_(norm.weight, 3.0)
    block.set_submodule(name, norm)


def patch(module: nn.Module) -> None:
    forward = module.forward
    module.forward = lambda x: 2 * forward(x)


def set_bias(layer: nn.Module) -> None:
    layer.bias = nn.Parameter(torch.full_like(layer.bias, 0.7))


def use_other_rates(block: nn.Module) -> None:
    block.drop_path1.drop_prob, block.drop_path2.drop_prob = 0.6, 0.1


# What a user does to a block after it was fused, and called.
EDITS: dict[str, list[Callable[[nn.Module], object]]] = {
    "rows": [
        lambda block: setattr(block.norm1, "eps", 0.5),
        lambda block: (setattr(block.attn, "fused_attn", False), setattr(block.attn, "scale", 0.9)),
        lambda block: setattr(block.attn, "head_first", not block.attn.head_first),
        lambda block: setattr(block, "partition_block", False),
        lambda block: block.set_partition_size((4, 3)),
        lambda block: block.ls1.gamma.data.mul_(3),
        lambda block: block.attn.qkv.register_forward_hook(double),
        lambda block: block.ls1.register_forward_hook(double),
        lambda block: block.drop_path1.register_forward_hook(double),
        lambda block: block.mlp.fc1.register_forward_hook(double),
        lambda block: block.register_forward_hook(double),
        lambda block: replace_norm(block, "norm1"),
        lambda block: patch(block.attn.proj),
        lambda block: patch(block.norm2),
        lambda block: set_bias(block.attn.proj),
        lambda block: setattr(block.attn.qkv, "bias", None),
        lambda block: setattr(block.attn, "rel_pos", None),
        lambda block: setattr(block, "ls1", nn.Identity()),
        lambda block: setattr(block, "norm1", nn.Identity()),
        lambda block: setattr(block, "norm1", nn.LayerNorm((6, 16), elementwise_affine=False)),
        lambda block: setattr(block.attn, "proj", nn.Sequential(block.attn.proj, nn.Tanh())),
        lambda block: setattr(block, "_partition_attn", lambda x: 3 * x),
        lambda block: parametrizations.spectral_norm(block.attn.qkv),
        lambda block: parametrizations.spectral_norm(block.ls1, "gamma", dim=0),
        use_other_rates,
    ],
    "maps": [
        lambda block: block.shortcut.register_forward_hook(double),
        lambda block: setattr(block, "shortcut", nn.Tanh()),
        lambda block: block.attn.rel_pos.mlp.fc1.register_forward_hook(double),
        lambda block: replace_norm(block, "norm1"),
    ],
    "mbconv": [
        lambda block: setattr(block.norm1, "eps", 0.5),
        lambda block: setattr(block.norm2, "momentum", 0.7),
        lambda block: block.norm2.register_forward_hook(double),
        lambda block: replace_norm(block, "pre_norm"),
        lambda block: setattr(block.norm1, "act", nn.ReLU()),
        lambda block: setattr(block.norm1.act, "forward", torch.tanh),
        lambda block: setattr(block.se.gate, "forward", torch.tanh),
        lambda block: setattr(block.se, "add_maxpool", True),
        lambda block: setattr(block, "se", None),
        lambda block: set_bias(block.conv3_1x1),
        lambda block: setattr(block.drop_path, "drop_prob", 0.6),
        lambda block: setattr(block, "shortcut", nn.Tanh()),
    ],
    "layer": [
        lambda layer: layer.attn_layer[0].register_forward_hook(double),
        lambda layer: setattr(layer.attn_layer[1], "scale_factor", 0.9),
        lambda layer: setattr(layer.stochastic_dropout, "p", 0.6),
        lambda layer: replace_norm(layer, "attn_layer.0"),
    ],
}


@pytest.mark.filterwarnings("ignore::moat_kernels.FallbackWarning")
@pytest.mark.usefixtures("specified")
@pytest.mark.parametrize(
    ("name", "edit"), [(name, edit) for name, edits in EDITS.items() for edit in edits]
)
def test_what_is_changed_later_is_seen(name: str, edit: Callable[[nn.Module], object]) -> None:
    stock, fused = make(name)
    x = make_input(name)
    for block in (stock, fused):
        run(block, x, training=True)
    unchanged = run(copy.deepcopy(stock), x, training=True)
    for block in (stock, fused):
        torch.manual_seed(3)
        edit(block)
    for training in (True, True, False):
        expected = run(stock, x, training=training)
        assert differ(expected, unchanged)
        check_same(run(fused, x, training=training), expected)


def differ(some: dict[str, Tensor], others: dict[str, Tensor]) -> bool:
    same = some.keys() == others.keys()
    return not (same and all(torch.equal(some[name], others[name]) for name in some))


@pytest.mark.usefixtures("specified")
def test_tensors_that_are_replaced_are_read() -> None:
    stock, fused = make("rows")
    x = make_input("rows")
    for _ in range(2):
        for block in (stock, fused):
            run(block, x, training=True)
            block.norm1.weight = nn.Parameter(block.norm1.weight.detach() + 1)
            block.attn.rel_pos.relative_position_bias_table.data.neg_()
        check_same(run(fused, x, training=True), run(stock, x, training=True))


@pytest.mark.usefixtures("specified")
def test_one_module_in_two_places(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is not kept: later there may be two. What is kept of two holds for it."""
    stock, fused = make("mbconv")
    monkeypatch.setattr(find_adapter(fused.adapter_key).outline, "_kept", {})
    x = make_input("mbconv")
    for block in (stock, fused):
        block.norm2 = block.norm1
    check_same(run(fused, x, training=False), run(stock, x, training=False))
    assert look(fused).kept is None
    for block in (stock, fused):
        block.norm2 = copy.deepcopy(block.norm1)
        nn.init.constant_(block.norm2.weight, 3.0)
    check_same(run(fused, x, training=False), run(stock, x, training=False))
    for block in (stock, fused):
        block.norm1 = block.norm2
    assert look(fused).kept is not None
    check_same(run(fused, x, training=False), run(stock, x, training=False))


@pytest.mark.parametrize(
    "touch",
    [
        lambda block: block.conv1_1x1.register_forward_hook(double),
        lambda block: setattr(block.conv1_1x1, "stride", [1, 1]),
        lambda block: parametrizations.weight_norm(block.conv1_1x1),
        lambda block: setattr(block, "norm1", nn.GroupNorm(1, 64)),
        lambda block: setattr(block.norm1, "act", None),
        lambda block: block.register_buffer("more", torch.ones(1)),
        lambda block: setattr(block.se.fc1, "owner", block.se),
    ],
)
def test_what_must_be_looked_at_closely_has_no_outline(
    touch: Callable[[nn.Module], object],
) -> None:
    _, fused = make("mbconv")
    assert look(fused) is not None
    touch(fused)
    assert look(fused) is None


def test_nothing_that_may_change_is_kept() -> None:
    _, fused = make("rows")
    fused.attn.scale = torch.tensor(0.5, dtype=torch.float64)
    fused.eval()(make_input("rows"))
    assert look(fused).kept is None


def evaluations(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """The maps that the native op of the whole half gets from now on."""
    maps: list[Tensor] = []
    evaluate = cpu.evaluate

    def noted(y: Tensor, *arguments: object) -> Tensor:
        maps.append(y)
        return evaluate(y, *arguments)

    monkeypatch.setattr(cpu, "evaluate", noted)
    return maps


@needs_extension
@torch.no_grad()
def test_on_a_cpu_a_native_op_evaluates_the_half(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    stock = randomize(make_transformer(head_first=False)).eval()
    holder = nn.Sequential(copy.deepcopy(stock)).float()
    mk.fuse(holder)
    maps = evaluations(monkeypatch)
    x = torch.randn(2, 4, 6, 16)
    assert_close(holder(x), stock(x.double()), BACKEND_OUTPUT[torch.float32])
    assert len(maps) == 1
    holder(x[:0])  # an empty batch
    holder[0].attn.qkv.register_forward_hook(double)
    stock.attn.qkv.register_forward_hook(double)
    maps.clear()
    assert_close(holder(x), stock(x.double()), BACKEND_OUTPUT[torch.float32])
    assert not maps


@needs_extension
@pytest.mark.parametrize("case", ["training", "grid", "heads first", "float64"])
def test_what_no_kernel_covers_is_computed_by_pieces(
    case: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    maps = evaluations(monkeypatch)
    torch.manual_seed(0)
    block = make_transformer(head_first=case == "heads first")
    block.partition_block = case != "grid"
    holder = nn.Sequential(block.to(torch.float64 if case == "float64" else torch.float32))
    mk.fuse(holder)
    x = torch.randn(2, 4, 6, 16).to(block.norm1.weight)
    with torch.set_grad_enabled(case == "training"):
        holder.train(case == "training")(x)
    assert not maps


def test_where_no_kernel_covers_a_call_parametrizations_run_once() -> None:
    """Each call of a spectral norm in training changes its buffers."""
    stock, fused = make("rows")
    for block in (stock.float(), fused.float()):
        torch.manual_seed(3)
        parametrizations.spectral_norm(block.attn.qkv)
        block.train()(make_input("rows").float())
    for expected, buffer in zip(stock.buffers(), fused.buffers(), strict=True):
        assert torch.equal(expected, buffer)


def refuse(*_: object) -> None:
    raise AssertionError("the half's tensors were read")


def test_training_on_a_cpu_does_not_read_the_half(monkeypatch: pytest.MonkeyPatch) -> None:
    _, fused = make("rows")
    monkeypatch.setattr(transformer, "layer_tensors", refuse)
    run(fused, make_input("rows"), training=True)


def test_a_block_with_a_pool_does_not_read_the_half(monkeypatch: pytest.MonkeyPatch) -> None:
    config = dataclasses.replace(timm.MaxxVitTransformerCfg(), dim_head=8)
    holder = nn.Sequential(timm.TransformerBlock2d(16, 16, 2, None, config)).eval()
    assert [entry.class_name for entry in mk.fuse(holder).fused] == ["TransformerBlock2d"]
    monkeypatch.setattr(transformer, "layer_tensors", refuse)
    with torch.no_grad():
        holder(torch.randn(1, 16, 4, 6))
