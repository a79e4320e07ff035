"""Stages one after the other, of which the backward pass recomputes what was not saved."""

from __future__ import annotations

from torch import Tensor

from moat_kernels.ops.mbconv.algebra.stages import Stage


class Chain:
    """Stages run one after the other; `checkpoints[i]` is where saved tensor i enters again."""

    def __init__(self, stages: list[Stage], checkpoints: list[int]) -> None:
        self.stages = stages
        self.checkpoints = checkpoints

    def forward(self, x: Tensor) -> tuple[Tensor, list[Tensor]]:
        """(output, the inputs of the stages at `checkpoints`)."""
        saved = []
        for index, stage in enumerate(self.stages):
            if index in self.checkpoints:
                saved.append(x)
            x = stage.forward(x)
        return x, saved

    def backward(
        self, grad: Tensor, x: Tensor, saved: list[Tensor], needed: frozenset[str]
    ) -> tuple[Tensor | None, dict[str, Tensor]]:
        """(gradient of x if "x" is needed, gradients of the needed parameters by name)."""
        for stage in self.stages:
            stage.needed = needed
        bounds = [0, *self.checkpoints, len(self.stages)]
        starts = [x, *saved]
        result: Tensor | None = grad
        while starts:
            end, begin = bounds.pop(), bounds[-1]
            inputs = [starts.pop()]
            for stage in self.stages[begin : end - 1]:
                inputs.append(stage.forward(inputs[-1]))
            for index in range(end - 1, begin - 1, -1):
                assert result is not None
                needs_input = "x" in needed or index > 0
                result = self.stages[index].backward(result, inputs.pop(), needs_input)
        gradients: dict[str, Tensor] = {}
        for stage in self.stages:
            gradients.update(stage.gradients)
        return result if "x" in needed else None, gradients

    @property
    def statistics(self) -> list[Tensor]:
        return [tensor for stage in self.stages for tensor in stage.statistics]

    def restore_statistics(self, tensors: list[Tensor]) -> list[Tensor]:
        """Hand an earlier forward's statistics to the stages; return the tensors after them."""
        for stage in self.stages:
            count = stage.statistics_count
            stage.statistics, tensors = tuple(tensors[:count]), tensors[count:]
        return tensors
