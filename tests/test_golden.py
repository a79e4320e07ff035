"""The reference and the fused blocks equal official TensorFlow MOAT, in eval and in training."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from support import tolerances
from support.golden import CASES, GoldenCase, load_case
from support.tolerances import assert_close

import moat_kernels as mk
from moat_kernels.checkpoints import convert_variables
from moat_kernels.ops.common.backends import backend_status
from moat_kernels.reference import MBConvBlock, MOATBlock

BLOCKS = [name for name in CASES if "block" in CASES[name]["config"]]
MODELS = [name for name in CASES if name.startswith("c_")]
TRAINED = [name for name in CASES if CASES[name]["cotangents"]]
# "reference", or a backend and a recompute level
IMPLEMENTATIONS = ["reference"] + [
    f"{backend} {recompute}"
    for backend in ("torch", "cpu")
    if backend_status()[backend].usable
    for recompute in ("none", "expand", "block")
]
EVAL_IMPLEMENTATIONS = [*IMPLEMENTATIONS, *(["frozen"] if backend_status()["cpu"].usable else [])]


def build(case: GoldenCase, implementation: str) -> torch.nn.Module:
    """The block or model of a golden case with its weights, in eval mode."""
    _, _, recompute = implementation.partition(" ")
    if implementation == "frozen":
        recompute = "auto"
    fused = {"recompute": recompute} if recompute else {}
    if "block" in case.config:
        classes = {
            "MBConvBlock": mk.FusedMBConv if fused else MBConvBlock,
            "MOATBlock": mk.FusedMOATBlock if fused else MOATBlock,
        }
        module = classes[case.config["block"]](**case.config["arguments"], **fused)
    else:
        module = mk.create_model(
            case.config["model"], fused=bool(fused), **fused, **case.config["arguments"]
        )
    state_dict = convert_variables(case.variables).state_dict
    module.load_state_dict(state_dict, strict=False)
    missing = set(module.state_dict()) - set(state_dict)
    assert not missing, missing
    return module.eval()


@contextmanager
def backend_of(implementation: str) -> Iterator[None]:
    """Computing by the backend that an implementation names."""
    with mk.use_backend(implementation.partition(" ")[0]):
        yield


def named(outputs: torch.Tensor | dict[str, torch.Tensor], case: GoldenCase) -> dict:
    if isinstance(outputs, dict):
        return outputs
    return {"output" if "block" in case.config else "logits": outputs}


@pytest.mark.parametrize("implementation", EVAL_IMPLEMENTATIONS)
@pytest.mark.parametrize("name", BLOCKS + MODELS)
def test_eval_outputs(name: str, implementation: str) -> None:
    case = load_case(name)
    module = build(case, implementation)
    if implementation == "frozen":
        module, implementation = mk.freeze(module), "cpu"
    with torch.no_grad(), backend_of(implementation):
        outputs = named(module(case.input), case)
    expected = case.output("eval")
    assert expected
    for key, value in expected.items():
        assert_close(outputs[key], value, tolerances.GOLDEN_OUTPUT, key)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("name", TRAINED)
def test_training_outputs_gradients_and_moving_statistics(name: str, implementation: str) -> None:
    case = load_case(name)
    module = build(case, implementation).train()
    x = case.input.clone(memory_format=torch.preserve_format).requires_grad_()
    with backend_of(implementation):
        outputs = named(module(x), case)
    loss = sum((outputs[key] * value).mean() for key, value in case.cotangents.items())
    loss.backward()

    for key, value in case.output("train").items():
        assert_close(outputs[key], value, tolerances.GOLDEN_OUTPUT, key)
    loss_error = abs(loss.item() - float(case.results["train/loss"]))
    assert loss_error <= tolerances.GOLDEN_OUTPUT * max(1.0, abs(loss.item()))

    moving = case.variables | case.variables_under("train/moving/")
    updated = convert_variables(moving).state_dict
    for key, value in module.named_buffers():
        if "running" in key:
            error = float((value - updated[key]).abs().max())
            assert error <= tolerances.GOLDEN_MOVING, (key, error)

    block = "block" in case.config
    tolerance = tolerances.GOLDEN_BLOCK_GRADIENT if block else tolerances.GOLDEN_MODEL_GRADIENT
    expected_x = torch.from_numpy(case.results["grad/input"]).permute(0, 3, 1, 2)
    assert_close(x.grad, expected_x, tolerance, "input")
    gradients = case.variables_under("grad/")
    unused = {key: value * 0 for key, value in case.variables.items() if key not in gradients}
    expected = convert_variables(unused | gradients).state_dict
    for key, parameter in module.named_parameters():
        _assert_gradient(key, parameter.grad, expected[key], tolerance)


def _assert_gradient(
    name: str, actual: torch.Tensor, expected: torch.Tensor, tolerance: float
) -> None:
    """Compare one gradient, zeros of exact arithmetic absolutely."""
    if name.endswith("attention.qkv.bias"):
        (query, key, value), (q, k, v) = actual.chunk(3), expected.chunk(3)
        assert float(key.abs().max()) <= tolerances.GOLDEN_ZERO_GRADIENT, name
        assert float(k.abs().max()) <= tolerances.GOLDEN_ZERO_GRADIENT, name
        actual, expected = torch.cat((query, value)), torch.cat((q, v))
    if name.endswith(("pre_norm.bias", "stem.conv_0.bias")):
        assert float(actual.abs().max()) <= tolerances.GOLDEN_ZERO_GRADIENT, name
    else:
        assert_close(actual, expected, tolerance, name)


@pytest.mark.parametrize(
    ("fused", "frozen"),
    [(False, False), (True, False), (True, True)],
    ids=["reference", "fused", "frozen"],
)
def test_tiny_moat_0_at_its_resolution(fused: bool, frozen: bool) -> None:
    if frozen and not backend_status()["cpu"].usable:
        pytest.skip("no native kernels")
    case = load_case("d_tiny_moat0_256_eval")
    model = mk.create_model("tiny_moat_0", fused=fused, drop_path_rate=0.0).eval()
    state_dict = convert_variables(case.variables).state_dict
    model.load_state_dict(state_dict)
    model = mk.freeze(model) if frozen else model
    with torch.no_grad():
        stages = model.forward_stages(case.input)
        logits = model.forward_head(stages[-1])
    expected = torch.from_numpy(case.results["logits"])
    assert_close(logits, expected, tolerances.GOLDEN_OUTPUT, "logits")
    for number, stage in enumerate(stages, start=1):
        for key, output in ((f"stage{number}", stage), (f"res{number}", stage)):
            output = torch.nn.functional.gelu(output) if key.startswith("res") else output
            shape = case.results[f"endpoint_shape/{key}"]
            assert tuple(output.permute(0, 2, 3, 1).shape) == tuple(shape)
            mean, std = output.mean((2, 3)), output.std((2, 3), correction=0)
            for part, actual in (("mean", mean), ("std", std)):
                value = torch.from_numpy(case.results[f"endpoint_{part}/{key}"])
                assert_close(actual, value, tolerances.GOLDEN_OUTPUT, f"{key} {part}")
