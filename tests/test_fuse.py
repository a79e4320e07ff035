"""`fuse` and `unfuse`: in place, exact, back again, visible, and unnoticed by all other code."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from support.fusing import check_same, randomize, run
from support.twins import apple, changzy00
from torch import Tensor, nn
from torch.nn.utils import parametrize

import moat_kernels as mk
from moat_kernels.ops.common import backends


@pytest.fixture(autouse=True)
def warnings_afresh(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "_warned", set())


def make_model(**options) -> nn.Module:
    torch.manual_seed(0)
    settings = {"stem_dim": 16, "embed_dims": (16, 32, 64, 64), "depths": (1, 2, 1, 1)}
    return randomize(changzy00.MOAT(**settings, num_classes=3, **options))


def make_input() -> Tensor:
    return torch.randn(2, 3, 64, 64, dtype=torch.float64)


def make_block() -> nn.Module:
    torch.manual_seed(0)
    return randomize(changzy00.MBConv(16, 16, use_se=True))


def test_the_report_names_every_module() -> None:
    model = make_model(attn_drop=0.1)
    model.layer1[0].act = nn.Hardswish()
    report = mk.fuse(model)
    assert str(report).splitlines() == [
        "fused 6 modules: 4 by mbconv, 2 by window_attention",
        "  layer2.0  MBConv of changzy00 MOAT",
        "  layer2.1  MBConv of changzy00 MOAT",
        "  layer3.0.mbconv  MBConv of changzy00 MOAT",
        "  layer3.0.attn  Attention of changzy00 MOAT; "
        "in eval only: dropout of the attention weights, p=0.1",
        "  layer4.0.mbconv  MBConv of changzy00 MOAT",
        "  layer4.0.attn  Attention of changzy00 MOAT; "
        "in eval only: dropout of the attention weights, p=0.1",
        "left 1 modules as they are:",
        "  layer1.0  MBConv: activation Hardswish",
    ]


def test_a_block_by_itself() -> None:
    block = make_block()
    report = mk.fuse(block)
    assert [(entry.path, entry.op) for entry in report.fused] == [("", "mbconv")]
    assert "(the model)  MBConv of changzy00 MOAT" in str(report)
    assert repr(block).startswith("FusedMBConv(")
    assert isinstance(block, changzy00.MBConv)


def test_nothing_but_the_class_changes_and_unfuse_puts_it_back() -> None:
    model = make_model()
    before = {path: (type(module), dict(vars(module))) for path, module in model.named_modules()}
    tensors = {name: id(tensor) for name, tensor in model.state_dict(keep_vars=True).items()}
    report = mk.fuse(model)
    assert {
        name: id(tensor) for name, tensor in model.state_dict(keep_vars=True).items()
    } == tensors
    assert all(dict(vars(module)) == before[path][1] for path, module in model.named_modules())
    assert mk.unfuse(model) == tuple(entry.path for entry in report.fused)
    assert all(type(module) is before[path][0] for path, module in model.named_modules())
    assert mk.unfuse(model) == ()


def test_fusing_again_changes_nothing_and_changes_recompute() -> None:
    model = make_model()
    report = mk.fuse(model)
    classes = [type(module) for module in model.modules()]
    assert mk.fuse(model) == report
    assert [type(module) for module in model.modules()] == classes
    assert mk.fuse(model, recompute="block") == report
    assert {m.recompute for m in model.modules() if hasattr(m, "recompute")} == {"block"}


@pytest.mark.parametrize("recompute", ["none", "expand", "block"])
def test_every_level_of_recompute(recompute: str) -> None:
    stock, x = make_model(), make_input()
    fused = copy.deepcopy(stock)
    mk.fuse(fused, recompute)
    check_same(run(fused, x, training=True), run(stock, x, training=True))


@pytest.mark.parametrize("training", [True, False])
def test_copies_and_pickles_stay_fused(training: bool) -> None:
    model, x = make_model(), make_input()
    mk.fuse(model)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    copies = [
        copy.deepcopy(model),
        pickle.loads(pickle.dumps(model)),
        torch.load(file, weights_only=False),
    ]
    for copied in copies:
        assert [type(a) for a in copied.modules()] == [type(a) for a in model.modules()]
        assert not set(map(id, copied.parameters())) & set(map(id, model.parameters()))
    expected = run(model, x, training=training)
    for copied in copies:
        check_same(run(copied, x, training=training), expected)
        assert len(mk.unfuse(copied)) == 7
    assert type(model.layer1[0]) is not changzy00.MBConv  # the original stays fused


def test_a_checkpoint_story() -> None:
    """Stock model and checkpoint -> fuse -> train -> save -> unfuse -> load into a stock model."""
    checkpoint = make_model().state_dict()
    histories = []
    for fused in (True, False):
        model = make_model()
        nn.init.zeros_(model.head.weight)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)  # made before fuse
        model.load_state_dict(checkpoint)
        if fused:
            mk.fuse(model)
        torch.manual_seed(1)
        for _ in range(3):
            optimizer.zero_grad()
            model(make_input()).square().mean().backward()
            optimizer.step()
        histories.append(copy.deepcopy(model.state_dict()))
        if fused:
            mk.unfuse(model)
            assert type(model.layer1[0]) is changzy00.MBConv
    trained, expected = histories
    assert list(trained) == list(checkpoint)
    check_same(trained, expected)
    stock, x = make_model(), make_input()
    stock.load_state_dict(trained)
    trained_twin = make_model()
    trained_twin.load_state_dict(trained)
    mk.fuse(trained_twin)
    check_same(run(trained_twin, x, training=False), run(stock, x, training=False))


def test_hooks_on_a_block_keep_working() -> None:
    block, x = make_block(), torch.randn(2, 16, 6, 6).double()
    seen = []
    block.register_forward_hook(lambda module, inputs, output: seen.append(output.shape))
    mk.fuse(block)
    block(x)
    block.register_forward_pre_hook(lambda module, inputs: (2 * inputs[0],))
    doubled = block.eval()(x)
    mk.unfuse(block)
    assert torch.allclose(block(x), doubled)
    assert len(seen) == 3


def test_inner_modules_hooked_or_replaced_before_are_not_fused() -> None:
    block = make_block()
    block.bn1.register_forward_hook(lambda *arguments: None)
    assert mk.fuse(block).skipped[0].reason == "an inner BatchNorm2d has hooks"
    block = make_block()
    block.conv3 = nn.Sequential(block.conv3)
    assert mk.fuse(block).skipped[0].reason == "Sequential in place of a convolution"
    block = make_block()
    block.adapter = nn.Conv2d(16, 16, 1)
    assert mk.fuse(block).skipped[0].reason == "unknown adapter"
    block = make_block()
    block.scale = nn.Parameter(torch.ones(16))
    assert mk.fuse(block).skipped[0].reason == "unknown scale"
    block = make_block()
    block.forward = block.forward
    assert mk.fuse(block).skipped[0].reason == "its forward was replaced"


def test_inner_modules_hooked_or_replaced_later_run_as_themselves() -> None:
    block, x = make_block(), torch.randn(2, 16, 6, 6).double()
    stock = copy.deepcopy(block)
    mk.fuse(block)
    seen = []
    handle = block.bn1.register_forward_hook(lambda module, inputs, output: seen.append(1))
    with pytest.warns(mk.FallbackWarning, match="an inner BatchNorm2d has hooks; running unfused"):
        check_same(run(block, x, training=True), run(stock, x, training=True))
    assert seen == [1]
    handle.remove()
    for each in (block, stock):
        each.act = nn.Hardswish()
    with pytest.warns(mk.FallbackWarning, match="MBConv: activation Hardswish; running unfused"):
        check_same(run(block, x, training=True), run(stock, x, training=True))
    block.bn2.forward = block.bn2.forward
    with pytest.warns(mk.FallbackWarning, match="the forward of an inner BatchNorm2d was replaced"):
        block(x)


def test_parametrized_weights() -> None:
    class Doubled(nn.Module):
        def forward(self, weight: Tensor) -> Tensor:
            return 2 * weight

    block, x = make_block(), torch.randn(2, 16, 6, 6).double()
    parametrize.register_parametrization(block.conv1, "weight", Doubled())
    stock = copy.deepcopy(block)
    assert len(mk.fuse(block).fused) == 1
    check_same(run(block, x, training=True), run(stock, x, training=True))


def test_norms_that_are_frozen_cumulative_or_without_statistics() -> None:
    block, x = make_block(), torch.randn(2, 16, 6, 6).double()
    block.bn = nn.BatchNorm2d(16, track_running_stats=False, affine=False).double()
    block.bn2.momentum = None
    stock = copy.deepcopy(block)
    mk.fuse(block)
    for training in (True, False):
        check_same(run(block, x, training=training), run(stock, x, training=training))
    for each in (block, stock):
        each.train()
        each.bn1.eval()
        each.train = lambda training, each=each: each  # keeps the frozen norm
    check_same(run(block, x, training=True), run(stock, x, training=True))


def test_subclasses_and_strangers_of_the_same_name_are_left_alone() -> None:
    class WithNoise(changzy00.MBConv):
        pass

    assert mk.fuse(WithNoise(16, 16)).skipped[0].reason == "a subclass of MBConv"
    stranger = type("MbConvBlock", (nn.Sequential,), {})(nn.Conv2d(3, 3, 1))
    assert mk.fuse(stranger).skipped[0].reason == "a class of this name, but of unknown structure"


def test_our_own_blocks() -> None:
    torch.manual_seed(0)
    options = {"head_dim": 8, "window_size": 4, "position_size": 7}
    stock = nn.Sequential(
        mk.reference.MBConvBlock(8, 16, stride=2), mk.reference.MOATBlock(16, 16, **options)
    )
    randomize(stock)
    fused, x = copy.deepcopy(stock), torch.randn(2, 8, 12, 16).double()
    report = mk.fuse(fused, recompute="block")
    assert [entry.path for entry in report.fused] == ["0", "1", "1.attention"]
    assert isinstance(fused[1], mk.FusedMOATBlock)
    assert isinstance(fused[1].attention, mk.modules.FusedAttention)
    for training in (True, False):
        check_same(run(fused, x, training=training), run(stock, x, training=training))
    copied = pickle.loads(pickle.dumps(fused))
    check_same(run(copied, x, training=False), run(stock, x, training=False))
    mk.unfuse(fused)
    assert [type(module) for module in fused] == [type(module) for module in stock]


def test_our_own_blocks_with_hooks_inside_are_left_alone() -> None:
    block = mk.reference.MBConvBlock(8, 8)
    block.pre_norm.register_forward_hook(lambda *arguments: None)
    assert mk.fuse(block).skipped[0].reason == "pre_norm has hooks"


def test_blocks_that_were_built_fused_are_told() -> None:
    model = mk.create_model("tiny_moat_0")
    report = mk.fuse(model)
    assert {entry.note for entry in report.fused} == {"built fused"}
    assert mk.unfuse(model) == ()


def test_compile_without_graph_breaks() -> None:
    model = randomize(changzy00.MOATBlock(16, 16, stride=1, attn_drop=0.0))
    x = torch.randn(2, 16, 4, 6).double()
    expected = run(copy.deepcopy(model), x, training=True)
    assert len(mk.fuse(model).fused) == 2
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    actual = run(compiled, x, training=True)
    check_same({name.replace("_orig_mod.", ""): value for name, value in actual.items()}, expected)


def test_channels_last_and_autocast() -> None:
    model, x = make_model().float(), make_input().float()
    stock = copy.deepcopy(model)
    mk.fuse(model)
    x = x.to(memory_format=torch.channels_last)
    with torch.autocast("cpu", torch.bfloat16):
        actual, expected = model(x), stock(x)
    assert actual.dtype == expected.dtype
    exact = make_model()(x.double())
    error = (expected - exact).abs().max()
    assert (actual - exact).abs().max() <= 2 * error + 2**-8


def test_one_window_attention_stays_fused_inside_an_unfused_parent() -> None:
    attention = randomize(apple.WindowAttention(32, (2, 3), 2, apple.PEType.SINGLE_HEAD_RPE))
    mk.fuse(attention)
    with (
        pytest.warns(mk.FallbackWarning, match=r"5 tokens for windows of \(2, 3\)"),
        pytest.raises(RuntimeError),
    ):
        attention(torch.randn(2, 5, 32).double())


def test_a_class_changed_after_fusing_is_not_undone() -> None:
    model = make_model()
    mk.fuse(model)
    block = model.layer1[0]
    block.__class__ = type("FSDPMBConv", (type(block),), {})
    with pytest.raises(RuntimeError, match=r"layer1\.0 became a FSDPMBConv after it was fused"):
        mk.unfuse(model)
    assert type(model.layer2[0]) is not changzy00.MBConv  # nothing was undone
    kind = type(block)
    reason = "it was fused, and became a FSDPMBConv since"
    assert mk.fuse(model, recompute="block").skipped[0].reason == reason
    assert type(block) is kind


def test_what_can_no_longer_be_fused_is_stock_after_fusing_again() -> None:
    model = make_model()
    mk.fuse(model)
    model.layer1[0].act = nn.Hardswish()
    assert [entry.path for entry in mk.fuse(model).skipped] == ["layer1.0"]
    assert type(model.layer1[0]) is changzy00.MBConv


def test_bad_arguments_are_named() -> None:
    with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module, got dict"):
        mk.fuse({})
    with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module, got dict"):
        mk.unfuse({})
    with pytest.raises(ValueError, match="recompute must be one of"):
        mk.fuse(make_block(), recompute="all")
