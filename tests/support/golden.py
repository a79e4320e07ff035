"""Outputs and gradients of the official TensorFlow MOAT, and the weights and inputs behind them.

The npz files hold what TensorFlow 2.15 computed (float32, NHWC, batch 2, no drop path); variables,
inputs and cotangents are functions of their name, shape and the file's seed.
Keys: eval/<output>, train/<output>, train/loss, train/moving/<variable>, grad/input,
grad/<variable>; the loss is the sum over `cotangents` of mean(output * cotangent).
"""

from __future__ import annotations

import json
import zlib
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import torch

GOLDEN = Path(__file__).parent.parent / "golden"
CASES: dict[str, dict] = json.loads((GOLDEN / "cases.json").read_text())


def _generator(name: str, seed: int) -> np.random.RandomState:
    """The frozen legacy stream, keyed by name and seed."""
    return np.random.RandomState([zlib.crc32(name.encode()) & 0xFFFFFFFF, seed])


def variable_values(name: str, shape: tuple[int, ...], seed: int) -> np.ndarray:
    """Value of an official variable, by its full name and official shape, float32."""
    generator = _generator(name, seed)
    layer, leaf = name.split("/")[-2:]
    if leaf == "gamma":
        values = generator.uniform(0.5, 1.5, shape)
    elif leaf == "moving_variance":
        values = generator.uniform(0.5, 2.0, shape)
    elif leaf in ("beta", "moving_mean"):
        values = 0.3 * generator.standard_normal(shape)
    elif leaf == "bias":
        values = 0.1 * generator.standard_normal(shape)
    elif leaf == "relative_position_embedding":
        values = 0.5 * generator.standard_normal(shape)
    else:
        values = generator.standard_normal(shape) / np.sqrt(_fan_in(layer, leaf, shape))
    return values.astype(np.float32)


def _fan_in(layer: str, leaf: str, shape: tuple[int, ...]) -> int:
    if leaf == "kernel":  # [H, W, in, out]
        return int(np.prod(shape[:-1]))
    if leaf == "depthwise_kernel":  # [H, W, C, 1]
        return shape[0] * shape[1]
    if leaf == "weight":  # q, k, v [C, heads, head_dim]; o [heads, head_dim, C]
        return shape[0] * shape[1] if layer == "o" else shape[0]
    raise ValueError(f"no rule for {layer}/{leaf}")


def random_tensor(name: str, shape: tuple[int, ...], seed: int) -> np.ndarray:
    """Standard normal input or cotangent called `name`, float32."""
    generator = _generator(f"tensor:{name}", seed)
    return generator.standard_normal(shape).astype(np.float32)


def from_nhwc(array: np.ndarray) -> torch.Tensor:
    """A copy as NCHW (channels_last in memory); other ranks unchanged."""
    tensor = torch.from_numpy(np.array(array))
    return tensor.permute(0, 3, 1, 2) if tensor.dim() == 4 else tensor


@dataclass(frozen=True)
class GoldenCase:
    """One official run: its configuration, variables, input and results."""

    name: str
    config: dict
    variables: dict[str, np.ndarray]
    input: torch.Tensor
    cotangents: dict[str, torch.Tensor]
    results: dict[str, np.ndarray]

    def output(self, mode: str) -> dict[str, torch.Tensor]:
        """The outputs of "eval" or "train" by name, NCHW."""
        prefix = f"{mode}/"
        return {
            key.removeprefix(prefix): from_nhwc(value)
            for key, value in self.results.items()
            if key.startswith(prefix) and key.count("/") == 1 and key != "train/loss"
        }

    def variables_under(self, prefix: str) -> dict[str, np.ndarray]:
        """Results by official variable name under "grad/" or "train/moving/"."""
        return {
            key.removeprefix(prefix): value
            for key, value in self.results.items()
            if key.startswith(prefix) and key != "grad/input"
        }


@cache
def load_case(name: str) -> GoldenCase:
    """The golden case called `name`."""
    case = CASES[name]
    seed = case["seed"]
    with np.load(GOLDEN / f"{name}.npz") as file:
        results = dict(file)
    return GoldenCase(
        name=name,
        config=case["config"],
        variables={
            key: variable_values(key, tuple(shape), seed)
            for key, shape in case["variables"].items()
        },
        input=from_nhwc(random_tensor("input", tuple(case["input_shape"]), seed)),
        cotangents={
            key: from_nhwc(random_tensor(f"cotangent/{key}", tuple(shape), seed))
            for key, shape in case["cotangents"].items()
        },
        results=results,
    )
