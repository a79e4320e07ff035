"""Squeeze-excite behind its pool: two small products on the mean of every map."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from moat_kernels.ops.common.activations import activate, activate_backward
from moat_kernels.ops.mbconv.description import MBConvParameters


@dataclass(frozen=True)
class Excitation:
    """Squeeze-excite of one batch: sigmoid(W2 act(W1 mean + b1) + b2), [B, E]."""

    mean: Tensor
    reduced: Tensor
    activated: Tensor
    gate: Tensor

    @staticmethod
    def compute(mean: Tensor, parameters: MBConvParameters, activation: str) -> Excitation:
        assert parameters.se_reduce_weight is not None and parameters.se_expand_weight is not None
        reduced = F.linear(mean, parameters.se_reduce_weight.flatten(1), parameters.se_reduce_bias)
        activated = activate(activation, reduced)
        logit = F.linear(
            activated, parameters.se_expand_weight.flatten(1), parameters.se_expand_bias
        )
        return Excitation(mean, reduced, activated, torch.sigmoid(logit))

    def backward(
        self, grad: Tensor, parameters: MBConvParameters, activation: str
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """(gradient of the mean, gradients of the parameters) from the gradient of the gate."""
        assert parameters.se_reduce_weight is not None and parameters.se_expand_weight is not None
        grad_logit = torch.ops.aten.sigmoid_backward(grad, self.gate)
        grad_activated = grad_logit @ parameters.se_expand_weight.flatten(1)
        grad_reduced = activate_backward(activation, grad_activated, self.reduced)
        return grad_reduced @ parameters.se_reduce_weight.flatten(1), {
            "se_expand_weight": grad_logit.t() @ self.activated,
            "se_expand_bias": grad_logit.sum(0),
            "se_reduce_weight": grad_reduced.t() @ self.mean,
            "se_reduce_bias": grad_reduced.sum(0),
        }
