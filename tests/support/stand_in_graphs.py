"""Capturing without a GPU: warmed up as CUDA graphs are, then calls are kept and called again."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar
from unittest import mock

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from moat_kernels import graph_recorder


class StandIn:
    """Of graph_recorder.Recorder. captures: of all of them, since `standing_in`."""

    captures: ClassVar[int] = 0

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def run(self, function: Callable[[], Any]) -> None:
        function()

    rehearse = run

    def capture(self, function: Callable[[], Any]) -> tuple[Callable[[], None], Any]:
        result = function()
        StandIn.captures += 1

        def replay() -> None:
            for old, new in zip(tree_leaves(result), tree_leaves(function()), strict=True):
                if isinstance(old, Tensor):
                    old.detach().copy_(new)

        return replay, result


def standing_in() -> Any:
    """Inside the `with` block calls on a CPU are captured."""
    StandIn.captures = 0
    return mock.patch.multiple(graph_recorder, CAPTURED=("cpu",), Recorder=StandIn)
