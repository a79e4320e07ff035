"""`mbconv` with CUDA C++ kernels for the depthwise convolution and Triton's for the rest.

Without a GPU both run on the host: Triton's interpreted, the others compiled by g++
(support/cuda_on_cpu).
"""

from __future__ import annotations

import dataclasses

import pytest
import torch
from support import cuda_on_cpu
from support.backend_comparison import check, check_mbconv
from support.mbconv_cases import Case, make_parameters, map_tensors, run
from support.mbconv_passes import training_passes, wide_crossings
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

pytest.importorskip("triton")

from moat_kernels import FallbackWarning, use_backend
from moat_kernels.extension import reason_cuda_unusable
from moat_kernels.functional import MBConvDescription, Pool, SqueezeExcite
from moat_kernels.ops.mbconv.dispatch import resolve_frozen
from moat_kernels.ops.mbconv.triton import backend as triton_backend
from moat_kernels.ops.mbconv.triton import passes as depthwise_passes
from moat_kernels.ops.mbconv.triton.launch_table import Implementation
from moat_kernels.ops.triton_support.choice import choosing
from moat_kernels.ops.triton_support.traffic import Pass, record_passes

# Of 8 channels, which fill 16 bytes.
SHAPE = (2, 8, 9)
STRIDE_1 = Case(MBConvDescription(), 8, 16, 8)
STRIDE_2 = Case(MBConvDescription(stride=2, pool=Pool()), 8, 24, 16, shortcut_conv=True)
GATED = Case(MBConvDescription(squeeze_excite=SqueezeExcite()), 8, 16, 8)
SWITCH = depthwise_passes.ENVIRONMENT_VARIABLE


@pytest.fixture(autouse=True)
def always(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """CUDA C++ wherever it covers a call, and available."""
    if device == "cpu":
        if reason := cuda_on_cpu.reason_unavailable():
            pytest.skip(reason)
        cuda_on_cpu.load()
    elif reason := reason_cuda_unusable():
        pytest.skip(f"the CUDA kernels: {reason}")
    monkeypatch.setenv(SWITCH, "always")


def names(passes: list[Pass]) -> list[str]:
    return [one.kernel for one in passes]


@pytest.mark.parametrize(
    ("recompute", "forward", "backward"), [("none", 4, 9), ("expand", 4, 10), ("block", 4, 12)]
)
def test_how_often_wide_tensors_cross_memory(
    recompute: str, forward: int, backward: int, device: str
) -> None:
    """As by Triton alone, and without BLAS' one; by stock PyTorch 14 and 24."""
    case = Case(MBConvDescription(), 16, 64, 16)
    passes = training_passes(case, torch.bfloat16, recompute, 8, 32, 32, device)
    assert [wide_crossings(each, 64) for each in passes] == [forward, backward]


@pytest.mark.parametrize(("choice", "crossings"), [("never", 4), ("always", 2)])
def test_how_often_wide_tensors_cross_memory_in_evaluation(
    choice: str, crossings: int, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(SWITCH, choice)
    case = Case(MBConvDescription(), 16, 64, 16)
    parameters = map_tensors(make_parameters(case, torch.bfloat16), lambda t: t.to(device))
    description = resolve_frozen(case.description, parameters, training=False)
    with FakeTensorMode() as mode, record_passes() as passes:
        x = torch.empty(8, 16, 32, 32, dtype=torch.bfloat16, device=device)
        fakes = map_tensors(parameters, mode.from_tensor)
        triton_backend.evaluate(x, fakes, description, None, None)
    assert wide_crossings(passes, 64) == crossings


def test_each_pass_is_taken_over(device: str) -> None:
    passes = training_passes(STRIDE_1, torch.bfloat16, "none", *SHAPE, device)
    forward, backward = map(names, passes)
    assert "cuda_depthwise_forward" in forward and "depthwise_kernel" not in forward
    assert "cuda_depthwise_backward" in backward


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("recompute", ["none", "block"])
@pytest.mark.parametrize("case", [STRIDE_1, STRIDE_2], ids=["1", "2"])
def test_training(case: Case, recompute: str, dtype: torch.dtype, device: str) -> None:
    check_mbconv(case, SHAPE, dtype, device, recompute=recompute)


@pytest.mark.parametrize("case", [STRIDE_2, GATED], ids=["2", "se"])
def test_evaluation(case: Case, device: str) -> None:
    """And the gradient of a call that saved nothing."""
    check_mbconv(case, SHAPE, torch.bfloat16, device, training=False, recompute="block")


def test_what_cuda_does_not_cover_is_tritons_and_says_so(device: str) -> None:
    silu = dataclasses.replace(STRIDE_1.description, expand_activation="silu")
    with pytest.warns(FallbackWarning, match="CUDA kernels do not cover activation 'silu'"):
        forward, _ = training_passes(
            *(dataclasses.replace(STRIDE_1, description=silu), torch.bfloat16, "none"),
            *(*SHAPE, device),
        )
    assert "depthwise_kernel" in names(forward)


def test_the_table_and_the_switch_decide(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def kernels() -> list[str]:
        return names(training_passes(STRIDE_1, torch.bfloat16, "none", *SHAPE, device)[0])

    monkeypatch.delenv(SWITCH)
    assert "depthwise_kernel" in kernels()
    cuda = Implementation("cuda")
    with choosing(lambda _, static: cuda if isinstance(static, Implementation) else static):
        assert "cuda_depthwise_forward" in kernels()
        monkeypatch.setenv(SWITCH, "never")
        assert "depthwise_kernel" in kernels()
    monkeypatch.setenv(SWITCH, "sometimes")
    with pytest.raises(ValueError, match="MOAT_KERNELS_CUDA_KERNELS must be one of table, always"):
        kernels()


def test_autocast_of_float32_maps(device: str) -> None:
    parameters = map_tensors(make_parameters(STRIDE_1), lambda tensor: tensor.to(device).float())
    x = torch.randn(2, 8, 8, 9).to(device) + 20

    def step(backend: str, autocast: bool) -> dict[str, Tensor]:
        dtype = torch.float32 if autocast else torch.float64
        with use_backend(backend), torch.autocast(device, torch.bfloat16, autocast):
            description = STRIDE_1.description
            return run(x, parameters, description, dtype, training=True, recompute="expand")

    exact, stock = step("reference", autocast=False), step("reference", autocast=True)
    check(step("triton", autocast=True), stock, exact, torch.bfloat16)
