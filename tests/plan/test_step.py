"""A training step traced on meta tensors."""

from __future__ import annotations

import pytest
import torch

import moat_kernels as mk
from moat_kernels.ops.triton_support.launching import triton_missing
from moat_kernels.plan import BLOCKS, TrainingStep

MODEL, RESOLUTION, BATCH = "tiny_moat_0", 64, 16
needs_triton = pytest.mark.skipif(bool(triton_missing()), reason=triton_missing())


@needs_triton
def test_less_is_kept_by_fused_blocks_and_by_each_level() -> None:
    steps = [TrainingStep(MODEL, RESOLUTION, blocks).trace(BATCH) for blocks in BLOCKS]
    assert len({step.state for step in steps}) == 1
    saved = [step.saved for step in steps]
    assert saved == sorted(saved, reverse=True) and saved[1] < 0.5 * saved[0]
    for step in steps:
        assert step.peak > step.state + step.saved


@needs_triton
@pytest.mark.parametrize("blocks", ["stock", "none"])
def test_forward_s_launches_come_first(blocks: str) -> None:
    step = TrainingStep(MODEL, RESOLUTION, blocks).trace(1)
    names = [one.kernel for one in step.passes]
    assert "nll_loss" in names[step.forward - 1]
    assert not any("gradient" in name or "backward" in name for name in names[: step.forward])
    assert "nll_loss_backward" in names[step.forward : step.forward + 3]


def test_state_is_parameters_buffers_and_what_the_optimizer_keeps() -> None:
    model = mk.create_model(MODEL)
    parameters = [p.numel() for p in model.parameters()]
    buffers = [b.nbytes for b in model.buffers()]
    for optimizer, copies in (("sgd", 1), ("sgd-momentum", 2), ("adamw", 3)):
        step = TrainingStep(MODEL, RESOLUTION, "stock", optimizer=optimizer).trace(1)
        sizes = [4 * count for count in parameters] * copies + buffers
        assert step.state == sum(-(-size // 512) * 512 for size in sizes)
        assert step.passes[-1].kernel == "optimizer"
        assert step.passes[-1].bytes == 4 * sum(parameters) * (2 * copies + 1)


@needs_triton
@pytest.mark.parametrize("blocks", ["stock", "none"])
def test_saved_bytes_are_those_of_a_real_step(blocks: str) -> None:
    """Without autocast, against stock on the CPU; and for fused blocks at most as much."""
    step = TrainingStep(MODEL, RESOLUTION, blocks, precision="float32").trace(BATCH)
    model = mk.create_model(MODEL, fused=False).to(memory_format=torch.channels_last)
    images = torch.randn(BATCH, 3, RESOLUTION, RESOLUTION)
    images = images.to(memory_format=torch.channels_last)
    state = [*model.parameters(), *model.buffers()]
    labels = torch.zeros(BATCH, dtype=torch.int64)
    with mk.use_backend("reference"):
        real = mk.memory.saved_bytes(
            lambda: torch.nn.functional.cross_entropy(model(images), labels), state
        )
    if blocks == "stock":
        assert step.saved == pytest.approx(real, rel=0.01)  # each storage rounded up to 512
    else:
        assert step.saved < 0.5 * real


@needs_triton
def test_products_are_in_the_precision_asked_for() -> None:
    def arithmetic(precision: str) -> set[str]:
        step = TrainingStep(MODEL, RESOLUTION, "none", precision=precision).trace(1)
        return {one.arithmetic for one in step.passes if "expand_kernel" in one.kernel}

    assert arithmetic("bfloat16") == {"bfloat16"}
    assert arithmetic("float16") == {"float16"}
    assert arithmetic("float32") == {"tf32x3"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("moat_9", 64, "stock"), "name must be one of moat_0"),
        ((MODEL, 32, "stock"), "resolution must be more than 32 pixels"),
        ((MODEL, 64, "fused"), "blocks must be one of stock, none"),
    ],
)
def test_wrong_arguments_are_named(arguments: tuple, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TrainingStep(*arguments)


def test_fused_blocks_need_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("moat_kernels.plan.step.triton_missing", lambda: "triton is not installed")
    with pytest.raises(RuntimeError, match="cannot be planned: triton is not installed"):
        TrainingStep(MODEL, RESOLUTION, "none")
