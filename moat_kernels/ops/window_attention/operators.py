"""The operators of `window_attention`: what compilers, exporters and dispatch modes see of a call.

Schemas carry tensors, numbers and text. Eager calls go to the backends without them.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from moat_kernels.ops.common.autocast import without_autocast
from moat_kernels.ops.common.registration import define_op
from moat_kernels.ops.window_attention.contract import Backend
from moat_kernels.ops.window_attention.cpu import backend as cpu_backend
from moat_kernels.ops.window_attention.description import WindowAttentionDescription
from moat_kernels.ops.window_attention.flops import described_backward, described_forward
from moat_kernels.ops.window_attention.torch import backend as torch_backend
from moat_kernels.ops.window_attention.triton import backend as triton_backend

BACKENDS: Mapping[str, Backend] = {
    "torch": torch_backend,
    "cpu": cpu_backend,
    "triton": triton_backend,
}


@without_autocast
def evaluate(qkv: Tensor, bias_table: Tensor | None, description: str, backend: str) -> Tensor:
    decoded = WindowAttentionDescription.decode(description)
    return BACKENDS[backend].evaluate(qkv, bias_table, decoded)


@without_autocast
def forward(qkv: Tensor, bias_table: Tensor | None, description: str, backend: str) -> list[Tensor]:
    decoded = WindowAttentionDescription.decode(description)
    result = BACKENDS[backend].forward(qkv, bias_table, decoded)
    return [result.output, *result.saved]


@without_autocast
def backward(
    grad: Tensor,
    qkv: Tensor,
    bias_table: Tensor | None,
    output: Tensor,
    saved: list[Tensor],
    description: WindowAttentionDescription,
    backend: str,
    needs_table: bool,
) -> list[Tensor]:
    """[gradient of qkv, that of the table in its dtype if needed]"""
    grad_qkv, grad_table = BACKENDS[backend].backward(
        grad, qkv, bias_table, description, output, saved, needs_table
    )
    if grad_table is None or bias_table is None:
        return [grad_qkv]
    return [grad_qkv, grad_table.to(bias_table.dtype)]


def _backward_operator(
    grad: Tensor,
    qkv: Tensor,
    bias_table: Tensor | None,
    output: Tensor,
    saved: list[Tensor],
    description: str,
    backend: str,
    needs_table: bool,
) -> list[Tensor]:
    decoded = WindowAttentionDescription.decode(description)
    return backward(grad, qkv, bias_table, output, saved, decoded, backend, needs_table)


_CALL = "Tensor qkv, Tensor? bias_table, str description, str backend"

define_op(f"window_attention_evaluate({_CALL}) -> Tensor", evaluate, evaluate, described_forward)
# -> [output, what backward needs ...]
define_op(f"window_attention_forward({_CALL}) -> Tensor[]", forward, forward, described_forward)
define_op(
    "window_attention_backward(Tensor grad, Tensor qkv, Tensor? bias_table, Tensor output, "
    "Tensor[] saved, str description, str backend, bool needs_table) -> Tensor[]",
    _backward_operator,
    _backward_operator,
    described_backward,
)
