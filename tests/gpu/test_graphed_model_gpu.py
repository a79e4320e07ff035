"""Models by `graphed_model` in loops that one writes, against the same loops without graphs.

Under autocast, with drop path: what a user's training runs.
"""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from support.small_model import CLASSES, make_model
from support.tolerances import assert_close
from torch import Tensor, nn

import moat_kernels as mk

RESOLUTION = 64
# bfloat16 through the whole model; the kernels are the same, and so mostly are the bits.
TOLERANCE = 1e-3


def make(device: str, drop_path_rate: float = 0.0) -> mk.MOAT:
    model = make_model(torch.float32, drop_path_rate=drop_path_rate).to(device)
    return model.to(memory_format=torch.channels_last)


def make_batches(device: str) -> list[tuple[Tensor, Tensor]]:
    """Of two sizes, in turns."""
    return [
        (
            torch.randn(size, 3, RESOLUTION, RESOLUTION, device=device).to(
                memory_format=torch.channels_last
            ),
            torch.randint(CLASSES, (size,), device=device),
        )
        for size in (32, 24, 32, 24)
    ]


def train(model: nn.Module, batches: list[tuple[Tensor, Tensor]]) -> list[Tensor]:
    """Losses, gradients that are summed over two batches, parameters and running statistics."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    torch.manual_seed(1)
    results = []
    for number, (images, labels) in enumerate(batches):
        with torch.autocast("cuda", torch.bfloat16):
            loss = F.cross_entropy(model(images), labels)
        loss.backward()
        results.append(loss.detach())
        if number % 2:
            results += [parameter.grad.clone() for parameter in model.parameters()]
            optimizer.step()
            optimizer.zero_grad()
        model.eval()
        with torch.no_grad(), torch.autocast("cuda", torch.bfloat16):
            results.append(model(images[:3]))
        model.train()
    return [*results, *(tensor.clone() for tensor in model.state_dict().values())]


def test_a_loop_does_not_notice(cuda: str, kernels: None) -> None:
    model = make(cuda, drop_path_rate=0.3)
    twin, batches = copy.deepcopy(model), make_batches(cuda)
    expected = train(twin, batches)
    actual = train(mk.graphed_model(model), batches)
    for one, other in zip(actual, expected, strict=True):
        assert_close(one, other, TOLERANCE, floor=1e-3)


def test_drop_path_draws_anew_and_capturing_changes_nothing(cuda: str) -> None:
    model, twin = (make(cuda, drop_path_rate=0.5) for _ in range(2))
    images, _ = make_batches(cuda)[0]
    mk.graphed_model(model)
    drawn = []
    for called in (model, twin):
        torch.manual_seed(3)
        drawn.append([called(images).detach() for _ in range(3)])
    assert not torch.equal(drawn[0][0], drawn[0][1])
    for one, other in zip(*drawn, strict=True):
        assert_close(one, other, TOLERANCE, floor=1e-3)


def test_a_scaler_and_gradients_that_one_keeps(cuda: str) -> None:
    model, batches = mk.graphed_model(make(cuda)), make_batches(cuda)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, fused=True)
    scaler = torch.amp.GradScaler("cuda", init_scale=2.0**10)
    for images, labels in batches:
        optimizer.zero_grad()
        with torch.autocast("cuda", torch.float16):
            loss = F.cross_entropy(model(images), labels)
        scaler.scale(loss).backward()
        kept = model.logits_head.weight.grad
        before = kept.clone()
        with torch.no_grad():
            model(images)
        assert torch.equal(kept, before)
        scaler.step(optimizer)
        scaler.update()
    assert all(bool(parameter.isfinite().all()) for parameter in model.parameters())


class Waiting(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * x.sum().item()


def test_a_model_that_waits_is_refused_and_the_next_one_works(cuda: str) -> None:
    with pytest.raises(RuntimeError, match=r"may wait for the GPU \(.item\(\)"):
        mk.graphed_model(Waiting(2, 2).to(cuda))(torch.ones(1, 2, device=cuda))
    model = mk.graphed_model(nn.Linear(2, 2).to(cuda))
    model(torch.ones(1, 2, device=cuda)).sum().backward()
    assert model.weight.grad is not None
