"""Other ways to run a model in PyTorch: compiled, and with activations computed again."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from moat_kernels.reference import MBConvBlock


def compiled(function: Callable[..., Tensor], **arguments: Any) -> Callable[..., Tensor]:
    """torch.compile of a function or module; what was compiled before is forgotten."""
    torch.compiler.reset()  # past the eighth shape of a function it would run eagerly
    return torch.compile(function, **arguments)


def checkpointed(block: torch.nn.Module) -> Callable[[Tensor], Tensor]:
    """The block's forward with its activations computed again in backward.

    The reentrant kind, because it saves the block's input where it can be counted.
    """
    return partial(checkpoint, block.forward, use_reentrant=True)


def checkpoint_blocks(model: torch.nn.Module) -> torch.nn.Module:
    """Every stock block of the model checkpointed, in place."""
    for module in model.modules():
        if isinstance(module, MBConvBlock):
            module.forward = checkpointed(module)
    return model
