"""Wrong shapes, dtypes, devices and strides of every tensor: an error of Python, never a signal.

The calls run in processes of their own: one that ends names the call that it was at. A call that
does not raise must give the right result.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from support import native_calls
from support.native import needs_extension
from support.wrong_arguments import run_in_process

from moat_kernels.modules import FusedAttention

pytestmark = needs_extension


def test_every_native_op(tmp_path: Path) -> None:
    assert run_in_process("native_calls", 1, tmp_path) >= 2000


def test_modules_and_functions(tmp_path: Path) -> None:
    assert run_in_process("module_calls", 1, tmp_path) >= 500


def test_no_native_op_is_left_out() -> None:
    prefix = "moat_kernels::cpu_"
    registered = {
        name.removeprefix("moat_kernels::")
        for name in torch._C._dispatch_get_all_op_names()
        if name.startswith(prefix)
    }
    called = {call.name.partition(",")[0] for call in native_calls.calls()}
    assert called == registered - set(native_calls.WITHOUT_TENSORS)


def test_a_wider_map_is_refused_as_by_stock() -> None:
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        FusedAttention(32)(torch.randn(1, 16, 16, 64))


def test_a_weight_elsewhere_is_refused() -> None:
    x, weight, bias = torch.randn(40, 32), torch.randn(48, 32, device="meta"), torch.randn(48)
    op = torch.ops.moat_kernels.cpu_linear_forward
    with pytest.raises(RuntimeError, match="all tensors must be on one device, got cpu, meta"):
        op(x, weight, bias)
    attention = FusedAttention(32)
    attention.qkv.weight = torch.nn.Parameter(attention.qkv.weight.to("meta"))
    with pytest.raises(RuntimeError, match="weight is on meta but x is on cpu"):
        attention(torch.randn(1, 16, 16, 32))
