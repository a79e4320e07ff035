"""Linear layers around attention, computed natively where they are plain."""

from __future__ import annotations

from torch import Tensor, nn

from moat_kernels.inspection import is_plain
from moat_kernels.ops.linear import linear
from moat_kernels.tensor_access import tensor_of


def apply_linear(module: nn.Module, x: Tensor) -> Tensor:
    """module(x), by the native kernels if it is a plain nn.Linear that they cover.

    x: [.., K], weight [N, K]. Hooked, replaced or parametrized modules run as they are.
    """
    if type(module) is not nn.Linear or not is_plain(module, nn.Linear):
        return module(x)
    return linear(x, tensor_of(module, "weight"), tensor_of(module, "bias"))
