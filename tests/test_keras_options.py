"""The options that Keras' MOATs need: fused, frozen, compiled and exported like official ones."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support.keras import make_pixels
from support.small_model import make_model
from support.tolerances import (
    BACKEND_GRADIENT,
    BACKEND_MODEL_OUTPUT,
    BACKEND_OUTPUT,
    assert_close,
    relative_error,
)
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

import moat_kernels as mk
from moat_kernels.configuration import KERAS
from moat_kernels.ops.common.backends import backend_status
from moat_kernels.reference import MBConvBlock, SqueezeExcitation

native = pytest.mark.skipif(not backend_status()["cpu"].usable, reason="no native kernels")
WINDOWS = (None, None, (2, 3), None)


def exact_output(x: Tensor, **options: Any) -> Tensor:
    """Of the plain model in float64, in eval mode."""
    with torch.no_grad():
        return make_model(torch.float64, fused=False, **KERAS, **options).eval()(x)


def train_step(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    output = model(x)
    output.square().sum().backward()
    gradients = {f"{name}.grad": p.grad for name, p in model.named_parameters()}
    return {"output": output.detach(), **gradients, **dict(model.named_buffers())}


def test_the_gate_is_a_sigmoid_of_two_layers_around_the_activation() -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 6, 3, 4)
    for activation, function in {"gelu": F.gelu, "silu": F.silu}.items():
        gate = SqueezeExcitation(6, 2, activation)
        reduce, expand = (layer.weight.flatten(1) for layer in (gate.reduce, gate.expand))
        hidden = function(x.mean((2, 3)) @ reduce.T + gate.reduce.bias)
        factor = torch.sigmoid(hidden @ expand.T + gate.expand.bias)
        torch.testing.assert_close(gate(x), x * factor[:, :, None, None])


@pytest.mark.parametrize("recompute", ["auto", "none", "block"])
def test_training_is_the_plain_models(recompute: str) -> None:
    x = make_pixels(2, 3, 33, 40)
    options = {**KERAS, "window_size": WINDOWS}
    expected = train_step(make_model(torch.float64, fused=False, **options), x)
    actual = train_step(make_model(torch.float64, recompute=recompute, **options), x)
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        tolerance = BACKEND_GRADIENT if name.endswith("grad") else BACKEND_OUTPUT
        assert_close(actual[name], value, tolerance[torch.float64], name, floor=1e-3)


@native
@pytest.mark.parametrize("frozen", [False, True], ids=["fused", "frozen"])
def test_native_inference(frozen: bool) -> None:
    x = make_pixels(3, 3, 45, 38)
    model = make_model(torch.float32, window_size=WINDOWS, **KERAS).eval()
    model = mk.freeze(model) if frozen else model
    with torch.no_grad():
        actual = model(x)
    expected = exact_output(x, window_size=WINDOWS)
    assert_close(actual, expected.float(), BACKEND_MODEL_OUTPUT)


@native
def test_frozen_in_low_precision() -> None:
    x = make_pixels(2, 3, 64, 64)
    model = make_model(torch.float32, **KERAS).eval()
    expected = exact_output(x).float()
    with torch.no_grad():
        assert relative_error(mk.freeze(model, torch.bfloat16)(x), expected) < 0.05
        if torch.ops.moat_kernels.cpu_multiplies.default(torch.int8):
            calibration = [make_pixels(2, 3, 64, 64).flip(0)]
            frozen = mk.freeze(model, torch.int8, calibration=calibration)
            assert relative_error(frozen(x), expected) < 0.1
            # Pixels that were not scaled would be far beyond what calibration saw.
            assert any(layer.int8 for layer in frozen.int8_report)


@pytest.mark.parametrize("kind", ["plain", "fused", "frozen"])
def test_pixels_of_any_dtype_and_memory_format(kind: str) -> None:
    if kind == "frozen" and not backend_status()["cpu"].usable:
        pytest.skip("no native kernels")
    model = make_model(torch.float32, fused=kind != "plain", **KERAS).eval()
    model = mk.freeze(model) if kind == "frozen" else model
    x = make_pixels(2, 3, 40, 33)
    with torch.no_grad():
        expected = model(x)
        for same in (x.float(), x.long(), x.to(memory_format=torch.channels_last)):
            before = same.clone()
            assert_close(model(same), expected, BACKEND_OUTPUT[torch.float32])
            assert torch.equal(same, before)
        in_parts = model.forward_head(model.forward_features(x))
        assert_close(in_parts, expected, BACKEND_OUTPUT[torch.float32])


def test_scaling_pixels_is_what_the_user_would_do() -> None:
    x = make_pixels(2, 3, 40, 33)
    scaled = (x.double() - 127.5) / 127.5
    options = {"fused": False, "features_only": True}
    with torch.no_grad():
        maps = make_model(**{**KERAS, **options}).eval()(x)
        expected = make_model(**{**KERAS, **options, "pixel_scaling": False}).eval()(scaled)
    for name, value in expected.items():
        assert torch.equal(maps[name], value), name


@native
@pytest.mark.parametrize("out_indices", [None, (0, 3)], ids=str)
def test_frozen_maps_of_pixels(out_indices: tuple[int, ...] | None) -> None:
    x = make_pixels(2, 3, 64, 64)
    options = {**KERAS, "features_only": True, "out_indices": out_indices}
    model = make_model(torch.float32, **options).eval()
    with torch.no_grad():
        expected, actual = tree_leaves(model(x)), tree_leaves(mk.freeze(model)(x))
    for found, wanted in zip(actual, expected, strict=True):
        assert_close(found, wanted, BACKEND_MODEL_OUTPUT)


def test_compiled_in_one_graph() -> None:
    x = make_pixels(2, 3, 32, 32)
    model = make_model(torch.float32, **KERAS).eval()
    expected = model(x)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert_close(compiled(x), expected, BACKEND_OUTPUT[torch.float32])


@pytest.mark.parametrize("fused", [False, True], ids=["plain", "fused"])
def test_exported_for_pixels(fused: bool) -> None:
    model = make_model(torch.float32, fused=fused, **KERAS).eval()
    batch = torch.export.Dim("batch", min=1, max=64)
    with torch.no_grad():
        example = (make_pixels(2, 3, 32, 32),)
        program = torch.export.export(model, example, dynamic_shapes={"x": {0: batch}})
        x = make_pixels(5, 3, 32, 32)
        assert_close(program.module()(x), model(x), BACKEND_OUTPUT[torch.float32])


def test_traced_by_fx() -> None:
    model = make_model(torch.float32, **KERAS).eval()
    x = make_pixels(2, 3, 32, 32)
    with torch.no_grad():
        traced = torch.fx.symbolic_trace(model)
        assert_close(traced(x.float()), model(x), BACKEND_OUTPUT[torch.float32])


def test_fuse_reads_the_activation() -> None:
    torch.manual_seed(0)
    block = MBConvBlock(8, 8, se_activation="gelu").double().eval()
    for parameter in block.parameters():
        nn.init.normal_(parameter)
    x = torch.randn(2, 8, 5, 6, dtype=torch.float64)
    with torch.no_grad():
        expected = block(x)
        fused = copy.deepcopy(block)
        assert mk.fuse(fused).fused
        assert_close(fused(x), expected, BACKEND_OUTPUT[torch.float64])
        fused.se.activation = block.se.activation = "relu"  # read at every call
        assert not torch.equal(block(x), expected)
        assert_close(fused(x), block(x), BACKEND_OUTPUT[torch.float64])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"se_activation": "tanh"}, "se_activation must be one of 'gelu', .* got 'tanh'"),
        ({"layer_norm_eps": 0.0}, "layer_norm_eps must be > 0, got 0.0"),
        ({"pixel_scaling": "yes"}, "pixel_scaling must be one of False, True, got 'yes'"),
        ({"channel_order": "gbr"}, "channel_order must be one of 'rgb', 'bgr', got 'gbr'"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_bad_options_are_named(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_model(**options)
