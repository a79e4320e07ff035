"""Models by `graphed_model` in loops that one writes: on a CPU as they are, and with a stand-in.

The stand-in needs no GPU (support/stand_in_graphs.py); tests/gpu/test_graphed_model_gpu.py has
graphs.
"""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support.small_model import CLASSES, RESOLUTION, make_model
from support.stand_in_graphs import StandIn
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

import moat_kernels as mk
from moat_kernels import graphed_model
from moat_kernels.graphed_model import MOST_GRAPHS, GraphedModule


def make_batch(size: int, seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(size, 3, RESOLUTION, RESOLUTION, generator=generator)
    return images, torch.randint(CLASSES, (size,), generator=generator)


def train(model: nn.Module, dtype: torch.dtype | None) -> Iterator[dict[str, Tensor]]:
    """Some steps of two batches each, clipped, with validation between; what there is after each.

    The last batch is smaller.
    """
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=1, gamma=0.5)
    torch.manual_seed(1)
    for number, sizes in enumerate([(4, 4), (4, 4), (4, 2)]):
        optimizer.zero_grad()
        for part, size in enumerate(sizes):
            images, labels = make_batch(size, 10 * number + part)
            with torch.autocast("cpu", dtype or torch.bfloat16, enabled=dtype is not None):
                loss = F.cross_entropy(model(images), labels)
            loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        model.eval()
        with torch.no_grad():
            predicted = model(make_batch(3, 99)[0])
        model.train()
        gradients = {
            f"gradient of {name}": parameter.grad.clone()
            for name, parameter in model.named_parameters()
        }
        results = {"loss": loss.detach(), "predicted": predicted}
        yield {**copy.deepcopy(model.state_dict()), **gradients, **results}


@pytest.mark.usefixtures("either_way")
@pytest.mark.parametrize("dtype", [None, torch.bfloat16], ids=str)
def test_a_loop_does_not_notice(dtype: torch.dtype | None) -> None:
    """Bit for bit, with drop path."""
    model = make_model(torch.float32, drop_path_rate=0.5)
    twin = copy.deepcopy(model)
    assert graphed_model(model) is model
    states, expected_states = list(train(model, dtype)), list(train(twin, dtype))
    for actual, expected in zip(states, expected_states, strict=True):
        assert actual.keys() == expected.keys()
        for name, value in expected.items():
            assert torch.equal(actual[name], value), name


@pytest.mark.usefixtures("captured")
def test_capturing_changes_nothing() -> None:
    model = graphed_model(make_model(torch.float32, drop_path_rate=0.5))
    images, _ = make_batch(2, 0)
    torch.manual_seed(3)
    first = model(images)
    after = torch.get_rng_state()
    assert StandIn.captures == 2

    twin = make_model(torch.float32, drop_path_rate=0.5)
    torch.manual_seed(3)
    assert torch.equal(first, twin(images))
    assert torch.equal(after, torch.get_rng_state())
    for name, value in twin.state_dict().items():
        assert torch.equal(model.state_dict()[name], value), name
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.usefixtures("captured")
def test_each_kind_of_call_is_captured_once() -> None:
    model = graphed_model(make_model(torch.float32))
    images, _ = make_batch(2, 0)

    def captures_of(*calls: Callable[[], Any]) -> int:
        before = StandIn.captures
        for call in (*calls, *calls):
            call()
        return StandIn.captures - before

    assert captures_of(lambda: model(images)) == 2
    assert captures_of(lambda: model(images[:1]), lambda: model(images)) == 2
    assert captures_of(torch.no_grad()(lambda: model(images))) == 1
    assert captures_of(torch.inference_mode()(lambda: model(images))) == 1
    assert captures_of(lambda: model(images.to(memory_format=torch.channels_last))) == 2
    assert captures_of(torch.autocast("cpu", torch.bfloat16)(lambda: model(images))) == 2
    model.stem.norm_0.eval()  # one module alone
    assert captures_of(lambda: model(images)) == 2


class Branches(nn.Module):
    """Takes and returns more than a tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.used, self.unused = nn.Linear(3, 2), nn.Linear(3, 2)

    def forward(self, pair: tuple[Tensor, Tensor], factor: float, *, shift: Tensor) -> Any:
        first, second = pair
        outputs = self.used(first) * factor + shift
        return {"sum": outputs + second, "largest": outputs.argmax(-1), "factor": factor}


@pytest.mark.usefixtures("either_way")
def test_nested_arguments_results_and_gradients_of_inputs() -> None:
    model, twin = Branches(), Branches()
    twin.load_state_dict(model.state_dict())
    graphed_model(model)
    for factor in (2.0, 3.0, 2.0):
        gradients = []
        for called in (model, twin):
            torch.manual_seed(7)
            first, second, shift = torch.randn(4, 3), torch.randn(4, 2), torch.randn(2)
            first.requires_grad_()
            called.zero_grad()
            result = called((first, second), factor, shift=shift)
            assert result["factor"] == factor and not result["largest"].requires_grad
            result["sum"].square().sum().backward()
            gradients.append([result["sum"], first.grad, *(p.grad for p in called.parameters())])
        for actual, expected in zip(*gradients, strict=True):
            assert actual is None if expected is None else torch.equal(actual, expected)


@pytest.mark.usefixtures("either_way")
def test_results_and_gradients_stay_when_the_model_is_called_again() -> None:
    model = graphed_model(nn.Sequential(nn.Linear(3, 2), nn.GELU()))
    outputs = model(torch.ones(4, 3))
    outputs.sum().backward()
    kept = [outputs.detach(), *(parameter.grad for parameter in model.parameters())]
    before = [tensor.clone() for tensor in kept]
    for parameter in model.parameters():
        parameter.grad = None
    model(torch.zeros(4, 3)).sum().backward()
    assert all(map(torch.equal, kept, before))


@pytest.mark.usefixtures("either_way")
def test_what_requires_no_gradient_gets_none() -> None:
    model = graphed_model(make_model(torch.float32))
    images, labels = make_batch(2, 0)
    F.cross_entropy(model(images), labels).backward()
    model.zero_grad()
    model.stem.requires_grad_(False)
    F.cross_entropy(model(images), labels).backward()
    assert all(parameter.grad is None for parameter in model.stem.parameters())
    assert model.logits_head.weight.grad is not None


@pytest.mark.usefixtures("either_way")
def test_weights_that_change_in_place_or_move_are_used() -> None:
    model, other = (make_model(torch.float32).eval() for _ in range(2))
    graphed_model(model)
    images, _ = make_batch(2, 0)
    model(images)
    for assign in (False, True):
        with torch.no_grad():
            for parameter in other.parameters():
                parameter.mul_(1.25)
        model.load_state_dict(copy.deepcopy(other.state_dict()), assign=assign)
        assert torch.equal(model(images), other(images))


@pytest.mark.usefixtures("captured")
class TestBackwardPasses:
    def test_one_that_comes_too_late_is_refused(self) -> None:
        model = graphed_model(nn.Linear(3, 2))
        first, second = model(torch.ones(4, 3)), model(torch.ones(2, 3))
        with pytest.raises(RuntimeError, match="the model was called again since"):
            first.sum().backward()
        second.sum().backward()

    def test_a_second_one_is_refused(self) -> None:
        loss = graphed_model(nn.Linear(3, 2))(torch.ones(4, 3)).sum()
        loss.backward(retain_graph=True)
        with pytest.raises(RuntimeError, match="or has been through it already"):
            loss.backward()

    def test_calls_without_gradients_may_come_between(self) -> None:
        model = graphed_model(nn.Linear(3, 2))
        loss = model(torch.ones(4, 3)).sum()
        with torch.no_grad():
            model(torch.ones(4, 3))
        loss.backward()
        assert torch.equal(model.weight.grad, torch.full((2, 3), 4.0))


@pytest.mark.usefixtures("captured")
class TestWhatRunsAsItIs:
    def test_hooks_inside_run(self) -> None:
        model, images, seen = make_model(torch.float32), make_batch(2, 0)[0], []
        graphed_model(model)(images)
        hook = model.stem.register_forward_hook(lambda *_: seen.append(1))
        with pytest.warns(mk.FallbackWarning, match="MOAT: a FusedStem inside has hooks; running"):
            model(images)
        assert seen == [1]
        hook.remove()
        before = StandIn.captures
        model(images)
        assert StandIn.captures == before  # the graphs of the first call

    def test_hooks_of_the_model_run_around_the_graph(self) -> None:
        model, seen = graphed_model(nn.Linear(3, 2)), []
        model.register_forward_hook(lambda *_: seen.append("forward"))
        model.weight.register_hook(lambda gradient: seen.append("gradient") or gradient / 2)
        for _ in range(2):
            model.zero_grad()
            model(torch.ones(4, 3)).sum().backward()
            assert torch.equal(model.weight.grad, torch.full((2, 3), 2.0))
        assert seen == ["forward", "gradient"] * 2 and StandIn.captures == 2

    def test_checkpointing(self) -> None:
        model, images = graphed_model(make_model(torch.float32)), make_batch(2, 0)[0]
        checkpoint(model, images, use_reentrant=False).sum().backward()
        assert StandIn.captures == 0 and model.logits_head.weight.grad is not None

    def test_torch_compile(self) -> None:
        model = graphed_model(nn.Sequential(nn.Linear(3, 2), nn.GELU()))
        compiled = torch.compile(model, backend="eager", fullgraph=True)
        compiled(torch.ones(4, 3)).sum().backward()
        assert StandIn.captures == 0

    def test_more_kinds_than_are_kept(self) -> None:
        model = graphed_model(nn.Linear(3, 2))
        with torch.no_grad():
            for size in range(1, MOST_GRAPHS + 1):
                model(torch.ones(size, 3))
            with pytest.warns(mk.FallbackWarning, match=f"it was captured {MOST_GRAPHS} times"):
                assert model(torch.ones(99, 3)).shape == (99, 2)
        assert StandIn.captures == MOST_GRAPHS

    def test_arguments_without_a_hash(self) -> None:
        class Sets(nn.Linear):
            def forward(self, x: Tensor, names: set[str]) -> Tensor:
                return super().forward(x) * len(names)

        model = graphed_model(Sets(3, 2))
        with pytest.warns(mk.FallbackWarning, match="Sets: an argument of its call has no hash"):
            model(torch.ones(4, 3), {"a", "b"})

    def test_replicas_of_data_parallel(self) -> None:
        replica = graphed_model(nn.Linear(3, 2))._replicate_for_data_parallel()
        replica.weight, replica.bias = torch.ones(2, 3), None
        with pytest.warns(mk.FallbackWarning, match="one of DataParallel's replicas"):
            replica(torch.ones(4, 3))

    def test_tensors_of_other_classes(self) -> None:
        class Other(Tensor):
            pass

        model = graphed_model(nn.Linear(3, 2))
        model.register_buffer("other", torch.ones(2).as_subclass(Other))
        with pytest.warns(mk.FallbackWarning, match="Linear: a Other among its tensors"):
            model(torch.ones(4, 3))


class TestTheModelItself:
    @pytest.mark.usefixtures("either_way")
    def test_copies_and_pickles_are_plain(self) -> None:
        model = make_model(torch.float32)
        state, images = model.state_dict(), make_batch(2, 0)[0]
        graphed_model(graphed_model(model))
        assert type(model).__name__ == "GraphedMOAT" and isinstance(model, mk.MOAT)
        assert model.state_dict().keys() == state.keys()
        model.eval()
        for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert type(twin) is mk.MOAT
            assert torch.equal(twin(images), model(images))

    @pytest.mark.usefixtures("captured")
    def test_it_is_frozen_and_fused_as_before(self) -> None:
        model, images = make_model(torch.float32).eval(), make_batch(2, 0)[0]
        expected = mk.freeze(model)(images)
        assert torch.equal(mk.freeze(graphed_model(model))(images), expected)
        assert len(mk.fuse(model).fused) == 6 and isinstance(model, GraphedModule)

    def test_torchscript_is_refused(self) -> None:
        with pytest.raises(RuntimeError, match="GraphedLinear does not become TorchScript"):
            torch.jit.script(graphed_model(nn.Linear(3, 2)))

    def test_what_is_no_model_is_refused(self) -> None:
        with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module, got int"):
            graphed_model(3)  # type: ignore[type-var]
        with pytest.raises(ValueError, match="this OptimizedModule has one of its own"):
            graphed_model(torch.compile(nn.Linear(3, 2), backend="eager"))
        wrapped = DistributedDataParallel.__new__(DistributedDataParallel)
        with pytest.raises(ValueError, match=r"DistributedDataParallel\(graphed_model\(model\)\)"):
            graphed_model(wrapped)


@pytest.mark.usefixtures("captured")
class TestWhatCannotBeCaptured:
    def test_one_graph_within_another(self) -> None:
        model = nn.Sequential(graphed_model(nn.Linear(3, 2)))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        with pytest.raises(ValueError, match="model must not be graphed: its 0 was given to"):
            mk.graphed_step(model, F.mse_loss, optimizer, (torch.ones(4, 3), torch.ones(4, 2)))
        with pytest.raises(ValueError, match="model must not be graphed: it was given to"):
            mk.graphed_inference(model[0].eval(), torch.ones(4, 3))

    def test_results_that_are_no_tensors(self) -> None:
        class Objects(nn.Linear):
            def forward(self, x: Tensor) -> object:
                return [super().forward(x), object()]

        with pytest.raises(ValueError, match=r"must return tensors, .*, and returns a object"):
            graphed_model(Objects(3, 2))(torch.ones(4, 3))

    def test_buffers_that_are_replaced(self) -> None:
        class Counts(nn.Linear):
            def __init__(self) -> None:
                super().__init__(3, 2)
                self.register_buffer("count", torch.zeros(()))

            def forward(self, x: Tensor) -> Tensor:
                self.count = self.count + 1
                return super().forward(x)

        with pytest.raises(ValueError, match="puts a new tensor in the place of a buffer"):
            graphed_model(Counts())(torch.ones(4, 3))

    def test_errors_of_the_model_are_its_own(self) -> None:
        with pytest.raises(RuntimeError, match="mat1 and mat2 shapes"):
            graphed_model(nn.Linear(3, 2))(torch.ones(4, 4))
