"""Training recipes over other people's fused models: what users wrap around changes nothing."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from support.foreign_models import MODELS, RESOLUTION, make_foreign_model
from support.fusing import check_same, run
from support.small_model import CLASSES
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.checkpoint import checkpoint

import moat_kernels as mk
from moat_kernels.adapters.fused import FusedModule

Batch = tuple[Tensor, Tensor]

# Twins and real packages, windows and whole maps, norms with activations and without.
SOME = ["timm coatnet", "vit-pytorch maxvit", "changzy00"]


def make_batch(dtype: torch.dtype = torch.float64) -> Batch:
    images = torch.randn(3, 3, RESOLUTION, RESOLUTION, dtype=dtype)
    return images, torch.randint(CLASSES, (3,))


def both(name: str) -> tuple[nn.Module, nn.Module]:
    """(fused, stock) with the same weights."""
    stock = make_foreign_model(name)
    fused = copy.deepcopy(stock)
    assert len(mk.fuse(fused).fused) == MODELS[name][1]
    return fused, stock


def backward(model: nn.Module, batch: Batch) -> None:
    F.cross_entropy(model(batch[0]), batch[1]).backward()


def gradients_and_buffers(model: nn.Module) -> dict[str, Tensor]:
    gradients = {f"gradient of {name}": p.grad for name, p in model.named_parameters()}
    return {**gradients, **dict(model.named_buffers())}


def check_equal_training(fused: nn.Module, stock: nn.Module, step: Callable) -> None:
    """`step(model)` leaves the same gradients, running statistics and weights in both."""
    for model in (fused, stock):
        torch.manual_seed(3)
        step(model)
    check_same(gradients_and_buffers(fused), gradients_and_buffers(stock))
    check_same(dict(fused.named_parameters()), dict(stock.named_parameters()))


@pytest.mark.parametrize("name", MODELS)
def test_unfusing_between_steps_changes_nothing(name: str) -> None:
    """Fused, stock again, fused again, with one optimiser; eval before and after unfuse."""
    fused, stock = both(name)
    optimizers = {m: torch.optim.SGD(m.parameters(), lr=0.02, momentum=0.9) for m in (fused, stock)}
    batch = make_batch()

    def step(model: nn.Module) -> None:
        optimizers[model].zero_grad()
        backward(model, batch)
        optimizers[model].step()

    for undo in (True, False, True):
        check_equal_training(fused, stock, step)
        check_same(run(fused, batch[0], training=False), run(stock, batch[0], training=False))
        fused.train(), stock.train()
        mk.unfuse(fused) if undo else mk.fuse(fused)


@pytest.mark.parametrize("name", SOME)
def test_gradient_accumulation(name: str) -> None:
    batches = [make_batch() for _ in range(3)]
    check_equal_training(*both(name), lambda model: [backward(model, batch) for batch in batches])


@pytest.mark.parametrize("name", SOME)
def test_averaged_copies(name: str) -> None:
    """The average is a deepcopy of the fused model, and fused too.

    Without its buffers: PyTorch averages integers too, and rounds the stock model's index of the
    bias table, which fused attention does not read.
    """
    averages = []
    for model in both(name):
        average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.02)
        torch.manual_seed(3)
        for _ in range(3):
            optimizer.zero_grad()
            backward(model, make_batch())
            optimizer.step()
            average.update_parameters(model)
        averages.append(average)
    assert sum(isinstance(m, FusedModule) for m in averages[0].modules()) == MODELS[name][1]
    images, _ = make_batch()
    check_same(*(run(average, images, training=False) for average in averages))


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing_counts_a_batch_once(reentrant: bool) -> None:
    """PyTorch's own norms count it twice: forward runs again in the backward pass."""
    model = make_foreign_model("changzy00")
    plain, stock = copy.deepcopy(model.layer1), copy.deepcopy(model.layer1)
    fused = copy.deepcopy(model.layer1)
    assert mk.fuse(fused).fused
    x = torch.randn(2, 16, 12, 12, dtype=torch.float64, requires_grad=True)
    for layer in (fused, stock):
        checkpoint(layer, x, use_reentrant=reentrant).square().mean().backward()
    plain(x).square().mean().backward()
    check_same(gradients_and_buffers(fused), gradients_and_buffers(plain))
    counts = [layer[0].bn1.num_batches_tracked.item() for layer in (fused, plain, stock)]
    assert counts == [1, 1, 2]


@pytest.mark.parametrize("name", SOME)
def test_float16_with_a_gradient_scaler(name: str) -> None:
    """As close to the float64 gradients as stock blocks are under the same autocast."""
    images, labels = make_batch(torch.float32)
    exact = make_foreign_model(name)
    backward(exact, (images.double(), labels))
    errors = []
    for model in both(name):
        model.float()
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        with torch.autocast("cpu", torch.float16):
            loss = F.cross_entropy(model(images).float(), labels)
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        pairs = zip(model.parameters(), exact.parameters(), strict=True)
        difference = sum(float((p.grad - q.grad).square().sum()) for p, q in pairs)
        errors.append(difference**0.5)
    norm = sum(float(p.grad.square().sum()) for p in exact.parameters()) ** 0.5
    assert errors[0] <= 2 * errors[1] + 1e-3 * norm
    assert errors[0] <= 0.05 * norm


@pytest.mark.parametrize("name", SOME)
def test_two_runs_are_equal_to_the_bit(name: str) -> None:
    """Under torch.use_deterministic_algorithms, which every test here runs with."""
    assert torch.are_deterministic_algorithms_enabled()
    images, labels = make_batch(torch.float32)
    runs = []
    for _ in range(2):
        model, _ = both(name)
        backward(model.float(), (images, labels))
        runs.append(gradients_and_buffers(model))
    for key, value in runs[0].items():
        assert torch.equal(runs[1][key], value), key


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU that torch can use")
@pytest.mark.parametrize("name", SOME)
def test_cuda_graphs(name: str) -> None:
    """A captured eval pass replays what an eager one computes."""
    model, _ = both(name)
    model = model.float().cuda().eval()
    images = make_batch(torch.float32)[0].cuda()
    with torch.no_grad():
        expected = model(images)
        graphed = torch.cuda.make_graphed_callables(model, (images,))
        assert torch.allclose(graphed(images), expected, rtol=1e-4, atol=1e-4)
