"""Frozen modules in turn: one native call, as long as nothing else is to happen."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from support.foreign_models import RESOLUTION, make_foreign_model
from support.fusing import randomize
from support.native import needs_extension
from support.peers import import_peer
from support.tolerances import BACKEND_MODEL_OUTPUT, assert_close
from torch import Tensor, nn

import moat_kernels as mk
from moat_kernels.chains import FrozenChain
from moat_kernels.frozen_modules import FrozenBlock

pytestmark = [
    needs_extension,
    pytest.mark.filterwarnings("ignore:freeze. this CPU does not multiply"),
]
maxxvit = import_peer("timm.models.maxxvit")
timm = import_peer("timm")


def make_blocks() -> nn.Sequential:
    """Two blocks, a module that is not frozen, and two blocks of which one lies deeper."""
    return nn.Sequential(
        *(mk.FusedMBConv(8, 8), mk.FusedMOATBlock(8, 12, window_size=3, head_dim=4), nn.Tanh()),
        *(mk.FusedMBConv(12, 12), nn.Sequential(mk.FusedMBConv(12, 16, stride=2))),
    ).eval()


def make_stock(name: str, **options) -> nn.Module:
    settings = {"embed_dim": (32, 32, 64, 64), "depths": (1, 1, 2, 1), "num_classes": 5}
    model = timm.create_model(name, img_size=RESOLUTION, **settings, **options)
    return randomize(model).eval().float()


def make_timm(name: str = "coatnet_0_224") -> nn.Module:
    model = make_stock(name)
    mk.fuse(model)
    return model


def native_calls(call: Callable[[], Tensor], monkeypatch: pytest.MonkeyPatch) -> int:
    """How often frozen modules call the native op."""
    count = 0
    outputs = mk.ops.frozen.FrozenSequence.outputs

    def counted(*arguments):
        nonlocal count
        count += 1
        return outputs(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(mk.ops.frozen.FrozenSequence, "outputs", counted)
        call()
    return count


def one_by_one(frozen: nn.Sequential, x: Tensor) -> Tensor:
    for module in frozen:
        x = one_by_one(module, x) if isinstance(module, nn.Sequential) else module(x)
    return x


@pytest.mark.parametrize("maps", [None, torch.bfloat16])
@torch.no_grad()
def test_sequences(maps: torch.dtype | None, monkeypatch: pytest.MonkeyPatch) -> None:
    frozen = mk.freeze(make_blocks(), maps)
    assert isinstance(frozen, FrozenChain) and isinstance(frozen, nn.Sequential)
    for x in (torch.randn(2, 8, 9, 7), torch.randn(1, 8, 6, 6), torch.randn(0, 8, 6, 6)):
        for memory_format in (torch.contiguous_format, torch.channels_last):
            x = x.contiguous(memory_format=memory_format)
            result = frozen(x)
            expected = one_by_one(frozen, x)
            assert torch.equal(result, expected) and result.stride() == expected.stride()
    x = torch.randn(1, 8, 6, 6)
    assert native_calls(lambda: frozen(x), monkeypatch) == 2
    assert native_calls(lambda: one_by_one(frozen, x), monkeypatch) == 4


@torch.no_grad()
def test_maps_of_a_wider_dtype_are_rounded_between_modules(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    frozen = mk.freeze(make_blocks().half(), torch.float32)
    assert not isinstance(frozen, FrozenChain)


def hook(frozen: nn.Sequential) -> None:
    frozen[0].register_forward_hook(lambda module, inputs, output: output + 1)


def deep_hook(frozen: nn.Sequential) -> None:
    frozen[4][0].register_forward_pre_hook(lambda module, inputs: (inputs[0] + 1,))


def container_hook(frozen: nn.Sequential) -> None:
    frozen[4].register_forward_hook(lambda module, inputs, output: output + 1)


def patch(frozen: nn.Sequential) -> None:
    forward = frozen[1].forward
    frozen[1].forward = lambda x: 2 * forward(x)


def replace(frozen: nn.Sequential) -> None:
    frozen[1] = nn.Conv2d(8, 12, 1)


def replace_deep(frozen: nn.Sequential) -> None:
    frozen[4][0] = nn.Conv2d(12, 16, 1)


def append(frozen: nn.Sequential) -> None:
    frozen.append(nn.Tanh())


def remove(frozen: nn.Sequential) -> None:
    del frozen[4]


@pytest.mark.parametrize(
    "change",
    [hook, deep_hook, container_hook, patch, replace, replace_deep, append, remove],
)
@torch.no_grad()
def test_what_is_changed_afterwards_counts(change: Callable[[nn.Sequential], None]) -> None:
    frozen = mk.freeze(make_blocks())
    x = torch.randn(2, 8, 6, 6)
    before = frozen(x)
    change(frozen)

    def run(container: nn.Sequential, x: Tensor) -> Tensor:
        for module in container:
            x = module(x)
        return x

    expected = run(frozen, x)
    assert expected.shape != before.shape or not torch.equal(expected, before)
    assert torch.equal(frozen(x), expected)


@torch.no_grad()
def test_copies_and_slices() -> None:
    frozen = mk.freeze(make_blocks())
    x = torch.randn(2, 8, 6, 6)
    clone = copy.deepcopy(frozen)
    expected = frozen(x)
    assert torch.equal(clone(x), expected)
    clone[0] = nn.Conv2d(8, 8, 1)
    assert not torch.equal(clone(x), expected)
    assert torch.equal(frozen(x), expected)
    assert torch.equal(frozen[:2](x), frozen[1](frozen[0](x)))
    assert not frozen.state_dict()


@torch.no_grad()
def test_hooks_for_all_modules_see_every_call() -> None:
    frozen = mk.freeze(make_blocks())
    seen = []
    handle = nn.modules.module.register_module_forward_hook(lambda module, *_: seen.append(module))
    try:
        frozen(torch.randn(1, 8, 6, 6))
    finally:
        handle.remove()
    assert sum(isinstance(module, FrozenBlock) for module in seen) == 4


@pytest.mark.parametrize("name", ["coatnet_0_224", "maxvit_tiny_tf_224"])
@pytest.mark.parametrize("maps", [None, torch.bfloat16])
@torch.no_grad()
def test_models_of_timm(
    name: str, maps: torch.dtype | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    frozen = mk.freeze(make_timm(name), maps)
    assert isinstance(frozen, maxxvit.MaxxVit)
    x = torch.randn(2, 3, RESOLUTION, RESOLUTION)
    assert native_calls(lambda: frozen(x[:0]), monkeypatch) > 3  # nothing to try it out on
    first, second = frozen.forward_features(x), frozen.forward_features(x)
    assert torch.equal(first, second)
    assert native_calls(lambda: frozen(x), monkeypatch) == 1
    last, maps_between = frozen.forward_intermediates(x)
    assert torch.equal(last, first) and len(maps_between) == 5
    seen: list[Tensor] = []
    frozen.stages[2].register_forward_hook(lambda *calls: seen.append(calls[2]))
    assert torch.equal(frozen.forward_features(x), first)
    assert torch.equal(seen[0], maps_between[3])


@pytest.mark.parametrize("maps", [None, torch.bfloat16])
@torch.no_grad()
def test_a_model_of_torchvision(maps: torch.dtype | None, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_foreign_model("torchvision maxvit").eval().float()
    mk.fuse(model)
    frozen = mk.freeze(model, maps)
    assert isinstance(frozen, FrozenChain) and isinstance(frozen, type(model))
    assert isinstance(frozen.stem, FrozenBlock)
    x = torch.randn(2, 3, RESOLUTION, RESOLUTION)
    first = frozen(x)
    assert native_calls(lambda: frozen(x), monkeypatch) == 1
    assert torch.equal(frozen(x), first)
    frozen.stem.register_forward_hook(lambda module, inputs, output: -output)
    expected = frozen.classifier(frozen.blocks[1](frozen.blocks[0](frozen.stem(x))))
    assert torch.equal(frozen(x), expected) and not torch.equal(expected, first)


@pytest.mark.parametrize(
    ("name", "options", "size"),
    [
        ("coatnet_0_224", {"transformer_rel_pos_type": ""}, (72, 96)),
        ("maxvit_tiny_tf_224", {}, (64, 128)),
    ],
)
@torch.no_grad()
def test_images_of_other_sizes(
    name: str, options: dict, size: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    check_whole(make_stock(name, **options), size, monkeypatch)


@pytest.mark.parametrize("name", ["coatnet_0_224", "maxvit_tiny_tf_224"])
@pytest.mark.filterwarnings("ignore::UserWarning:timm")
@torch.no_grad()
def test_another_input_size_set_before(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    stock = make_stock(name)
    stock.set_input_size((96, 64))
    check_whole(stock, (96, 64), monkeypatch)


def check_whole(stock: nn.Module, size: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Fused and frozen it gives the same, in one native call."""
    model = copy.deepcopy(stock)
    assert not mk.fuse(model).skipped
    frozen = mk.freeze(model)
    x = torch.randn(2, 3, *size)
    expected = stock.double()(x.double())
    for _ in range(2):  # one by one, and as a chain
        assert_close(frozen(x), expected, BACKEND_MODEL_OUTPUT)
    assert native_calls(lambda: frozen(x), monkeypatch) == 1


@torch.no_grad()
def test_features_of_timm(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = {"embed_dim": (32, 32, 64, 64), "depths": (2, 1, 2, 1), "img_size": RESOLUTION}
    model = timm.create_model("coatnet_0_224", features_only=True, **settings).eval()
    x = torch.randn(2, 3, RESOLUTION, RESOLUTION)
    expected = model(x)
    mk.fuse(model)
    frozen = mk.freeze(model)
    frozen(x)
    assert native_calls(lambda: frozen(x), monkeypatch) == 5
    for found, stock in zip(frozen(x), expected, strict=True):
        torch.testing.assert_close(found, stock, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_a_container_of_the_same_name_with_another_forward() -> None:
    class MaxxVitStage(maxxvit.MaxxVitStage):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    model = make_timm()
    model.stages[2].__class__ = MaxxVitStage
    frozen = mk.freeze(model)
    x = torch.randn(2, 3, RESOLUTION, RESOLUTION)
    expected = model(x)
    with pytest.warns(mk.FallbackWarning, match="run one by one"):
        first = frozen(x)
    for found in (first, frozen(x)):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
