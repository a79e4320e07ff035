"""Nothing between the kernels makes the host wait for a GPU: what CUDA graphs need of every call.

The launchers run on meta tensors in place of a GPU's, and every operation on the way is looked at.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.mbconv_cases import Case, make_parameters
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

pytest.importorskip("triton")

from moat_kernels.functional import (
    MBConvDescription,
    Pool,
    SqueezeExcite,
    WindowAttentionDescription,
)
from moat_kernels.ops.attention_half.description import Half, Layers
from moat_kernels.ops.attention_half.triton import backend as attention_half
from moat_kernels.ops.layer_norm.triton import backend as layer_norm
from moat_kernels.ops.mbconv.description import (
    PARAMETER_NAMES,
)
from moat_kernels.ops.mbconv.dispatch import resolve_frozen
from moat_kernels.ops.mbconv.running_statistics import count_values, finish_updates, plan_updates
from moat_kernels.ops.mbconv.triton import backend as mbconv
from moat_kernels.ops.triton_support import launching
from moat_kernels.ops.window_attention.triton import backend as window_attention

CASES = {
    "1": MBConvDescription(),
    "2, se": MBConvDescription(stride=2, pool=Pool(), squeeze_excite=SqueezeExcite()),
}


class OnOneDevice(TorchDispatchMode):
    """Refuses operations whose result's size depends on data, and tensors outside the GPU."""

    def __torch_dispatch__(self, operator: Any, types: Any, arguments: Any = (), options=None):
        result = operator(*arguments, **(options or {}))
        if torch.Tag.dynamic_output_shape in operator.tags:
            raise AssertionError(f"{operator} waits for the size of its result")
        for leaf in tree_leaves((arguments, options, result)):
            if isinstance(leaf, Tensor) and leaf.device.type != "meta":
                raise AssertionError(f"{operator} has a tensor on {leaf.device}")
        return result


@pytest.fixture(autouse=True)
def no_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launching, "_run", lambda *_: None)


def on_gpu(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


@pytest.mark.parametrize("rows", ["few", "many"])
@pytest.mark.parametrize("recompute", ["none", "expand", "block"])
@pytest.mark.parametrize("case", CASES)
def test_training_the_bottleneck(case: str, recompute: str, rows: str) -> None:
    description = CASES[case]
    case = Case(description, 8, 16, 8)
    size = 12 if rows == "many" else 4
    with torch.device("meta"):
        parameters = make_parameters(case, torch.bfloat16)
        x, scale = on_gpu(2, 8, size, size), on_gpu(2)
        description = resolve_frozen(description, parameters, training=True)
        needed = frozenset(("x", *PARAMETER_NAMES))
        with OnOneDevice():
            counts = count_values(x, parameters, description)
            updates = plan_updates(counts, parameters, description)
            arguments = (parameters, description, recompute, scale, None)
            result = mbconv.forward(x, *arguments, updates)
            finish_updates(parameters, description, updates, result.moments)
            mbconv.backward(
                *(result.output, x, *arguments),
                *(result.saved, needed),
            )


@pytest.mark.parametrize("case", CASES)
def test_evaluating_the_bottleneck(case: str) -> None:
    case = Case(CASES[case], 8, 16, 8)
    with torch.device("meta"):
        parameters = make_parameters(case, torch.bfloat16)
        description = resolve_frozen(case.description, parameters, training=False)
        x = on_gpu(2, 8, 12, 12)
        with OnOneDevice():
            mbconv.evaluate(x, parameters, description, None, None)


@pytest.mark.parametrize("window", [None, (4, 5)], ids=str)
def test_attention(window: tuple[int, int] | None) -> None:
    description = WindowAttentionDescription(2, 16, window)
    qkv = on_gpu(2, 7, 9, 96)
    rows, columns = description.window_for(7, 9)
    table = on_gpu(2, 2 * rows - 1, 2 * columns - 1)
    with OnOneDevice():
        output, saved = window_attention.forward(qkv, table, description)
        window_attention.backward(output, qkv, table, description, output, saved, True)


def test_layer_norm() -> None:
    x, weight = on_gpu(2, 7, 9, 96), on_gpu(96)
    with OnOneDevice():
        normalized, saved = layer_norm.forward(x, weight, weight, 1e-5, torch.bfloat16)
        layer_norm.backward(normalized, x, x, weight, saved, True)


def test_the_attention_half() -> None:
    """Of float32 parameters under autocast."""
    float32 = torch.float32
    shapes = ((64,), (64,), (192, 64), (192,), (64, 64), (64,))
    layers = Layers(*(on_gpu(*shape, dtype=float32) for shape in shapes))
    half = Half(WindowAttentionDescription(2, 32, (4, 5)), 1e-5, 2.0, torch.bfloat16)
    y, table, kept = on_gpu(2, 64, 7, 9, dtype=float32), on_gpu(2, 7, 9), on_gpu(2)
    with OnOneDevice():
        output, saved = attention_half.forward(y, layers, table, kept, half)
        attention_half.backward(output, y, layers, table, kept, half, saved, [True] * 8)


def test_waiting_would_show() -> None:
    with OnOneDevice():
        for waits in (Tensor.item, Tensor.cpu, Tensor.nonzero, bool):
            with pytest.raises((RuntimeError, NotImplementedError)):
                waits(on_gpu(1))
        with pytest.raises(AssertionError, match="on cpu"):
            torch.ones(3).to("meta")
