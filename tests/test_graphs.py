"""Whole training steps by `graphed_step`: on a CPU as they are, and captured by a stand-in.

The stand-in needs no GPU (support/stand_in_graphs.py); tests/gpu/test_graphed_step.py has graphs.
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from support.small_model import CLASSES, RESOLUTION, make_model
from support.stand_in_graphs import StandIn
from torch import Tensor, nn
from torch.optim import SGD, AdamW, NAdam, Optimizer

from moat_kernels import graph_recorder, graphed_step


def make_batch(size: int, seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(size, 3, RESOLUTION, RESOLUTION, generator=generator)
    return images, torch.randint(CLASSES, (size,), generator=generator)


def make_adamw(model: nn.Module, lr: float | Tensor = 0.01) -> Optimizer:
    return AdamW(model.parameters(), lr=lr, fused=True, capturable=True)


def make_sgd(model: nn.Module) -> Optimizer:
    return SGD(model.parameters(), lr=0.01, momentum=0.9)


def tensors(model: nn.Module, optimizer: Optimizer) -> dict[str, Tensor]:
    """Copies of parameters, buffers and what the optimiser keeps, by name."""
    state = {
        f"{name} of {number}": value.clone()
        for number, entries in enumerate(optimizer.state.values())
        for name, value in entries.items()
    }
    return {**copy.deepcopy(model.state_dict()), **state}


def assert_same(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(actual[name], value), name


SIZES = (4, 2, 4, 2, 4)


@pytest.mark.parametrize("make_optimizer", [make_adamw, make_sgd])
@pytest.mark.parametrize("dtype", [None, torch.bfloat16], ids=str)
def test_it_is_the_loop_that_one_writes(
    dtype: torch.dtype | None, make_optimizer: Callable[[nn.Module], Optimizer], either_way: None
) -> None:
    """Bit for bit: over steps of two shapes, with drop path, under autocast and without."""
    model = make_model(torch.float32, drop_path_rate=0.5)
    twin = copy.deepcopy(model)
    optimizer = make_optimizer(twin)
    torch.manual_seed(1)
    expected = []
    for seed, size in enumerate(SIZES):
        images, labels = make_batch(size, seed)
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype or torch.bfloat16, enabled=dtype is not None):
            loss = F.cross_entropy(twin(images), labels)
        loss.backward()
        optimizer.step()
        expected.append(loss.item())

    graphed = make_optimizer(model)
    step = graphed_step(
        *(model, F.cross_entropy, graphed, make_batch(SIZES[0], 9)), autocast_dtype=dtype
    )
    torch.manual_seed(1)
    losses = [step(*make_batch(size, seed)) for seed, size in enumerate(SIZES)]
    assert [loss.item() for loss in losses] == expected
    assert_same(tensors(model, graphed), tensors(twin, optimizer))
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("steps", [0, 1], ids="after {} steps".format)
def test_capturing_changes_nothing(steps: int, captured: None) -> None:
    """Nor does it where it fails."""
    model = make_model(torch.float32)
    optimizer = make_adamw(model)
    step = graphed_step(model, F.cross_entropy, optimizer, make_batch(2, 0))
    for seed in range(steps):
        step(*make_batch(2, seed))
    before, random = tensors(model, optimizer), torch.get_rng_state()
    graphed_step(model, F.cross_entropy, optimizer, make_batch(4, 3))
    assert_same(tensors(model, optimizer), before)
    assert torch.equal(torch.get_rng_state(), random)

    def failing(outputs: Tensor, labels: Tensor) -> Tensor:
        if calls:
            raise RuntimeError("no more")
        calls.append(outputs)
        return F.cross_entropy(outputs, labels)

    calls: list[Tensor] = []
    with pytest.raises(RuntimeError, match="no more"):
        graphed_step(model, failing, optimizer, make_batch(4, 3))
    assert_same(tensors(model, optimizer), before)
    assert torch.equal(torch.get_rng_state(), random)


def test_every_kind_of_input_is_captured_once(captured: None) -> None:
    model, shapes = make_model(torch.float32), []

    def loss(outputs: Tensor, labels: Tensor) -> Tensor:
        shapes.append(len(outputs))
        return F.cross_entropy(outputs, labels)

    step = graphed_step(model, loss, make_adamw(model), make_batch(2, 0))
    to_capture = graph_recorder.WARM_UP + 1
    assert shapes == [2] * to_capture
    step(*make_batch(3, 0))
    assert shapes[to_capture:] == [3] * (to_capture + 1)
    for size in (2, 3, 2):
        step(*make_batch(size, 1))
    assert shapes[2 * to_capture + 1 :] == [2, 3, 2]
    model.eval()
    step(*make_batch(2, 1))  # the same inputs, another mode
    assert len(shapes) == 3 * to_capture + 5


def test_a_scheduler_changes_a_learning_rate_that_is_a_tensor(either_way: None) -> None:
    model = make_model(torch.float32)
    optimizer = make_adamw(model, torch.tensor(0.01))
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=1, gamma=0.0)
    step = graphed_step(model, F.cross_entropy, optimizer, make_batch(2, 0))
    head = model.logits_head.weight
    before = head.detach().clone()
    step(*make_batch(2, 0))
    scheduler.step()
    trained = head.detach().clone()
    step(*make_batch(2, 0))
    assert torch.equal(head, trained) and not torch.equal(head, before)


def test_clipping_goes_into_a_hook(either_way: None) -> None:
    model = make_model(torch.float32)
    optimizer = SGD(model.parameters(), lr=1.0)
    optimizer.register_step_pre_hook(
        lambda *_: nn.utils.clip_grad_norm_(model.parameters(), 1e-3) and None
    )
    before = nn.utils.parameters_to_vector(model.parameters()).detach()
    step = graphed_step(model, F.cross_entropy, optimizer, make_batch(2, 0))
    step(*make_batch(2, 0))
    moved = nn.utils.parameters_to_vector(model.parameters()).detach() - before
    assert float(moved.norm()) == pytest.approx(1e-3, rel=1e-2)


def test_a_scaler_skips_a_step_whose_gradients_overflow(either_way: None) -> None:
    model = make_model(torch.float32)
    optimizer = make_adamw(model)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**100, backoff_factor=2.0**-100)
    step = graphed_step(
        model,
        lambda outputs, labels: 2.0**50 * F.cross_entropy(outputs, labels),
        *(optimizer, make_batch(2, 0)),
        scaler=scaler,
    )
    assert scaler.get_scale() == 2.0**100
    head = model.logits_head.weight
    before = head.detach().clone()
    step(*make_batch(2, 0))
    assert scaler.get_scale() == 1.0
    assert torch.equal(head, before)
    step(*make_batch(2, 0))
    assert not torch.equal(head, before)


class CountsOnTheHost(AdamW):
    def step(self, closure: None = None) -> None:
        super().step(closure)
        for state in self.state.values():
            state["steps"] = state.get("steps", 0) + 1


class TestRefused:
    """What a graph cannot do is named, and how it can be done."""

    @pytest.mark.parametrize(
        ("make_optimizer", "message"),
        [
            (AdamW, r"AdamW\(\.\.\., fused=True, capturable=True\)"),
            (
                lambda parameters: NAdam(parameters, capturable=True),
                "must have taken a step: what the state of NAdam is before the first",
            ),
            (
                lambda parameters: SGD(parameters, lr=0.1, momentum=0.9, dampening=0.5),
                "must have taken a step: what the state of SGD",
            ),
        ],
    )
    def test_optimizers(
        self, make_optimizer: Callable[..., Optimizer], message: str, captured: None
    ) -> None:
        model = make_model(torch.float32)
        optimizer = make_optimizer(model.parameters())
        with pytest.raises(ValueError, match=message):
            graphed_step(model, F.cross_entropy, optimizer, make_batch(2, 0))

    def test_an_optimizer_that_counts_on_the_host(self, captured: None) -> None:
        model = make_model(torch.float32)
        optimizer = CountsOnTheHost(model.parameters(), fused=True, capturable=True)
        F.cross_entropy(model(make_batch(2, 0)[0]), make_batch(2, 0)[1]).backward()
        optimizer.step()
        with pytest.raises(ValueError, match=r"CountsOnTheHost counts on the host.*\(steps of"):
            graphed_step(model, F.cross_entropy, optimizer, make_batch(2, 0))
        assert all(state["steps"] == 1 for state in optimizer.state.values())

    def test_a_scaler_beside_an_optimizer_that_asks_the_host(self, captured: None) -> None:
        model = make_model(torch.float32)
        scaler = torch.amp.GradScaler("cpu")
        with pytest.raises(ValueError, match=r"with a scaler the optimizer must be SGD\(\.\.\., f"):
            graphed_step(
                *(model, F.cross_entropy, make_sgd(model), make_batch(2, 0)), scaler=scaler
            )

    def test_parameters_on_several_devices(self, captured: None) -> None:
        model = make_model(torch.float32)
        model.logits_head.to("meta")
        with pytest.raises(ValueError, match="must be on one device, got some on cpu, meta"):
            graphed_step(model, F.cross_entropy, make_adamw(model), make_batch(2, 0))

    def test_a_number_that_a_scheduler_changes(self, captured: None) -> None:
        model = make_model(torch.float32)
        optimizer = make_sgd(model)
        step = graphed_step(model, F.cross_entropy, optimizer, make_batch(2, 0))
        optimizer.param_groups[0]["lr"] = 0.005
        with pytest.raises(RuntimeError, match=r"lr of parameter group 0 was 0\.01 when.*0\.005"):
            step(*make_batch(2, 0))

    def test_a_group_of_parameters_that_is_added(self, captured: None) -> None:
        model = make_model(torch.float32)
        optimizer = make_adamw(model.logits_head)
        step = graphed_step(model, F.cross_entropy, optimizer, make_batch(2, 0))
        optimizer.add_param_group({"params": list(model.stem.parameters())})
        with pytest.raises(RuntimeError, match="number of parameter groups was 1 when"):
            step(*make_batch(2, 0))

    def test_a_module_that_replaces_its_buffer(self, captured: None) -> None:
        class Counting(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.register_buffer("steps", torch.zeros(()))

            def forward(self, outputs: Tensor, labels: Tensor) -> Tensor:
                self.steps = self.steps + 1
                return F.cross_entropy(outputs, labels)

        model = make_model(torch.float32)
        with pytest.raises(ValueError, match="a module puts a new tensor in the place of a buffer"):
            graphed_step(model, Counting(), make_adamw(model), make_batch(2, 0))

    def test_a_state_that_is_loaded_afterwards(self, captured: None) -> None:
        model = make_model(torch.float32)
        optimizer = make_adamw(model)
        step = graphed_step(model, F.cross_entropy, optimizer, make_batch(2, 0))
        optimizer.load_state_dict(optimizer.state_dict())
        with pytest.raises(RuntimeError, match=r"state was replaced.*call graphed_step again"):
            step(*make_batch(2, 0))

    def test_parameters_that_move(self, captured: None) -> None:
        model = make_model(torch.float32)
        step = graphed_step(model, F.cross_entropy, make_adamw(model), make_batch(2, 0))
        model.double()
        with pytest.raises(RuntimeError, match=r"moved to other memory.*call graphed_step again"):
            step(*make_batch(2, 0))

    def test_a_step_that_waits_for_the_gpu(
        self, captured: None, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def fail(*arguments: object) -> None:
            raise RuntimeError("called a synchronizing CUDA operation")

        monkeypatch.setattr(StandIn, "rehearse", fail)
        model = make_model(torch.float32)
        with pytest.raises(RuntimeError, match=r"cannot be captured in a CUDA graph.*\.item\(\)"):
            graphed_step(model, F.cross_entropy, make_adamw(model), make_batch(2, 0))
