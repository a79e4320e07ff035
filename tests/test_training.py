"""Training recipes over whole fused models: what users wrap around them changes nothing."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from support.small_model import CLASSES, RESOLUTION, make_model
from support.tolerances import BACKEND_GRADIENT, assert_close
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.checkpoint import checkpoint_sequential

import moat_kernels as mk


def make_batch(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    images = torch.randn(4, 3, RESOLUTION, RESOLUTION, dtype=dtype)
    return images, torch.randint(CLASSES, (4,))


def gradients(model: nn.Module, loss: Callable[[], Tensor]) -> dict[str, Tensor]:
    """Gradients of one backward pass, and the buffers after it."""
    model.zero_grad()
    loss().backward()
    return {
        **{name: parameter.grad for name, parameter in model.named_parameters()},
        **dict(model.named_buffers()),
    }


def check_same(actual: dict, expected: dict, dtype: torch.dtype = torch.float64) -> None:
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        # A bias before a norm that measures the batch has no gradient but for rounding.
        floor = 1.0 if name == "stem.conv_0.bias" else 1e-3
        assert_close(actual[name], value, BACKEND_GRADIENT[dtype], name, floor)


def test_compile_of_a_whole_model_in_training() -> None:
    """One graph without breaks."""
    dtype = torch.float32  # for the native backend, where it is built
    images, labels = make_batch(dtype)
    model = make_model(dtype)
    expected = gradients(model, lambda: F.cross_entropy(model(images), labels))
    again = make_model(dtype)
    torch._dynamo.reset()
    compiled = torch.compile(again, fullgraph=True, backend="aot_eager")
    check_same(gradients(again, lambda: F.cross_entropy(compiled(images), labels)), expected, dtype)


def test_averaged_copies() -> None:
    """An exponential moving average of parameters and buffers, as of stock blocks."""
    averages = []
    for fused in (True, False):
        model = make_model(fused=fused)
        average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9), use_buffers=True)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        torch.manual_seed(1)
        for _ in range(3):
            images, labels = make_batch()
            optimizer.zero_grad()
            F.cross_entropy(model(images), labels).backward()
            optimizer.step()
            average.update_parameters(model)
        averages.append(average.eval())
    ours, stock = averages
    images, _ = make_batch()
    assert_close(ours(images), stock(images), BACKEND_GRADIENT[torch.float64])


def test_checkpointed_stages() -> None:
    images, labels = make_batch()
    model = make_model()
    expected = gradients(model, lambda: F.cross_entropy(model(images), labels))
    again = make_model()

    def loss() -> Tensor:
        blocks = nn.Sequential(*(block for stage in again.stages for block in stage.children()))
        stem = again.stem(images.contiguous(memory_format=torch.channels_last))
        last = checkpoint_sequential(blocks, 2, stem, use_reentrant=False)
        return F.cross_entropy(again.forward_head(last), labels)

    check_same(gradients(again, loss), expected)


def test_float16_with_a_gradient_scaler() -> None:
    """A scaled loss gives the gradients of stock blocks; an overflow skips the step."""
    images, labels = make_batch(torch.float32)
    results = {}
    for fused in (True, False):
        model = make_model(torch.float32, fused=fused)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        with torch.autocast("cpu", torch.float16):
            loss = F.cross_entropy(model(images).float(), labels)
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        results[fused] = {name: p.grad.clone() for name, p in model.named_parameters()}
        before = copy.deepcopy(model.state_dict())
        next(model.parameters()).grad.fill_(float("inf"))
        optimizer.step = lambda *_: pytest.fail("a step with infinite gradients")
        scaler._per_optimizer_states[id(optimizer)]["found_inf_per_device"] = {
            torch.device("cpu"): torch.ones(())
        }
        scaler.step(optimizer)
        assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    for name, value in results[False].items():
        # float16 keeps 11 bits, and some ten layers round. The floor is for gradients that are zero
        # in exact arithmetic: what is left of them depends on PyTorch's convolutions.
        assert_close(results[True][name], value, 5e-2, name, floor=2e-2)


def test_two_runs_are_equal_to_the_bit() -> None:
    """Under torch.use_deterministic_algorithms, which every test here runs with."""
    assert torch.are_deterministic_algorithms_enabled()
    images, labels = make_batch(torch.float32)
    runs = []
    for _ in range(2):
        model = make_model(torch.float32, drop_path_rate=0.3)
        torch.manual_seed(3)
        runs.append(gradients(model, lambda: F.cross_entropy(model(images), labels)))  # noqa: B023
    for name, value in runs[0].items():
        assert torch.equal(runs[1][name], value), name


def per_sample_gradients(block: nn.Module, x: Tensor) -> dict[str, Tensor]:
    parameters = {name: p.detach() for name, p in block.named_parameters()}

    def loss(parameters: dict[str, Tensor], sample: Tensor) -> Tensor:
        return torch.func.functional_call(block, parameters, (sample[None],)).square().mean()

    return torch.func.vmap(torch.func.grad(loss), (None, 0))(parameters, x)


@pytest.mark.parametrize("kind", [mk.FusedMBConv, mk.FusedMOATBlock])
def test_function_transforms_are_refused_or_computed_by_the_reference(kind) -> None:
    block = kind(32, 32).double().eval()
    x = torch.randn(3, 32, 6, 5, dtype=torch.float64)
    with pytest.raises(RuntimeError, match=r"no rules for torch\.func transforms.*'reference'"):
        per_sample_gradients(block, x)
    with torch.no_grad(), pytest.raises(RuntimeError, match=r"no rules for torch\.func"):
        torch.func.vmap(lambda sample: block(sample[None]))(x)
    with mk.use_backend("reference"):
        samples = per_sample_gradients(block, x)
    expected = gradients(block, lambda: block(x).square().mean())
    for name, value in samples.items():
        assert_close(
            value.mean(0), expected[name], BACKEND_GRADIENT[torch.float64], name, floor=0.1
        )
