"""What torch.compile makes of fused blocks in training: this package's operators, nothing between.

Whatever else stood in the graphs would be launched on a GPU beside what an eager step launches.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from functorch.compile import make_boxed_func
from torch import nn
from torch._dynamo.backends.common import aot_autograd
from torch.fx import GraphModule

from moat_kernels import FusedMBConv, FusedMOATBlock, use_backend

DRAW = ["aten.bernoulli.p", "aten.div.Tensor"]


def operators(graph: GraphModule) -> list[str]:
    """Those that compute something, in their order."""
    found = []
    for node in graph.graph.nodes:
        target = str(node.target)
        if target == "auto_functionalized_v2":  # an operator that changes tensors
            target = str(node.args[0])
        if node.op == "call_function" and "getitem" not in target and "aten.empty" not in target:
            found.append(target.removeprefix("moat_kernels."))
    return found


def compiled_training(block: nn.Module, device: str) -> list[list[str]]:
    """The operators of forward and backward under autocast."""
    found: list[list[str]] = []

    def keep(graph: GraphModule, _: Any) -> Any:
        found.append(operators(graph))
        return make_boxed_func(graph.forward)

    torch._dynamo.reset()
    compiled = torch.compile(
        block.to(device), fullgraph=True, backend=aot_autograd(fw_compiler=keep, bw_compiler=keep)
    )
    x = torch.randn(2, 32, 4, 4, device=device).to(memory_format=torch.channels_last)
    with use_backend("triton"), torch.autocast(device, torch.bfloat16):
        output = compiled(x.requires_grad_())
    output.sum().backward()
    return found


def test_an_mbconv_block(device: str) -> None:
    assert compiled_training(FusedMBConv(32, 32), device) == [
        ["mbconv_forward.default"],
        ["mbconv_backward.default"],
    ]


@pytest.mark.parametrize("recompute", ["none", "block"])
def test_a_moat_block(recompute: str, device: str) -> None:
    block = FusedMOATBlock(32, 32, position_size=4, drop_path=0.1, recompute=recompute)
    forward, backward = compiled_training(block, device)
    half = ["aten.bernoulli.p", "attention_half_forward.default"]
    assert forward == [*DRAW, "mbconv_forward.default", *half]
    assert backward[-1] == "mbconv_backward.default"
    assert "attention_half_backward.default" in backward
    assert all(name.startswith(("mbconv", "attention_half")) for name in backward)
