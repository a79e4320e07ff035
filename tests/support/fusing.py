"""Comparison of a fused model with the untouched one, in float64, in training and in eval."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

import moat_kernels as mk
from support.tolerances import FUSED_MODEL, assert_close


def randomize(model: nn.Module) -> nn.Module:
    """The model in float64 with weights away from the trivial ones (zeros, ones)."""
    model.double()
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.affine:
            nn.init.normal_(module.weight, 1.0, 0.2)
            nn.init.normal_(module.bias, std=0.2)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
            nn.init.normal_(module.running_mean, std=0.2)
    for name, parameter in model.named_parameters():
        if "bias_table" in name or "rel_pos_bias" in name or name.endswith(".bias"):
            nn.init.normal_(parameter, std=0.3)
    return model


def run(model: nn.Module, *inputs: Tensor, training: bool) -> dict[str, Tensor]:
    """Outputs, gradients and buffers after one forward and backward pass with a fixed seed."""
    inputs = tuple(value.detach().clone().requires_grad_() for value in inputs)
    model.train(training).zero_grad(set_to_none=True)
    torch.manual_seed(5)  # drop path draws
    outputs = model(*inputs)
    outputs = outputs if isinstance(outputs, list) else [outputs]
    torch.stack([output.square().mean() for output in outputs]).sum().backward()
    results = {f"output {index}": output.detach() for index, output in enumerate(outputs)}
    results |= {f"gradient of input {index}": value.grad for index, value in enumerate(inputs)}
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            results[f"gradient of {name}"] = parameter.grad
    return results | {name: buffer.clone() for name, buffer in model.named_buffers()}


def check_same(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Assert that results of `run` agree, and that there are the same ones."""
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        # Gradients that are zero in exact arithmetic (biases before a norm) have only the floor.
        assert_close(actual[name], value, FUSED_MODEL, name, floor=1e-3)


def check_fused(model: nn.Module, *inputs: Tensor, fused: int) -> mk.FusionReport:
    """Fuse a copy of `model`, expect `fused` modules fused, and the same numbers in both modes."""
    randomize(model)
    inputs = tuple(value.double() for value in inputs)
    changed = copy.deepcopy(model)
    report = mk.fuse(changed)
    assert len(report.fused) == fused, str(report)
    for training in (True, False):
        expected = run(model, *inputs, training=training)
        check_same(run(changed, *inputs, training=training), expected)
    return report


def reasons(model: nn.Module) -> set[str]:
    """Why `fuse` leaves modules of `model` as they are."""
    return {entry.reason for entry in mk.fuse(model).skipped}
