"""The native stem against the same layers in stock PyTorch, in float64."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from support.instruction_sets import INSTRUCTION_SETS, run_tests_with
from support.native import needs_extension
from support.operators import Recorder
from support.tolerances import BACKEND_OUTPUT, LOW_PRECISION_FACTOR, assert_close, relative_error
from torch import Tensor, nn

import moat_kernels as mk
from moat_kernels.ops.common import backends
from moat_kernels.stem import FusedStem, Stem

pytestmark = needs_extension


def make_stem(width: int = 16, in_channels: int = 3) -> FusedStem:
    stem = FusedStem(width, in_channels).eval()
    for tensor in (*stem.parameters(), stem.norm_0.running_mean):
        nn.init.normal_(tensor, std=0.3)
    nn.init.uniform_(stem.norm_0.running_var, 0.5, 2.0)
    return stem


def stock(stem: FusedStem, x: Tensor) -> Tensor:
    """The layers one by one, in float64."""
    return Stem.forward(copy.deepcopy(stem).double(), x.double())


@torch.no_grad()
def run_native(stem: FusedStem, x: Tensor) -> Tensor:
    with Recorder() as recorder:
        output = stem(x)
    assert recorder.names == ["moat_kernels.cpu_stem_eval.default"]
    return output


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("size", [(1, 1), (2, 3), (33, 20), (64, 65)])
@pytest.mark.parametrize("width", [1, 5, 8, 40, 64])
def test_common_sizes(width: int, size: tuple[int, int], memory_format) -> None:
    stem = make_stem(width)
    x = torch.randn(2, 3, *size).contiguous(memory_format=memory_format)
    output = run_native(stem, x)
    assert output.is_contiguous(memory_format=torch.channels_last)
    assert_close(output, stock(stem, x), BACKEND_OUTPUT[torch.float32])


@pytest.mark.parametrize("in_channels", [1, 4, 12])
def test_common_numbers_of_input_channels(in_channels: int) -> None:
    stem, x = make_stem(24, in_channels), torch.randn(1, in_channels, 18, 18)
    assert_close(run_native(stem, x), stock(stem, x), BACKEND_OUTPUT[torch.float32])


def test_common_views_empty_batches_and_deep_kernels() -> None:
    stem = make_stem(136)  # a panel of the second kernel does not fit a cache at once
    x = torch.randn(2, 30, 5, 27)[:, ::2, :3].transpose(1, 2)[:, :, ::3].permute(0, 2, 1, 3)
    x = x.transpose(1, 2)
    assert not x.is_contiguous()
    assert_close(run_native(stem, x), stock(stem, x), BACKEND_OUTPUT[torch.float32])
    assert run_native(stem, torch.randn(0, 3, 9, 9)).shape == (0, 136, 5, 5)


def test_common_bits_for_any_number_of_threads() -> None:
    stem, x = make_stem(), torch.randn(3, 3, 50, 47)
    expected = run_native(stem, x)
    for threads in (2, 3, 5):
        torch.set_num_threads(threads)
        try:
            assert torch.equal(run_native(stem, x), expected)
        finally:
            torch.set_num_threads(1)


def test_common_not_finite_values_stay_where_they_are_seen() -> None:
    stem, x = make_stem(), torch.randn(1, 3, 32, 32)
    x[0, 1, 16, 16], x[0, 0, 2, 2] = float("nan"), float("inf")
    output, expected = run_native(stem, x), stock(stem, x)
    assert torch.equal(output.isfinite(), expected.isfinite())


def test_weights_are_read_at_every_call() -> None:
    stem, x = make_stem(), torch.randn(1, 3, 16, 16)
    run_native(stem, x)
    stem.conv_0.weight.data.mul_(2)  # invisible to version counters
    stem.norm_0.running_mean.data.add_(1)
    stem.to(memory_format=torch.channels_last)
    assert_close(run_native(stem, x), stock(stem, x), BACKEND_OUTPUT[torch.float32])


def test_what_is_not_covered_runs_as_stock_layers() -> None:
    stem, x = make_stem(), torch.randn(2, 3, 16, 16)
    expected = stock(stem, x)
    assert stem(x).requires_grad
    assert_close(stem(x), expected, BACKEND_OUTPUT[torch.float32])
    with torch.no_grad(), mk.use_backend("torch"), Recorder() as recorder:
        assert_close(stem(x), expected, BACKEND_OUTPUT[torch.float32])
    assert "aten.convolution.default" in recorder.names
    with torch.no_grad():
        assert_close(stem.double()(x.double()), expected, BACKEND_OUTPUT[torch.float64])
        low = relative_error(stem.bfloat16()(x.bfloat16()), expected)
        unfused = relative_error(Stem.forward(stem, x.bfloat16()), expected)
    assert low <= LOW_PRECISION_FACTOR * unfused


def test_hooked_layers_run_as_themselves() -> None:
    stem, x = make_stem(), torch.randn(1, 3, 16, 16)
    backends._warned.clear()
    seen: list[torch.Size] = []
    stem.norm_0.register_forward_hook(lambda module, inputs, output: seen.append(output.shape))
    with torch.no_grad(), pytest.warns(mk.FallbackWarning, match="norm_0 has hooks"):
        assert_close(stem(x), stock(stem, x), BACKEND_OUTPUT[torch.float32])
    assert seen[0] == (1, 16, 8, 8)


def test_compiles_without_graph_breaks() -> None:
    stem, x = make_stem(), torch.randn(1, 3, 16, 16)
    torch._dynamo.reset()
    compiled = torch.compile(stem, fullgraph=True, backend="aot_eager")
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("error", mk.FallbackWarning)
        assert_close(compiled(x), stock(stem, x), BACKEND_OUTPUT[torch.float32])


def test_the_op_names_what_it_cannot_read() -> None:
    op = torch.ops.moat_kernels.cpu_stem_eval
    stem, x = make_stem(), torch.randn(1, 4, 8, 8)  # the weights are for 3 channels
    norm = [None, None, stem.norm_0.running_mean, stem.norm_0.running_var]
    tensors = [stem.conv_0.weight, None, *norm, stem.conv_1.weight, None]
    with torch.no_grad():
        with pytest.raises(RuntimeError, match="x must have 3 channels, got 4"):
            op(x, *tensors, 1e-3)
        with pytest.raises(RuntimeError, match=r"conv_1_weight must be .*, got \[1, 1, 3, 3\]"):
            op(x, *tensors[:6], torch.ones(1, 1, 3, 3), None, 1e-3)
    with pytest.raises(RuntimeError, match="x must be a float32 map"):
        op(x.double(), *[None] * 8, 1e-3)


@pytest.mark.parametrize("isa", INSTRUCTION_SETS)
def test_each_instruction_set(isa: str) -> None:
    """The kernel as compiled for another instruction set, in a process of its own."""
    run_tests_with(isa, __file__, "common")
