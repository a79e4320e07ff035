"""What a MOAT begins with: two 3x3 convolutions around a batch norm and a GELU."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moat_kernels.adapters.reading import NotCovered, read_norm
from moat_kernels.inspection import (
    interceptions,
    is_plain,
    is_plain_tensor,
    remember_code,
)
from moat_kernels.modules import check_runs_as_made
from moat_kernels.normalization import BatchNorm2d, norm_tensors
from moat_kernels.ops.common.backends import warn_once
from moat_kernels.ops.common.batch_norm import Norm, NormParameters
from moat_kernels.ops.common.checks import check_devices
from moat_kernels.ops.frozen import CannotFreeze, FrozenStep, Quantizations, stem_step
from moat_kernels.ops.stem import api as stem
from moat_kernels.ops.stem.convolution import convolution
from moat_kernels.reference import SameConv2d, initialize
from moat_kernels.tensor_access import child, is_parametrized, tensor_of
from moat_kernels.tracing import is_traced, record_call


class Stem(nn.Module):
    """3x3 stride 2, BN, GELU, 3x3: [B, in_channels, H, W] -> [B, width, ceil(H/2), ceil(W/2)].

    The second convolution is neither normalised nor activated.
    """

    def __init__(self, width: int, in_channels: int = 3) -> None:
        super().__init__()
        self.conv_0 = SameConv2d(in_channels, width, 3, 2)
        self.norm_0 = BatchNorm2d(width)
        self.conv_1 = SameConv2d(width, width, 3)
        initialize(self)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv_1(F.gelu(self.norm_0(self.conv_0(x))))


@remember_code
class FusedStem(Stem):
    """`Stem` by native kernels where they cover the call; the output is in channels_last.

    Eval is one pass. In training batch norm and GELU are one op, and two maps of `width` channels
    are kept for the backward pass (stock: three); with `recompute` one, and GELU is computed again.
    """

    def __init__(self, width: int, in_channels: int = 3, *, recompute: bool = False) -> None:
        super().__init__(width, in_channels)
        self.recompute = recompute

    def frozen_steps(
        self, maps: torch.dtype | None = None, quantizations: Sequence[Quantizations] = ()
    ) -> list[FrozenStep]:
        """What inference computes, its weights packed as they are now. Raises CannotFreeze.

        maps: the dtype of the output and of products; None: that of the weights. A stem has no
            products in int8.
        """
        check_runs_as_made(self, (FusedStem,))
        try:
            first, norm, tensors, second = self.read()
        except NotCovered as obstacle:
            raise CannotFreeze(str(obstacle)) from obstacle
        if not norm.frozen:
            raise CannotFreeze("a norm that measures the batch")
        return [stem_step(first, tensors, norm.eps, second, maps)]

    def read(self) -> tuple[list[Tensor | None], Norm, NormParameters, list[Tensor | None]]:
        """Weight and bias of the first convolution, the norm, those of the second. Or NotCovered.

        Raised before any tensor is read.
        """
        if reason := interceptions(self, ("conv_0", "norm_0", "conv_1")):
            raise NotCovered(reason)
        convolutions = (child(self, "conv_0"), child(self, "conv_1"))
        for conv, stride in zip(convolutions, ((2, 2), (1, 1)), strict=True):
            if not is_plain(conv, SameConv2d):
                raise NotCovered(f"{type(conv).__name__} in place of a convolution")
            if (conv.stride, conv.dilation, conv.groups) != (stride, (1, 1), 1):
                raise NotCovered("other strides, dilation or groups")
            if conv.padding_mode != "zeros":
                raise NotCovered(f"padding_mode {conv.padding_mode!r}")
        norm = child(self, "norm_0")
        reading = read_norm(norm)
        if reading.norm is None or reading.activation != "identity":
            raise NotCovered(f"{type(norm).__name__} in place of a batch norm")
        first, second = (
            [tensor_of(conv, part) for part in ("weight", "bias")] for conv in convolutions
        )
        tensors = norm_tensors(norm)
        if not all(map(is_plain_tensor, (*first, *tensors, *second))):
            raise NotCovered("a subclass among its tensors")
        return first, reading.norm, tensors, second

    def forward(self, x: Tensor) -> Tensor:
        if is_traced(x):
            return record_call(self, x)
        try:
            if is_parametrized(self.conv_0) or is_parametrized(self.conv_1):
                # What computes the weights must do so once in a call.
                raise NotCovered("parametrized weights")
            first, norm, tensors, second = self.read()
        except NotCovered as obstacle:
            warn_once(f"{type(self).__name__}: {obstacle}; running unfused")
        else:
            if norm.frozen and stem.covers(x, first, tensors, second):
                return stem.stem(x, first, tensors, norm.eps, second)
            if stem.covers_training(x, first, norm, tensors, second):
                z = self.conv_0(x.contiguous(memory_format=torch.channels_last))
                return stem.norm_gelu_conv(z, norm, tensors, second, self.recompute)
            if stem.covers_compiled_training(x, first, second):
                z = convolution(x, first, stride=2)
                return convolution(F.gelu(self.norm_0(z)), second, stride=1)
            names = ("conv_0.weight", "conv_0.bias", "conv_1.weight", "conv_1.bias")
            check_devices("stem", x, dict(zip(names, (*first, *second), strict=True)))
        # The blocks that follow would each convert to channels_last and back.
        return super().forward(x.contiguous(memory_format=torch.channels_last))
