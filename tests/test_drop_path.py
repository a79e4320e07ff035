"""Stochastic depth by itself."""

from __future__ import annotations

import functools
import itertools

import pytest
import torch
from support.small_model import make_model
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from moat_kernels.drop_path import DropPath, drawing_together

DTYPES = (torch.float64, torch.float32, torch.bfloat16)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_samples_are_dropped_or_scaled(dtype: torch.dtype) -> None:
    drop_path = DropPath(0.25)
    scale = drop_path.scale(torch.empty(4000, 1, dtype=dtype))
    assert scale.dtype == dtype
    assert set(scale.tolist()) == {0.0, torch.tensor(4 / 3, dtype=dtype).item()}
    assert (scale == 0).double().mean() == pytest.approx(0.25, abs=0.03)


def test_every_dtype_draws_the_same_and_every_call_another() -> None:
    drop_path, drawn = DropPath(0.5), []
    for dtype in DTYPES:
        torch.manual_seed(0)
        drawn.append([drop_path.draw(torch.empty(64, dtype=dtype)).tolist() for _ in range(2)])
    assert drawn[0] == drawn[1] == drawn[2]
    assert drawn[0][0] != drawn[0][1]


def test_nothing_is_drawn_in_eval_or_without_probability() -> None:
    x = torch.ones(8, 1, 1, 1)
    state = torch.get_rng_state()
    for drop_path in (DropPath(0.5).eval(), DropPath(0.0)):
        assert drop_path.scale(x) is None and torch.equal(drop_path(x), x)
    assert torch.equal(torch.get_rng_state(), state)


class Draws(TorchDispatchMode):
    """Collects what is drawn inside."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Tensor] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if func.overloadpacket.__name__.startswith("bernoulli"):
            self.seen.append(result.clone())
        return result

    def alone(self) -> list[list[float]]:
        """Those for one drop path each."""
        return [kept.tolist() for kept in self.seen if kept.dim() == 1]


def make_drop_paths() -> list[DropPath]:
    return [DropPath(0.5), DropPath(0.25), DropPath(0.75)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_what_is_drawn_together_is_distributed_alike(dtype: torch.dtype) -> None:
    modules, x = make_drop_paths(), torch.empty(4000, 1, dtype=dtype)
    with drawing_together([*modules, modules[0]], x):
        scales = [module.scale(x) for module in modules]
        again = modules[0].draw(x)
    for module, scale in zip(modules, scales, strict=True):
        factor = torch.tensor(1 / (1 - module.probability), dtype=dtype).item()
        assert scale.dtype == dtype and set(scale.tolist()) == {0.0, factor}
        assert (scale == 0).double().mean() == pytest.approx(module.probability, abs=0.03)
    assert not torch.equal(again, (scales[0] != 0).to(again))


def test_who_draws_more_or_for_another_map_draws_by_itself() -> None:
    module, x = DropPath(0.5), torch.empty(64, 1)
    with drawing_together([module], x):
        other = module.draw(torch.empty(32, 1))
        state = torch.get_rng_state()
        taken = module.draw(x)
        assert torch.equal(torch.get_rng_state(), state)  # it was drawn before
        more = module.draw(x)
    assert (len(other), len(taken), len(more)) == (32, 64, 64)
    assert not torch.equal(taken, more)


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("fused", [True, False])
def test_checkpointed_blocks_draw_the_same_again(fused: bool, reentrant: bool) -> None:
    """Whoever wraps a block: what is recomputed outside of the model's forward pass agrees."""

    model = make_model(torch.float32, fused=fused)
    x = torch.randn(8, 3, 32, 32)
    for block in itertools.chain(*model.stages):
        block.drop_path.probability = 0.5
        block.forward = functools.partial(checkpoint, block.forward, use_reentrant=reentrant)
    with Draws() as draws:
        loss = model.train()(x).sum()
        forward = draws.alone()
        draws.seen.clear()
        loss.backward()
    assert len(forward) >= 4
    assert sorted(forward) == sorted(draws.alone())


@pytest.mark.parametrize("fused", [True, False])
def test_a_model_draws_once(fused: bool) -> None:
    model, x = make_model(torch.float32, fused=fused).train(), torch.randn(4, 3, 32, 32)
    for module in model.modules():
        if isinstance(module, DropPath):
            module.probability = 0.5
    with Draws() as draws:
        model(x).sum().backward()
    assert len(draws.seen) == 1
