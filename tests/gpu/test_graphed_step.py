"""Training steps captured by `graphed_step`, against the same steps launched kernel by kernel.

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
from torch.optim import SGD, AdamW, Optimizer

import moat_kernels as mk

RESOLUTION, BATCH = 64, 32
# bfloat16 through the whole model; the kernels are the same, and so mostly are the bits.
TOLERANCE = 1e-3


def make_batch(size: int, device: str) -> tuple[Tensor, Tensor]:
    images = torch.randn(size, 3, RESOLUTION, RESOLUTION, device=device)
    labels = torch.randint(CLASSES, (size,), device=device)
    return images.to(memory_format=torch.channels_last), labels


def make(device: str, drop_path_rate: float = 0.0) -> mk.MOAT:
    model = make_model(torch.float32, drop_path_rate=drop_path_rate).to(device)
    return model.to(memory_format=torch.channels_last)


def train(
    model: nn.Module, optimizer: Optimizer, batches: list[tuple[Tensor, Tensor]]
) -> list[float]:
    """The loop that `graphed_step` stands for; its losses."""
    losses = []
    for images, labels in batches:
        optimizer.zero_grad()
        with torch.autocast("cuda", torch.bfloat16):
            loss = F.cross_entropy(model(images), labels)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def assert_states_close(actual: nn.Module, expected: nn.Module) -> None:
    """Parameters and running statistics."""
    state = actual.state_dict()
    for name, value in expected.state_dict().items():
        assert_close(state[name], value, TOLERANCE, name, floor=1e-3)


def test_steps_of_two_shapes_are_those_without_a_graph(cuda: str, kernels: None) -> None:
    model = make(cuda, drop_path_rate=0.3)
    twin = copy.deepcopy(model)
    batches = [make_batch(size, cuda) for size in (BATCH, 48, BATCH, 48)]
    torch.manual_seed(1)
    expected = train(twin, SGD(twin.parameters(), lr=0.01, momentum=0.9), batches)

    optimizer = SGD(model.parameters(), lr=0.01, momentum=0.9)
    step = mk.graphed_step(
        model, F.cross_entropy, optimizer, batches[0], autocast_dtype=torch.bfloat16
    )
    torch.manual_seed(1)
    losses = [step(*batch).item() for batch in batches]
    assert losses == pytest.approx(expected, rel=TOLERANCE)
    assert_states_close(model, twin)


def test_images_may_come_from_the_host(cuda: str) -> None:
    images, labels = make_batch(BATCH, cuda)
    losses = []
    for place in (images, images.cpu(), images.cpu().pin_memory(), images.contiguous()):
        model = make(cuda)
        optimizer = SGD(model.parameters(), lr=0.01)
        step = mk.graphed_step(
            model, F.cross_entropy, optimizer, (images, labels), autocast_dtype=torch.bfloat16
        )
        losses.append(step(place, labels).item())
    assert len(set(losses)) == 1


@pytest.mark.parametrize("rate", [0.0, 0.5])
def test_drop_path_draws_anew_in_every_replay(rate: float, cuda: str) -> None:
    model = make(cuda, drop_path_rate=rate)
    batch = make_batch(BATCH, cuda)
    step = mk.graphed_step(
        *(model, F.cross_entropy, SGD(model.parameters(), lr=0.0), batch),
        autocast_dtype=torch.bfloat16,
    )
    losses = [step(*batch).item() for _ in range(4)]
    assert len(set(losses)) == (4 if rate else 1)


def test_capturing_changes_nothing(cuda: str) -> None:
    model, batch = make(cuda, drop_path_rate=0.3), make_batch(BATCH, cuda)
    lr = torch.tensor(0.01, device=cuda)
    optimizer = AdamW(model.parameters(), lr=lr, fused=True, capturable=True)
    before, random = copy.deepcopy(model.state_dict()), torch.cuda.get_rng_state()
    mk.graphed_step(model, F.cross_entropy, optimizer, batch, autocast_dtype=torch.bfloat16)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(not value.any() for state in optimizer.state.values() for value in state.values())
    assert torch.equal(torch.cuda.get_rng_state(), random)


def test_a_scheduler_changes_a_learning_rate_that_is_a_tensor(cuda: str) -> None:
    model, batch = make(cuda), make_batch(BATCH, cuda)
    lr = torch.tensor(0.01, device=cuda)
    optimizer = AdamW(model.parameters(), lr=lr, fused=True, capturable=True)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=1, gamma=0.0)
    step = mk.graphed_step(model, F.cross_entropy, optimizer, batch, autocast_dtype=torch.bfloat16)
    head = model.logits_head.weight
    before = head.detach().clone()
    step(*batch)
    scheduler.step()
    trained = head.detach().clone()
    step(*batch)
    assert torch.equal(head, trained) and not torch.equal(head, before)


def test_a_scaler_skips_a_step_whose_gradients_overflow(cuda: str) -> None:
    model, batch = make(cuda), make_batch(BATCH, cuda)
    optimizer = AdamW(model.parameters(), lr=0.01, fused=True, capturable=True)
    scaler = torch.amp.GradScaler("cuda", init_scale=2.0**60, backoff_factor=2.0**-55)
    step = mk.graphed_step(
        *(model, F.cross_entropy, optimizer, batch),
        autocast_dtype=torch.float16,
        scaler=scaler,
    )
    assert scaler.get_scale() == 2.0**60
    head = model.logits_head.weight
    before = head.detach().clone()
    step(*batch)
    assert scaler.get_scale() == 2.0**5
    assert torch.equal(head, before)
    step(*batch)
    assert scaler.get_scale() == 2.0**5
    assert not torch.equal(head, before)


def test_a_step_that_waits_is_refused_and_leaves_the_gpu_usable(cuda: str) -> None:
    model, batch = make(cuda), make_batch(BATCH, cuda)

    def loss(outputs: Tensor, labels: Tensor) -> Tensor:
        value = F.cross_entropy(outputs, labels)
        value.item()
        return value

    optimizer = AdamW(model.parameters(), lr=0.01, fused=True, capturable=True)
    with pytest.raises(RuntimeError, match="cannot be captured in a CUDA graph"):
        mk.graphed_step(model, loss, optimizer, batch)
    step = mk.graphed_step(model, F.cross_entropy, optimizer, batch)
    assert step(*batch).isfinite()
