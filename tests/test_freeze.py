"""Frozen models: the numbers of the model that was frozen, of which they are independent."""

from __future__ import annotations

import copy
import pickle
import warnings
import weakref
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from support.native import needs_extension
from support.small_model import CLASSES, make_model
from support.tolerances import BACKEND_OUTPUT, assert_close
from torch import Tensor, nn

import moat_kernels as mk
from moat_kernels.frozen_modules import FrozenBlock

pytestmark = needs_extension


def make_eval_model(**options) -> mk.MOAT:
    """In float32, with running statistics that are not those of a fresh model."""
    model = make_model(torch.float32, **options)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean, std=0.3)
            nn.init.uniform_(module.running_var, 0.5, 2.0)
    return model.eval()


def images(*size: int) -> Tensor:
    return torch.randn(size[0], 3, *size[1:])


@torch.no_grad()
def expected(model: nn.Module, x: Tensor) -> Tensor:
    """The reference's result, in float64."""
    with mk.use_backend("reference"):
        return copy.deepcopy(model).double()(x.double())


@pytest.mark.each_isa
@pytest.mark.parametrize("batch", [1, 2, 5])
@pytest.mark.parametrize("size", [(64, 64), (33, 47), (96, 70), (1, 1)])
def test_sizes_of_one_model(size: tuple[int, int], batch: int) -> None:
    model = make_eval_model()
    frozen = mk.freeze(model)
    assert isinstance(frozen, mk.FrozenMOAT)
    for x in (images(batch, *size), images(batch, 40, 56), images(1, *size)):
        assert_close(frozen(x), expected(model, x), BACKEND_OUTPUT[torch.float32])


@pytest.mark.each_isa
@pytest.mark.parametrize(
    "options",
    [
        {"num_classes": 0},
        {"window_size": (None, None, 3, (2, 5))},
        {"window_size": (None, None, 4, 2), "global_attention_at_end": True},
        {"position_embedding": False},
        {"pool_size": 3},
        {"stem_width": 20, "widths": (24, 40, 56, 80), "num_classes": 37},
    ],
    ids=lambda options: ", ".join(options),
)
def test_options(options: dict) -> None:
    model = make_eval_model(**options)
    x = images(2, 64, 80)
    assert_close(mk.freeze(model)(x), expected(model, x), BACKEND_OUTPUT[torch.float32])


@pytest.mark.each_isa
@torch.no_grad()
def test_features_are_those_of_the_model_bit_for_bit() -> None:
    model = make_eval_model(features_only=True)
    frozen = mk.freeze(model)
    for x in (images(2, 64, 64), images(2, 64, 64).to(memory_format=torch.channels_last)):
        endpoints, found = model(x), frozen(x)
        assert list(found) == list(endpoints)
        for name, value in endpoints.items():
            assert torch.equal(found[name], value)
            assert found[name].stride() == value.stride()
    with pytest.raises(RuntimeError, match="features_only"):
        frozen.forward_head(endpoints["stage5"])


@torch.no_grad()
def test_the_methods_of_a_model() -> None:
    model = make_eval_model()
    frozen = mk.freeze(model)
    x = images(2, 64, 64)
    for stage, own in zip(frozen.forward_stages(x), model.forward_stages(x), strict=True):
        assert torch.equal(stage, own)
    features = frozen.forward_features(x)
    assert torch.equal(features, model.forward_features(x))
    assert torch.equal(frozen.forward_head(features), frozen(x))
    assert (frozen.num_features, frozen.num_classes) == (model.num_features, CLASSES)


@pytest.mark.each_isa
def test_views_and_empty_batches() -> None:
    model = make_eval_model()
    frozen = mk.freeze(model)
    view = torch.randn(2, 64, 96, 6)[:, :, ::2, ::2].permute(0, 3, 1, 2)
    assert_close(frozen(view), expected(model, view), BACKEND_OUTPUT[torch.float32])
    assert frozen(view[:0]).shape == (0, CLASSES)
    assert [tuple(stage.shape) for stage in frozen.forward_stages(view[:0])] == [
        (0, *stage.shape[1:]) for stage in frozen.forward_stages(view)
    ]


@pytest.mark.each_isa
@pytest.mark.filterwarnings("ignore:freeze. this CPU does not multiply")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("kind", ["mbconv", "mbconv without SE", "moat"])
@torch.no_grad()
def test_single_blocks(kind: str, dtype: torch.dtype) -> None:
    if kind == "moat":
        block: nn.Module = mk.FusedMOATBlock(24, 40, stride=2, window_size=3)
    else:
        block = mk.FusedMBConv(24, 24, se_ratio=None if "without" in kind else 0.25)
    block = block.to(dtype).eval()
    model = mk.freeze(nn.Sequential(nn.Identity(), block).eval())
    assert isinstance(model[1], FrozenBlock)
    for x in (torch.randn(2, 24, 9, 13, dtype=dtype), torch.randn(1, 24, 5, 5, dtype=dtype)):
        for memory_format in (torch.contiguous_format, torch.channels_last):
            x = x.contiguous(memory_format=memory_format)
            assert torch.equal(model(x), block(x))
            assert model(x).stride() == block(x).stride()


@pytest.mark.each_isa
@torch.no_grad()
def test_values_that_are_not_finite_stay_in_their_image() -> None:
    model = make_eval_model()
    x = images(3, 64, 64)
    clean = mk.freeze(model)(x)
    x[1, 0, 20, 30] = float("nan")
    output = mk.freeze(model)(x)
    assert torch.equal(output[[0, 2]], clean[[0, 2]])
    assert output[1].isnan().all()


@torch.no_grad()
def test_a_frozen_model_keeps_the_weights_that_it_was_made_of() -> None:
    model = make_eval_model()
    x = images(2, 64, 64)
    frozen = mk.freeze(model)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    first, other_size = frozen(x), frozen(images(1, 40, 40).fill_(1.0))
    for value in model.state_dict().values():
        value.zero_()
    assert torch.equal(frozen(x), first)
    again = frozen(images(1, 41, 40).fill_(1.0))  # a size that was not seen before the change
    model.load_state_dict(before)
    assert torch.equal(mk.freeze(model)(images(1, 41, 40).fill_(1.0)), again)
    assert torch.equal(mk.freeze(model)(images(1, 40, 40).fill_(1.0)), other_size)


def test_the_model_that_was_frozen_can_be_trained_and_dropped() -> None:
    model = make_eval_model()
    frozen = mk.freeze(model)
    model.train()(images(2, 32, 32)).sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    weight = weakref.ref(model.stages[3][0].attention.qkv.weight)
    del model
    assert weight() is None
    assert frozen(images(1, 32, 32)).shape == (1, CLASSES)


def test_no_weights_beside_the_packed_ones() -> None:
    model = make_eval_model()
    frozen = mk.freeze(model)
    assert not list(frozen.parameters()) and not frozen.state_dict()
    count = sum(parameter.numel() for parameter in model.parameters())
    # Rounded up to whole vectors, the stem's second convolution twice; depends on the vectors.
    assert 4 * count <= frozen.sequence.bytes <= 4 * 4 * count


@torch.no_grad()
def test_more_sizes_than_are_remembered() -> None:
    model = make_eval_model()
    frozen = mk.freeze(model)
    for side in (*range(16, 56, 2), 16):
        x = images(1, side, side)
        assert torch.equal(frozen.forward_features(x), model.forward_features(x))


@torch.no_grad()
def test_threads_at_the_same_time() -> None:
    model = make_eval_model()
    frozen = mk.freeze(model)
    batches = [images(2, 32 + 8 * (i % 3), 48) for i in range(12)]
    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(torch.no_grad()(frozen.forward_features), batches))
    for x, result in zip(batches, results, strict=True):
        assert torch.equal(result, model.forward_features(x))


@pytest.mark.each_isa
@torch.no_grad()
def test_any_number_of_threads() -> None:
    frozen = mk.freeze(make_eval_model())
    x = images(3, 64, 64)
    threads = torch.get_num_threads()
    try:
        results = []
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(frozen(x))
    finally:
        torch.set_num_threads(threads)
    for result in results[1:]:
        assert_close(result, results[0], BACKEND_OUTPUT[torch.float32])


def test_inside_another_model() -> None:
    backbone = make_eval_model(features_only=True)

    class Detector(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.backbone = backbone
            self.head = nn.Conv2d(64, 7, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.backbone(x)["res5"])

    detector = Detector().eval()
    frozen = mk.freeze(detector)
    x = images(2, 64, 64)
    with torch.no_grad():
        assert torch.equal(frozen(x), detector(x))
    assert detector.backbone is backbone and frozen.head.weight is not detector.head.weight
    # The rest is an ordinary model: it trains, on frozen features.
    frozen.train()(x).sum().backward()
    assert frozen.head.weight.grad is not None
    assert not frozen.backbone.training
    compiled = torch.compile(frozen, backend="eager")
    assert torch.equal(compiled(x), frozen(x))


def test_copies_share_the_weights_and_pickles_are_refused() -> None:
    frozen = mk.freeze(make_eval_model())
    clone = copy.deepcopy(frozen)
    assert clone is not frozen and clone.sequence is frozen.sequence
    x = images(1, 32, 32)
    assert torch.equal(clone(x), frozen(x))
    with pytest.raises(TypeError, match="freeze it again"):
        pickle.dumps(frozen)


def test_what_cannot_be_frozen_is_told() -> None:
    model = make_eval_model()
    with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module, got int"):
        mk.freeze(3)
    with pytest.raises(ValueError, match="eval mode"):
        mk.freeze(model.train())
    with pytest.raises(ValueError, match="nothing in model can be frozen: it has no MOAT"):
        mk.freeze(nn.Linear(2, 2).eval())
    plain = make_eval_model(fused=False)
    for _ in range(2):
        with pytest.raises(
            ValueError, match=r"stages\.0\.0 and 3 more: a plain block: make the model"
        ):
            mk.freeze(plain)
        mk.fuse(plain)
    with pytest.raises(ValueError, match="float64"):
        mk.freeze(mk.FusedMBConv(8, 8).double().eval())
    with torch.device("meta"):
        elsewhere = mk.FusedMBConv(8, 8).eval()
    with pytest.raises(ValueError, match="tensors on meta"):
        mk.freeze(elsewhere)


@torch.no_grad()
def test_blocks_that_are_hooked_or_replaced_stay_as_they_are() -> None:
    model = make_eval_model()
    seen = []
    model.stages[1][0].register_forward_hook(lambda *_: seen.append("hook"))
    model.stages[3][0].attention.proj = nn.Sequential(model.stages[3][0].attention.proj)
    model.stages[0][0].depthwise_norm.train()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        frozen = mk.freeze(model)
    messages = " ".join(str(entry.message) for entry in caught)
    assert "stages.1.0: it has hooks" in messages
    assert "stages.3.0: its attention is hooked or was replaced" in messages
    assert "stages.0.0: a batch norm that measures its batch" in messages
    assert type(frozen) is mk.MOAT
    assert isinstance(frozen.stem, FrozenBlock) and isinstance(frozen.stages[2][0], FrozenBlock)
    x = images(2, 64, 64)
    assert torch.equal(frozen(x), model(x))
    assert seen == ["hook", "hook"]


def test_calls_that_a_frozen_model_refuses() -> None:
    frozen = mk.freeze(make_eval_model())
    x = images(1, 32, 32)
    with pytest.raises(TypeError, match="x must be a tensor, got list"):
        frozen([x])
    with pytest.raises(TypeError, match=r"x must be torch\.float32 on the CPU"):
        frozen(x.double())
    with pytest.raises(TypeError, match=r"got torch\.float32 on meta"):
        frozen(x.to("meta"))
    with pytest.raises(ValueError, match=r"x must be \[B, C, H, W\], got \(3, 32, 32\)"):
        frozen(x[0])
    with pytest.raises(RuntimeError, match="x must have 3 channels, got 2"):
        frozen(x[:, :2])
    with pytest.raises(RuntimeError, match="x requires grad"):
        frozen(x.requires_grad_())
    with torch.no_grad():
        assert frozen(x).shape == (1, CLASSES)
    assert not frozen(x.detach()).requires_grad


def test_a_frozen_model_stays_where_it_is() -> None:
    frozen = mk.freeze(make_eval_model())
    assert frozen.float().to("cpu").eval() is frozen
    assert not frozen.train().training
    with pytest.raises(
        RuntimeError, match=r"stays on the CPU in torch\.float32, got torch\.float16"
    ):
        frozen.half()
