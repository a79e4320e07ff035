"""Cases from public bug reports of drop-in replacements: plain and fused do the same.

Plain is `moat_kernels.reference` with the same weights. What each stands for is enumerated, and
drawn at random, in the files beside this one.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from support.fusing import check_same, randomize, run
from support.peers import import_peer
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import checkpoint

import moat_kernels as mk
from moat_kernels.ops.common import backends
from moat_kernels.reference import MBConvBlock, MOATBlock, SameConv2d
from moat_kernels.stem import FusedStem, Stem

MBCONV = {"in_channels": 8, "out_channels": 8}
DOWN = {"in_channels": 8, "out_channels": 16, "stride": 2}
MOAT = {"in_channels": 32, "out_channels": 32, "window_size": 4, "position_size": 7}


@pytest.fixture(autouse=True)
def warnings_afresh(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "_warned", set())


def make_pair(arguments: dict[str, Any]) -> tuple[MBConvBlock, MBConvBlock]:
    """(plain, fused) with the same weights, in float64."""
    torch.manual_seed(0)
    kinds = (MBConvBlock, mk.FusedMBConv)
    if "window_size" in arguments:
        kinds = (MOATBlock, mk.FusedMOATBlock)
    plain = randomize(kinds[0](**arguments))
    fused = kinds[1](**arguments).double()
    fused.load_state_dict(plain.state_dict())
    return plain, fused


def check(
    plain: nn.Module, fused: nn.Module, edit: Callable[[Any], None], channels: int = 8
) -> None:
    """The same edit, then the same numbers: in training, in eval, without gradients."""
    for module in (plain, fused):
        torch.manual_seed(1)
        edit(module)
    x = torch.randn(2, channels, 9, 8, dtype=torch.float64)
    for training in (True, False):
        expected = run(plain, x, training=training)
        check_same(run(fused, x, training=training), expected)
    with torch.no_grad():
        check_same({"y": fused(x)}, {"y": plain(x)})


def add_bias(block: Any) -> None:
    block.expand_conv.bias = nn.Parameter(torch.randn(len(block.expand_conv.weight)).double())


def move_the_stride(block: Any) -> None:
    block.depthwise_conv.stride, block.expand_conv.stride = (1, 1), (2, 2)


def group(block: Any) -> None:
    block.expand_conv = nn.Conv2d(8, 32, 1, groups=2, bias=False).double()


def leave_the_pool_out(block: Any) -> None:
    block.pool, block.depthwise_conv.stride, block.stride = None, (1, 1), 1


@pytest.mark.parametrize(
    ("arguments", "edit", "is_fused"),
    [
        (MBCONV, add_bias, True),
        (DOWN, move_the_stride, False),
        (MBCONV, group, False),
        (DOWN, leave_the_pool_out, True),
    ],
)
def test_settings_changed_in_place(arguments: dict, edit: Callable, is_fused: bool) -> None:
    """Computed as they are, or unfused with a warning; `fuse` and `freeze` read them alike."""
    plain, fused = make_pair(arguments)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        check(plain, fused, edit)
    assert is_fused == (not any(issubclass(w.category, mk.FallbackWarning) for w in seen))
    later = copy.deepcopy(plain)
    assert bool(mk.fuse(later).fused) == is_fused
    x = torch.randn(2, 8, 9, 8)
    plain, fused = plain.float().eval(), fused.float().eval()
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore", mk.FallbackWarning)
        try:
            frozen = mk.freeze(fused)
        except ValueError:  # nothing in it can be frozen
            return
        assert torch.allclose(frozen(x), plain(x), atol=1e-5)


def convolution(*arguments: Any, **options: Any) -> nn.Module:
    return nn.Conv2d(*arguments, **options).double()


REPLACED = {
    "expand_conv": partial(convolution, 8, 32, 1),
    "depthwise_conv": partial(convolution, 32, 32, 3, groups=32, dilation=2, padding=2),
    "shrink_conv": partial(convolution, 32, 8, 3, padding=1),
    "pre_norm": lambda: nn.Sequential(nn.GroupNorm(2, 8), nn.Identity()).double(),
    "expand_norm": nn.Identity,
    "se": nn.Identity,
    "drop_path": partial(nn.Dropout2d, 0.5),
}


@pytest.mark.parametrize("name", REPLACED)
def test_modules_replaced(name: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", mk.FallbackWarning)
        check(*make_pair(MBCONV), lambda block: setattr(block, name, REPLACED[name]()))


def test_a_depthwise_convolution_that_reflects() -> None:
    reflect = partial(convolution, 32, 32, 3, groups=32, padding=1, padding_mode="reflect")
    with pytest.warns(mk.FallbackWarning, match="padding_mode 'reflect'; running unfused"):
        check(*make_pair(MBCONV), lambda block: setattr(block, "depthwise_conv", reflect()))


@pytest.mark.parametrize("settings", [{"dilation": (2, 2)}, {"padding_mode": "reflect"}])
def test_settings_of_same_convolutions(settings: dict) -> None:
    """The reference's own class does what its settings say."""
    conv, stock = SameConv2d(4, 4, 3, **settings), nn.Conv2d(4, 4, 3, padding="same", **settings)
    stock.load_state_dict(conv.state_dict())
    x = torch.randn(1, 4, 7, 8)
    assert torch.allclose(conv(x), stock(x), atol=1e-6)


@pytest.mark.parametrize("norm", [partial(nn.RMSNorm, 32), nn.Identity])
def test_the_attention_norm_replaced(norm: Callable) -> None:
    def edit(block: Any) -> None:
        block.attention_norm = norm().double()

    with pytest.warns(mk.FallbackWarning, match="attention_norm was replaced"):
        check(*make_pair(MOAT), edit, channels=32)


def test_a_patched_stem_convolution() -> None:
    plain, fused = randomize(Stem(8)), FusedStem(8).double()
    fused.load_state_dict(plain.state_dict())

    def edit(stem: Any) -> None:
        forward = stem.conv_1.forward
        stem.conv_1.forward = lambda x: 2 * forward(x)

    with pytest.warns(mk.FallbackWarning, match="the forward of conv_1 was replaced"):
        check(plain, fused, edit, channels=3)


def test_weights_that_are_there_only_while_a_module_runs() -> None:
    """As accelerate's cpu_offload does: on meta otherwise, by a forward put on each module."""

    def offload(block: nn.Module) -> None:
        for module in block.modules():
            own = dict(module.named_parameters(recurse=False))
            if not own:
                continue
            for name, value in own.items():
                setattr(module, name, nn.Parameter(value.detach().to("meta")))

            def forward(
                *inputs: Tensor, module: Any = module, own: Any = own, run: Any = module.forward
            ) -> Tensor:
                for name, value in own.items():
                    setattr(module, name, nn.Parameter(value.detach()))
                output = run(*inputs)
                for name, value in own.items():
                    setattr(module, name, nn.Parameter(value.detach().to("meta")))
                return output

            module.forward = forward

    for arguments in (MBCONV, MOAT):
        plain, fused = make_pair(arguments)
        x = torch.randn(2, arguments["in_channels"], 8, 8, dtype=torch.float64)
        expected = plain.eval()(x)
        offload(fused.eval())
        with torch.no_grad(), pytest.warns(mk.FallbackWarning, match="was replaced; running"):
            check_same({"y": fused(x)}, {"y": expected.detach()})


def small_moat(fused: bool = True, **options: Any) -> mk.MOAT:
    torch.manual_seed(0)
    sizes = {"stem_width": 8, "widths": (8, 16, 32, 32), "depths": (1, 1, 2, 1)}
    return mk.MOAT(**sizes, num_classes=5, fused=fused, **options)


def test_the_same_block_twice_in_a_stage() -> None:
    model = small_moat().eval()
    with torch.no_grad():
        x = torch.rand(1, 3, 64, 64)
        model.stages[2][0] = nn.Identity()  # makes room for a block of stage 3's width
        model.stages[2][0], twice = small_moat().stages[2][0].eval(), model.stages[2][1]
        model.stages[2].append(twice)
        features = model.forward_stages(x)
        once = features[2]
        for block in model.stages[2]:
            once = block(once)
        assert torch.equal(features[3], once)
        assert torch.allclose(mk.freeze(model)(x), model(x), atol=1e-5)


class Quantised(Tensor):
    """A weight that is more than its memory, as torchao's are: it doubles as it is used."""

    @classmethod
    def __torch_function__(
        cls, function: Any, types: Any, arguments: Any = (), options: Any = None
    ):
        if function in (torch.nn.functional.linear, torch.conv2d, torch.nn.functional.conv2d):
            plain = [2 * a.as_subclass(Tensor) if type(a) is cls else a for a in arguments]
            return function(*plain, **(options or {}))
        return super().__torch_function__(function, types, arguments, options)


@pytest.mark.parametrize(
    "names", [("attention.qkv", "attention.proj"), ("expand_conv",)], ids=", ".join
)
def test_quantised_weights(names: tuple[str, ...]) -> None:
    """Before and after `fuse`, and frozen."""

    def quantise(block: nn.Module) -> None:
        for name in names:
            module = block.get_submodule(name)
            weight = module.weight.detach().as_subclass(Quantised)
            module.weight = nn.Parameter(weight, requires_grad=False)

    plain, fused = (block.float().eval() for block in make_pair(MOAT))
    later = copy.deepcopy(plain)
    for block in (plain, fused, later):
        quantise(block)
    x = torch.randn(1, 32, 8, 8)
    report = mk.fuse(later)
    assert report.fused or "Quantised among its tensors" in report.skipped[0].reason
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore", mk.FallbackWarning)
        for block in (fused, later):
            assert torch.allclose(block(x), plain(x), atol=1e-5)
        with pytest.raises(ValueError, match="nothing in model can be frozen"):
            mk.freeze(fused)


def test_a_default_device() -> None:
    block = MBConvBlock(8, 8)
    torch.set_default_device("meta")
    try:
        report = mk.fuse(block)
    finally:
        torch.set_default_device(None)
    assert report.fused, report


@pytest.mark.parametrize("kind", [MBConvBlock, mk.FusedMBConv])
def test_statistics_that_only_the_recomputation_tracks(kind: type[MBConvBlock]) -> None:
    """As fairscale's checkpointing does; otherwise the forward pass counts a batch, once."""
    block = kind(8, 8).train()
    norms = [m for m in block.modules() if isinstance(m, nn.BatchNorm2d)]

    def tracked(x: Tensor) -> Tensor:
        for norm in norms:
            norm.track_running_stats = torch.is_grad_enabled()
        return block(x)

    x = torch.randn(2, 8, 6, 6, requires_grad=True)
    for count in (1, 2):
        checkpoint(tracked, x, use_reentrant=True).sum().backward()
        assert [int(norm.num_batches_tracked) for norm in norms] == [count] * 3
    checkpoint(block, x, use_reentrant=False).sum().backward()
    assert [int(norm.num_batches_tracked) for norm in norms] == [3] * 3


def test_torch_fx_sees_fused_modules_as_nodes() -> None:
    model = small_moat().eval()
    graph = torch.fx.symbolic_trace(model)
    x = torch.rand(2, 3, 64, 64)
    assert torch.allclose(graph(x), model(x), atol=1e-6)
    targets = [node.target for node in graph.graph.nodes if node.op == "call_module"]
    assert targets[:3] == ["stem", "stages.0.0", "stages.1.0"]
    features_only = mk.MOAT(8, (8, 16, 32, 32), (1, 1, 1, 1), features_only=True).eval()
    traced = torch.fx.symbolic_trace(features_only)(x)
    assert all(torch.allclose(traced[k], v, atol=1e-6) for k, v in features_only(x).items())


@pytest.mark.parametrize("package", ["torchvision", "timm"])
def test_feature_extractors(package: str) -> None:
    """torchvision's of a fused MaxViT, and timm's of a fused CoAtNet, equal those of the stock."""
    feature_extraction = import_peer("torchvision.models.feature_extraction")
    torch.manual_seed(0)
    if package == "torchvision":
        options = {"block_channels": [8], "block_layers": [1], "stem_channels": 8}
        options |= {"head_dim": 4, "stochastic_depth_prob": 0.0, "partition_size": 2}
        stock = import_peer("torchvision").models.MaxVit(input_size=(16, 16), **options).eval()
        node, x = "blocks.0", torch.rand(1, 3, 16, 16)
    else:
        stock = import_peer("timm").create_model("coatnet_pico_rw_224").stages[:2].eval()
        node, x = "0", torch.rand(1, 64, 16, 16)
    fused = copy.deepcopy(stock)
    assert mk.fuse(fused).fused
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected, actual = (
            feature_extraction.create_feature_extractor(model, {node: "y"})(x)["y"]
            for model in (stock, fused)
        )
    assert torch.allclose(actual, expected, atol=1e-4)


def test_frozen_batch_norms_are_fused() -> None:
    """torchvision's, which timm makes too: no gradients, statistics that never change."""
    FrozenBatchNorm2d = import_peer("torchvision.ops.misc").FrozenBatchNorm2d
    plain, fused = make_pair(MBCONV)

    def edit(block: Any) -> None:
        for name in ("pre_norm", "expand_norm", "depthwise_norm"):
            norm = getattr(block, name)
            frozen = FrozenBatchNorm2d(norm.num_features, norm.eps).double()
            frozen.load_state_dict(norm.state_dict())
            setattr(block, name, frozen)

    with warnings.catch_warnings():
        warnings.simplefilter("error", mk.FallbackWarning)
        check(plain, fused, edit)
    assert mk.fuse(copy.deepcopy(plain)).fused


@pytest.mark.parametrize("way", ["instance", "subclass"])
@pytest.mark.parametrize(
    ("arguments", "method"), [(DOWN, "shortcut"), (MOAT, "shortcut"), (MOAT, "self_attention")]
)
def test_documented_methods_overridden(arguments: dict, method: str, way: str) -> None:
    def edit(block: Any) -> None:
        original = getattr(type(block), method)
        if way == "instance":
            setattr(block, method, lambda x: 2 * original(block, x))
        else:
            change = {method: lambda self, x: 2 * original(self, x)}
            block.__class__ = type("Mine", (type(block),), change)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", mk.FallbackWarning)
        check(*make_pair(arguments), edit, channels=arguments["in_channels"])


def test_fuse_tries_out_without_a_trace() -> None:
    """A spectral-normed block in training: its power iteration stays where it was, and it fuses."""
    block = MBConvBlock(8, 8).train()
    parametrizations.spectral_norm(block.expand_conv)
    plain = copy.deepcopy(block)
    assert mk.fuse(block).fused
    for name, value in plain.state_dict().items():
        assert torch.equal(block.state_dict()[name], value), name
    x = torch.randn(2, 8, 6, 6)
    for _ in range(2):
        assert torch.allclose(block(x), plain(x), atol=1e-5)
    for name, value in plain.state_dict().items():
        assert torch.allclose(block.state_dict()[name], value, atol=1e-5), name


@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
@pytest.mark.parametrize("name", ["pre_norm", "expand_norm", "depthwise_norm"])
def test_norm_weights_that_are_not_dense(name: str, training: bool) -> None:
    """In channels_last PyTorch's own backward pass reads beyond a weight that was expanded."""
    dense, expanded = make_pair(MBCONV)[0], make_pair(MBCONV)
    for block in (dense, *expanded):
        norm = getattr(block, name)
        weight = torch.full((1,), 1.3).double().expand(norm.num_features)
        weight = weight.contiguous() if block is dense else weight
        norm.weight = nn.Parameter(weight, requires_grad=False)
    x = torch.randn(2, 8, 9, 8, dtype=torch.float64).contiguous(memory_format=torch.channels_last)
    expected = run(dense, x, training=training)
    for block in expanded:
        check_same(run(block, x, training=training), expected)


def test_a_norm_that_would_raise_is_not_frozen() -> None:
    block = mk.FusedMOATBlock(**MOAT).eval()
    block.attention_norm.normalized_shape = (1,)
    with pytest.raises(ValueError, match=r"a layer norm over \(1,\)"):
        mk.freeze(block)


def hooked_sequential(model: mk.MOAT) -> None:
    model.stages[2] = nn.Sequential(*model.stages[2])
    model.stages[2].register_forward_hook(lambda module, inputs, output: 2 * output)


def a_block_alone(model: mk.MOAT) -> None:
    model.stages[0] = model.stages[0][0]


@pytest.mark.parametrize("edit", [hooked_sequential, a_block_alone])
def test_stages_of_other_kinds_frozen(edit: Callable) -> None:
    model = small_moat().eval()
    edit(model)
    x = torch.rand(1, 3, 64, 64)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore", mk.FallbackWarning)
        assert torch.allclose(mk.freeze(model)(x), model(x), atol=1e-5)
