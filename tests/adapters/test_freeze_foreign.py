"""Fused models of other packages, frozen: the stock models' numbers, and what is left alone."""

from __future__ import annotations

import copy
import dataclasses
import gc
import pickle
import re
import warnings
import weakref
from collections.abc import Callable

import pytest
import torch
from support.foreign_models import RESOLUTION, make_foreign_model
from support.fusing import randomize
from support.native import needs_extension
from support.peers import import_peer
from support.tolerances import (
    BACKEND_OUTPUT,
    FOLDED_ROUNDING,
    LOW_PRECISION_FACTOR,
    assert_close,
    relative_error,
)
from torch import Tensor, nn

import moat_kernels as mk
from moat_kernels.frozen_modules import FrozenBlock, FrozenTransformerBlock

pytestmark = needs_extension
maxxvit = import_peer("timm.models.maxxvit")
maxvit = import_peer("torchvision.models.maxvit")
max_vit = import_peer("vit_pytorch.max_vit")
timm = import_peer("timm")

# name -> (blocks that are frozen, transformer blocks or halves of them, reasons for the rest)
MODELS: dict[str, tuple[int, int, set[str]]] = {
    "timm coatnet": (3, 2, set()),
    "timm maxvit tf": (5, 8, set()),
    "torchvision maxvit": (4, 6, set()),
    "vit-pytorch maxvit": (3, 12, set()),
    "RooKichenn": (0, 0, {"order 'depthwise_first'"}),
    "Apple": (4, 0, {"an attention without a block around it that is known"}),
    "changzy00": (4, 0, {"an attention without a block around it that is known"}),
}


def freeze_and_listen(model: nn.Module) -> tuple[nn.Module, set[str]]:
    """The frozen model, and why blocks of it were left as they are."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        frozen = mk.freeze(model)
    texts = [str(entry.message) for entry in caught]
    return frozen, {text.split(": ", 2)[2].removesuffix("; left as it is") for text in texts}


def count(model: nn.Module, kind: type[nn.Module]) -> int:
    return sum(isinstance(module, kind) for module in model.modules())


@pytest.mark.each_isa
@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_whole_models(name: str) -> None:
    stock = make_foreign_model(name).eval()
    model = copy.deepcopy(stock).float()
    mk.fuse(model)
    blocks, halves, expected_reasons = MODELS[name]
    if not blocks:
        with pytest.raises(ValueError, match="|".join(expected_reasons)):
            mk.freeze(model)
        return
    frozen, reasons = freeze_and_listen(model)
    assert count(frozen, FrozenTransformerBlock) == halves
    assert count(frozen, FrozenBlock) == blocks
    assert reasons == expected_reasons
    x = torch.randn(2, 3, RESOLUTION, RESOLUTION)
    assert_close(frozen(x), stock(x.double()), BACKEND_OUTPUT[torch.float32])


# name -> (what differs from SMALL, halves that are frozen, reasons for the rest)
TIMM: dict[str, tuple[dict, int, set[str]]] = {
    "coatnet_0_rw_224": ({}, 3, set()),
    "coatnet_rmlp_0_rw_224": ({}, 3, {"pre_activation 'silu'"}),
    "coatnet_nano_rw_224": ({}, 3, set()),
    "maxvit_tiny_rw_224": ({}, 10, set()),
    "maxxvit_rmlp_nano_rw_256": ({"embed_dim": (64, 64, 128, 128)}, 10, set()),
}
SMALL = {"img_size": 64, "embed_dim": (32, 32, 64, 64), "depths": (1, 1, 2, 1), "num_classes": 5}


@pytest.mark.parametrize("name", TIMM)
@torch.no_grad()
def test_models_of_timm(name: str) -> None:
    changes, halves, expected_reasons = TIMM[name]
    stock = randomize(timm.create_model(name, **{**SMALL, **changes})).eval()
    model = copy.deepcopy(stock).float()
    mk.fuse(model)
    frozen, reasons = freeze_and_listen(model)
    assert count(frozen, FrozenTransformerBlock) == halves
    assert reasons == expected_reasons
    x = torch.randn(1, 3, 64, 64)
    assert_close(frozen(x), stock(x.double()), BACKEND_OUTPUT[torch.float32])


def make_partition(kind: str = "Cl", partition: str = "grid", **settings) -> nn.Module:
    options = {"window_size": (2, 3), "grid_size": (2, 3), "dim_head": 8, **settings}
    config = dataclasses.replace(maxxvit.MaxxVitTransformerCfg(), **options)
    return randomize(getattr(maxxvit, f"PartitionAttention{kind}")(16, partition, config)).eval()


def fused_copy(stock: nn.Module, dtype: torch.dtype = torch.float32) -> nn.Module:
    model = copy.deepcopy(stock).to(dtype)
    assert mk.fuse(model).fused
    return model


@pytest.mark.each_isa
@pytest.mark.parametrize("partition", ["block", "grid"])
@pytest.mark.parametrize("kind", ["Cl", "2d"])
@pytest.mark.parametrize(
    "settings",
    [
        {"rel_pos_type": "bias"},
        {"rel_pos_type": "bias_tf"},
        {"rel_pos_type": "mlp"},
        {"rel_pos_type": ""},
        {"head_first": False, "attn_bias": False},
        {"init_values": 0.3},
        {"act_layer": "silu", "expand_ratio": 2.5},
    ],
    ids=str,
)
@torch.no_grad()
def test_windows_and_grids(settings: dict, kind: str, partition: str) -> None:
    stock = make_partition(kind, partition, **settings)
    frozen = mk.freeze(fused_copy(stock))
    assert isinstance(frozen, FrozenTransformerBlock)
    for batch, height, width in ((2, 4, 6), (1, 6, 15)):
        size = (batch, 16, height, width) if kind == "2d" else (batch, height, width, 16)
        x = torch.randn(size)
        assert_close(frozen(x), stock(x.double()), BACKEND_OUTPUT[torch.float32])


def make_transformer(stride: int = 1) -> nn.Module:
    config = dataclasses.replace(maxxvit.MaxxVitTransformerCfg(), dim_head=8)
    bias = maxxvit.get_rel_pos_cls(config, (3, 4))
    return randomize(maxxvit.TransformerBlock2d(16, 16, stride, bias, config)).eval()


def make_layer(partition: str) -> nn.Module:
    size = (6, 4) if partition == "window" else (6, 6)
    layer = maxvit.PartitionAttentionLayer(
        16, 8, 2, partition, size, 2, nn.GELU, nn.LayerNorm, 0.0, 0.0, 0.2
    )
    return randomize(layer).eval()


def make_conv(**settings) -> nn.Module:
    config = dataclasses.replace(maxxvit.MaxxVitConvCfg(), **settings)
    return randomize(maxxvit.MbConvBlock(16, 16, cfg=config)).eval()


# name -> (how a block of maps is made, the size of its maps)
BLOCKS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "MbConvBlock": (make_conv, (16, 5, 7)),
    "TransformerBlock2d": (make_transformer, (16, 3, 4)),
    "PartitionAttention2d": (lambda: make_partition("2d"), (16, 4, 6)),
    "window layer": (lambda: make_layer("window"), (16, 6, 4)),
    "grid layer": (lambda: make_layer("grid"), (16, 6, 6)),
}


@pytest.mark.each_isa
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", BLOCKS)
@torch.no_grad()
def test_dtypes_and_memory_formats(name: str, dtype: torch.dtype) -> None:
    make, size = BLOCKS[name]
    stock = make()
    plain = copy.deepcopy(stock).to(dtype)
    try:
        frozen = mk.freeze(fused_copy(stock, dtype))
    except ValueError as error:
        assert dtype in (torch.bfloat16, torch.float16) and f"tensors of {dtype}" in str(error)
        pytest.skip(f"{error}: this CPU multiplies them itself")
    x = torch.randn(3, *size, dtype=dtype)
    expected = copy.deepcopy(plain).double()(x.double())
    tolerance = BACKEND_OUTPUT.get(dtype, 0.0)
    if dtype != torch.float32:
        rounding = FOLDED_ROUNDING * torch.finfo(dtype).eps
        tolerance = LOW_PRECISION_FACTOR * relative_error(plain(x), expected) + rounding
    for memory_format in (torch.contiguous_format, torch.channels_last):
        x = x.contiguous(memory_format=memory_format)
        result = frozen(x)
        assert_close(result, expected, tolerance)
        assert result.dtype == dtype and result.is_contiguous(memory_format=memory_format)


@pytest.mark.each_isa
@torch.no_grad()
def test_views_and_empty_batches() -> None:
    stock = make_partition("Cl")
    frozen = mk.freeze(fused_copy(stock))
    x = torch.randn(2, 16, 4, 6).permute(0, 2, 3, 1)
    assert_close(frozen(x), stock(x.double()), BACKEND_OUTPUT[torch.float32])
    assert frozen(x[:0]).shape == (0, 4, 6, 16)
    with pytest.raises(ValueError, match=r"x must be \[B, H, W, C\], got \(4, 6, 16\)"):
        frozen(x[0])


@torch.no_grad()
def test_a_frozen_model_keeps_the_weights_that_it_was_made_of() -> None:
    model = fused_copy(make_foreign_model("timm maxvit tf").eval())
    frozen = mk.freeze(model)
    x = torch.randn(1, 3, RESOLUTION, RESOLUTION)
    first = frozen(x)
    mine = {tensor.data_ptr() for tensor in model.state_dict().values()}
    assert mine.isdisjoint(tensor.data_ptr() for tensor in frozen.state_dict().values())
    for tensor in model.state_dict().values():
        tensor.zero_()
    assert torch.equal(frozen(x), first)
    qkv = weakref.ref(model.stages[0].blocks[0].attn_block.attn.qkv)
    del model
    gc.collect()
    assert qkv() is None


def with_norm_inside(block: nn.Module) -> nn.Module:
    """An MLP that no step computes, so that the block keeps it."""
    block.mlp.norm = nn.LayerNorm(block.mlp.fc1.out_features)
    return block


def test_what_is_not_frozen_keeps_its_names_and_trains() -> None:
    model = make_foreign_model("timm maxvit tf").eval()
    with_norm_inside(model.stages[0].blocks[0].attn_grid)
    model = fused_copy(model)
    frozen = mk.freeze(model)
    kept = frozen.state_dict()
    assert kept.keys() < model.state_dict().keys()
    assert "stages.0.blocks.0.attn_grid.mlp.fc1.weight" in kept
    assert not any(".conv." in name or ".attn_block." in name or ".attn." in name for name in kept)
    block = frozen.train().stages[0].blocks[0]
    assert block.attn_grid.mlp.training and not block.attn_grid.halves.training
    with pytest.raises(RuntimeError, match="x requires grad"):
        frozen(torch.randn(1, 3, RESOLUTION, RESOLUTION))


@torch.no_grad()
def test_copies_share_the_weights_and_pickles_are_refused() -> None:
    frozen = mk.freeze(fused_copy(with_norm_inside(make_partition())))
    clone = copy.deepcopy(frozen)
    assert clone.halves.sequence is frozen.halves.sequence
    assert clone.mlp.fc1.weight is not frozen.mlp.fc1.weight
    x = torch.randn(2, 4, 6, 16)
    assert torch.equal(clone(x), frozen(x))
    with pytest.raises(TypeError, match="freeze it again"):
        pickle.dumps(frozen)


def reason_for(block: nn.Module) -> str:
    """Why a block is not frozen."""
    model = nn.Sequential()
    model.training = False  # of the block some modules may be in training mode
    model.append(block)
    with pytest.raises(ValueError, match="nothing in model can be frozen") as error:
        mk.freeze(model)
    return str(error.value).split(": ", 2)[2]


@pytest.mark.parametrize(
    ("block", "reason"),
    [
        (lambda: make_conv(attn_early=True), "squeeze-excite 'before_norm'"),
        (lambda: make_conv(kernel_size=5), r"a depthwise kernel of \(5, 5\)"),
        (lambda: make_conv(pre_norm_act=True), "pre_activation 'gelu'"),
        (lambda: make_partition("2d", norm_layer="groupnorm1"), "GroupNorm1 before its attention"),
        (lambda: make_partition("2d", norm_layer="batchnorm2d"), "BatchNorm2d before .*"),
    ],
)
def test_what_no_step_computes_is_left(block: Callable[[], nn.Module], reason: str) -> None:
    assert re.fullmatch(reason, reason_for(fused_copy(block())))


def hook(module: nn.Module) -> None:
    module.register_forward_hook(lambda *_: None)


@pytest.mark.parametrize(
    ("make", "change", "reason"),
    [
        (make_conv, hook, "it has hooks"),
        (make_conv, lambda block: hook(block.conv1_1x1), "an inner Conv2d has hooks"),
        (make_conv, lambda block: block.norm1.train(), "a batch norm that measures its batch"),
        (make_transformer, hook, "it has hooks"),
        (make_transformer, lambda block: hook(block.attn), "an inner Attention2d has hooks"),
        (make_transformer, lambda block: hook(block.mlp.fc1), "an inner Conv2d has hooks"),
        (
            make_transformer,
            lambda block: block.add_module("lora", nn.Tanh()),
            "unknown lora",
        ),
        (
            make_partition,
            lambda block: setattr(block.attn, "lora", nn.Linear(16, 16)),
            "unknown lora",
        ),
        (
            make_partition,
            lambda block: setattr(block.attn, "qkv", nn.Sequential(block.attn.qkv)),
            "Sequential in place of a convolution",
        ),
        (
            make_partition,
            lambda block: setattr(block, "ls1", nn.Tanh()),
            "Tanh after its attention",
        ),
        (
            lambda: make_layer("grid"),
            lambda layer: layer.stochastic_dropout.train(),
            "its drop path drops",
        ),
        (make_partition, lambda block: block.double(), "tensors of torch.float64"),
        (make_partition, lambda block: block.mlp.double(), "trying it out failed: .*"),
    ],
)
def test_fused_blocks_that_were_changed_are_left(
    make: Callable[[], nn.Module], change: Callable[[nn.Module], object], reason: str
) -> None:
    block = fused_copy(make())
    change(block)
    assert re.fullmatch(reason, reason_for(block), re.DOTALL)


@torch.no_grad()
def test_a_block_of_the_same_names_with_another_forward_is_left() -> None:
    class TransformerBlock2d(maxxvit.TransformerBlock2d):
        def forward(self, x: Tensor) -> Tensor:
            return x + self.drop_path2(self.ls2(self.mlp(self.attn(self.norm1(x)))))

    block = make_transformer()
    block.__class__ = TransformerBlock2d
    assert mk.fuse(copy.deepcopy(block)).skipped[0].reason.startswith("its results differ from")
    assert reason_for(fused_copy(block)) == "an attention without a block around it that is known"


def test_an_attention_by_itself_is_left() -> None:
    attention = fused_copy(make_transformer().attn)
    assert reason_for(attention) == "an attention without a block around it that is known"


@torch.no_grad()
def test_maps_that_a_block_refuses() -> None:
    frozen = mk.freeze(fused_copy(make_partition("2d")))
    with pytest.raises(ValueError, match="windows of 2 x 3 divide, got 5 x 6"):
        frozen(torch.randn(1, 16, 5, 6))
    with pytest.raises(TypeError, match=r"x must be torch\.float32 on the CPU"):
        frozen(torch.randn(1, 16, 4, 6).double())
    with pytest.raises(TypeError, match="x must be a tensor, got int"):
        mk.freeze(fused_copy(make_partition("Cl")))(3)
    for make in (make_transformer, lambda: make_layer("grid")):
        frozen = mk.freeze(fused_copy(make()))
        with pytest.raises(ValueError, match=r"x must be a map of \d x \d, got 8 x 8"):
            frozen(torch.randn(1, 16, 8, 8))
