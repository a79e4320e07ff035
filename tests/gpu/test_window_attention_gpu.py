"""`window_attention` on a GPU against the reference in float64, at MOAT's and at odd shapes."""

from __future__ import annotations

import warnings

import pytest
import torch
from support.backend_comparison import Results, check
from torch import Tensor

from moat_kernels import FallbackWarning, use_backend
from moat_kernels.functional import WindowAttentionDescription, window_attention

# A map (batch, height, width) and its windows.
CASES = {
    "small": ((2, 4, 5), WindowAttentionDescription(2, 16)),
    "14x14": ((2, 14, 14), WindowAttentionDescription(12, 32)),
    "7x7": ((4, 7, 7), WindowAttentionDescription(24, 32)),
    "24x24": ((1, 24, 24), WindowAttentionDescription(16, 32)),
    "windows of 7x7": ((2, 28, 28), WindowAttentionDescription(6, 32, (7, 7))),
    "grid of 8x8": ((2, 32, 24), WindowAttentionDescription(4, 32, (8, 8), partition="grid")),
    "ragged": ((3, 29, 31), WindowAttentionDescription(3, 64, (9, 13), 0.3, "heads_qkv")),
    "one token": ((3, 1, 1), WindowAttentionDescription(2, 16)),
}


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", CASES)
def test_output_and_gradients(name: str, dtype: torch.dtype, bias: bool, device: str) -> None:
    shape, description = CASES[name]
    channels = description.heads * description.head_dim
    height, width = description.window_for(*shape[1:])
    leaves = {"qkv": torch.randn(*shape, 3 * channels)}
    if bias:
        leaves["table"] = torch.randn(description.heads, 2 * height - 1, 2 * width - 1)
    cotangent = torch.randn(*shape, channels)

    def step(backend: str, precision: torch.dtype) -> Results:
        # Values that the dtype under test holds exactly.
        copies: dict[str, Tensor] = {
            key: leaf.to(device, dtype).to(precision, copy=True).requires_grad_()
            for key, leaf in leaves.items()
        }
        with use_backend(backend), warnings.catch_warnings():
            warnings.simplefilter("error", FallbackWarning)
            output = window_attention(copies["qkv"], copies.get("table"), description)
        output.backward(cotangent.to(device, dtype).to(precision))
        gradients = {key: copy.grad for key, copy in copies.items()}
        # Of one token the table's gradient is zero but for rounding.
        if height * width == 1:
            gradients.pop("table", None)
        return {"output": output.detach(), **gradients}

    exact, stock = step("reference", torch.float64), step("reference", dtype)
    check(step("triton", dtype), stock, exact, dtype)
