"""Reading standard modules: what is taken over, and what is named as not covered."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from moat_kernels.adapters import NotCovered, NotCoveredInTraining, reading
from moat_kernels.ops.mbconv.reference import pool_map


@pytest.mark.parametrize(
    ("module", "expected"),
    [
        (nn.GELU(), "gelu"),
        (nn.GELU(approximate="tanh"), "gelu_tanh"),
        (nn.SiLU(inplace=True), "silu"),
        (nn.ReLU(), "relu"),
        (nn.Identity(), "identity"),
    ],
    ids=str,
)
def test_activations(module: nn.Module, expected: str) -> None:
    assert reading.read_activation(module) == expected


@pytest.mark.parametrize(
    "pool",
    [
        nn.AvgPool2d(2),
        nn.AvgPool2d(3, 2, 1),
        nn.AvgPool2d(3, 2, (0, 1), count_include_pad=False),
        nn.MaxPool2d((2, 2), (2, 2)),
        nn.MaxPool2d(3, 2, 1),
    ],
    ids=str,
)
def test_pools(pool: nn.Module) -> None:
    x = torch.randn(2, 3, 7, 8)
    assert torch.allclose(pool_map(x, reading.read_pool(pool)), pool(x))


@pytest.mark.parametrize(
    ("pool", "reason"),
    [
        (nn.AvgPool2d((2, 3)), r"a pool of \(2, 3\)"),
        (nn.AvgPool2d(2, ceil_mode=True), "ceil_mode or divisor_override"),
        (nn.AvgPool2d(2, divisor_override=3), "ceil_mode or divisor_override"),
        (nn.MaxPool2d(2, dilation=2), "a pool with dilation"),
        (nn.AdaptiveAvgPool2d(1), "AdaptiveAvgPool2d in the shortcut"),
    ],
    ids=str,
)
def test_other_pools(pool: nn.Module, reason: str) -> None:
    with pytest.raises(NotCovered, match=reason):
        reading.read_pool(pool)


@pytest.mark.parametrize("kernel_size", [2, 3, 4, 5])
def test_the_padding_called_same(kernel_size: int) -> None:
    conv = nn.Conv2d(3, 3, kernel_size, padding="same", groups=3)
    stride, padding = reading.read_depthwise(conv)
    assert stride == 1 and padding != "tf_same"
    top, bottom, left, right = padding
    x = torch.randn(1, 3, 6, 7)
    padded = F.pad(x, (left, right, top, bottom))
    assert torch.allclose(F.conv2d(padded, conv.weight, conv.bias, groups=3), conv(x), atol=1e-6)


@pytest.mark.parametrize(
    ("conv", "reason"),
    [
        (nn.Conv2d(4, 4, 3, dilation=2, groups=4), r"dilation \(2, 2\)"),
        (nn.Conv2d(4, 4, 3, groups=4, padding_mode="reflect", padding=1), "'reflect'"),
        (nn.Conv2d(4, 8, 3, groups=4), "4 groups of a convolution over 4 channels"),
        (nn.Conv2d(4, 4, 3, stride=(1, 2), groups=4), r"stride \(1, 2\)"),
        (nn.Linear(4, 4), "Linear in place of a convolution"),
    ],
    ids=str,
)
def test_other_depthwise_convolutions(conv: nn.Module, reason: str) -> None:
    with pytest.raises(NotCovered, match=reason):
        reading.read_depthwise(conv)


@pytest.mark.parametrize(
    ("conv", "reason"),
    [
        (nn.Conv2d(4, 4, 3), r"a convolution of \(3, 3\)"),
        (nn.Conv2d(4, 4, 1, stride=2), "a 1x1 convolution with a stride"),
        (nn.Conv2d(4, 4, 1, padding=1), "a 1x1 convolution with padding"),
        (nn.Conv2d(4, 4, 1, groups=2), "groups 2, not 1x1"),
    ],
    ids=str,
)
def test_other_pointwise_convolutions(conv: nn.Module, reason: str) -> None:
    with pytest.raises(NotCovered, match=reason):
        reading.read_pointwise(conv)


def test_dropout_matters_in_training_only() -> None:
    dropout = nn.Dropout(0.5)
    with pytest.raises(NotCoveredInTraining, match=r"dropout of the weights, p=0\.5"):
        reading.refuse_dropout(dropout, "the weights")
    reading.refuse_dropout(dropout.eval(), "the weights")
    reading.refuse_dropout(nn.Dropout(0.0), "the weights")
    with pytest.raises(NotCovered, match="AlphaDropout in place of the dropout of the weights"):
        reading.refuse_dropout(nn.AlphaDropout(), "the weights")


def test_stochastic_depth_of_another_kind() -> None:
    drop_path = type("DropPath", (nn.Module,), {"drop_prob": 0.1, "scale_by_keep": False})()
    with pytest.raises(NotCovered, match="without scale_by_keep"):
        reading.read_drop_path(drop_path)
    with pytest.raises(NotCovered, match="Dropout in place of stochastic depth"):
        reading.read_drop_path(nn.Dropout())


def test_a_norm_whose_activation_comes_twice() -> None:
    class BatchNormAct2d(nn.BatchNorm2d):
        def __init__(self) -> None:
            super().__init__(4)
            self.drop, self.act = nn.Identity(), nn.ReLU()

    conv, depthwise = nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 3, padding=1, groups=4)
    parts = {"expand": conv, "depthwise": depthwise, "project": conv}
    with pytest.raises(NotCovered, match="a norm with an activation, and another one after it"):
        reading.read_bottleneck(**parts, expand_norm=BatchNormAct2d(), expand_activation=nn.ReLU())
    with pytest.raises(NotCovered, match="activation relu after the project norm"):
        reading.read_bottleneck(**parts, project_norm=BatchNormAct2d())
