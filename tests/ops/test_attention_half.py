"""The native attention half of a MOAT block against its layers in stock PyTorch, in float64."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from support.native import needs_extension
from support.operators import Recorder
from support.tolerances import BACKEND_OUTPUT, LOW_PRECISION_FACTOR, assert_close, relative_error
from torch import Tensor, nn

import moat_kernels as mk
from moat_kernels.ops.attention_half import cpu as attention_half
from moat_kernels.reference import MOATBlock

pytestmark = needs_extension

NATIVE = ["moat_kernels.cpu_attention_half_eval.default"]


def make_block(channels: int = 64, **options) -> mk.FusedMOATBlock:
    """A block whose attention is far from uniform and whose norm is far from the identity."""
    block = mk.FusedMOATBlock(8, channels, **options).eval()
    for parameter in (*block.attention.parameters(), *block.attention_norm.parameters()):
        nn.init.normal_(parameter, std=0.3)
    return block


def stock(block: mk.FusedMOATBlock, y: Tensor) -> Tensor:
    """The reference's layers, in float64."""
    with mk.use_backend("reference"), torch.no_grad():
        return MOATBlock.attention_half(copy.deepcopy(block).double(), y.double())


@torch.no_grad()
def run_native(block: mk.FusedMOATBlock, y: Tensor) -> Tensor:
    with Recorder() as recorder:
        output = block.attention_half(y)
    assert [name for name in recorder.names if name.startswith("moat_kernels")] == NATIVE
    return output


def make_map(*size: int) -> Tensor:
    return torch.randn(*size).contiguous(memory_format=torch.channels_last)


@pytest.mark.each_isa
@pytest.mark.parametrize("batch", [1, 2, 8])
@pytest.mark.parametrize("window", [None, 4, (3, 5), 20])
@pytest.mark.parametrize("size", [(1, 1), (7, 7), (12, 8), (13, 10)])
def test_windows(size: tuple[int, int], window, batch: int) -> None:
    block = make_block(window_size=window, position_size=7)
    y = make_map(batch, 64, *size)
    assert_close(run_native(block, y), stock(block, y), BACKEND_OUTPUT[torch.float32])


@pytest.mark.each_isa
@pytest.mark.parametrize("position_size", [None, 9, 14])
@pytest.mark.parametrize("head_dim", [8, 20, 32, 48])
@pytest.mark.parametrize("channels", [49, 80, 400])
def test_widths(channels: int, head_dim: int, position_size: int | None) -> None:
    block = make_block(channels, head_dim=head_dim, position_size=position_size)
    y = make_map(2, channels, 9, 9)
    assert_close(run_native(block, y), stock(block, y), BACKEND_OUTPUT[torch.float32])


@pytest.mark.each_isa
def test_long_windows() -> None:
    block = make_block(32)
    y = make_map(1, 32, 40, 41)
    assert_close(run_native(block, y), stock(block, y), BACKEND_OUTPUT[torch.float32])


@pytest.mark.each_isa
def test_memory_formats_views_and_empty_batches() -> None:
    block = make_block(window_size=5)
    y = torch.randn(2, 64, 9, 11)
    output = run_native(block, y)
    assert output.is_contiguous()
    assert_close(output, stock(block, y), BACKEND_OUTPUT[torch.float32])
    output = run_native(block, y.contiguous(memory_format=torch.channels_last))
    assert output.is_contiguous(memory_format=torch.channels_last)
    assert_close(output, stock(block, y), BACKEND_OUTPUT[torch.float32])
    view = torch.randn(2, 9, 128, 22)[:, :, ::2, ::2].transpose(1, 2)
    assert_close(run_native(block, view), stock(block, view), BACKEND_OUTPUT[torch.float32])
    assert run_native(block, torch.randn(0, 64, 9, 11)).shape == (0, 64, 9, 11)


@pytest.mark.each_isa
def test_layers_without_biases_or_affine_norm() -> None:
    block = make_block()
    block.attention.qkv.bias = block.attention.proj.bias = None
    block.attention_norm = nn.LayerNorm(64, elementwise_affine=False)
    y = make_map(2, 64, 8, 8)
    assert_close(run_native(block, y), stock(block, y), BACKEND_OUTPUT[torch.float32])


@pytest.mark.each_isa
@pytest.mark.parametrize("batch", [1, 3, 8])
@pytest.mark.parametrize("window", [None, 4, 7])
def test_bits_for_any_number_of_threads(window: int | None, batch: int) -> None:
    block, y = make_block(160, window_size=window), make_map(batch, 160, 14, 13)
    expected = run_native(block, y)
    for threads in (2, 3, 5, 16):
        torch.set_num_threads(threads)
        try:
            assert torch.equal(run_native(block, y), expected), f"{threads} threads"
        finally:
            torch.set_num_threads(1)


@pytest.mark.each_isa
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_not_finite_values_stay_in_their_window(value: float) -> None:
    block, y = make_block(window_size=4), make_map(2, 64, 10, 10)
    y[1, 5, 9, 0] = value
    output, expected = run_native(block, y), stock(block, y)
    assert torch.equal(output.isfinite(), expected.isfinite())
    assert output[0].isfinite().all()


@pytest.mark.each_isa
def test_large_means_do_not_cancel() -> None:
    """The variance of a token is measured around its mean."""
    block, y = make_block(), make_map(2, 64, 6, 6) + 1000
    # The inputs have 6e-8 of 1000 as their own rounding, and a deviation of 1.
    assert_close(run_native(block, y), stock(block, y), 1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention_half, "DTYPES", (dtype,))  # also where layers are faster
    block = make_block(80, window_size=5).to(dtype)
    y = make_map(2, 80, 9, 9).to(dtype)
    expected = stock(block, y)
    output = run_native(block, y)
    assert output.dtype == dtype
    with torch.no_grad():
        unfused = relative_error(MOATBlock.attention_half(block, y), expected)
    assert relative_error(output, expected) <= LOW_PRECISION_FACTOR * unfused


def test_weights_are_read_at_every_call() -> None:
    block, y = make_block(), make_map(1, 64, 6, 6)
    run_native(block, y)
    block.attention.qkv.weight.data.mul_(2)  # invisible to version counters
    block.attention.relative_position_embedding.data.add_(1)
    block.attention_norm.bias.data.add_(1)
    assert_close(run_native(block, y), stock(block, y), BACKEND_OUTPUT[torch.float32])


def test_what_is_not_covered_runs_as_layers() -> None:
    block, y = make_block(), make_map(2, 64, 6, 6)
    expected = stock(block, y)
    assert block.attention_half(y).requires_grad
    assert_close(block.attention_half(y), expected, BACKEND_OUTPUT[torch.float32])
    with torch.no_grad(), mk.use_backend("torch"), Recorder() as recorder:
        assert_close(block.attention_half(y), expected, BACKEND_OUTPUT[torch.float32])
    assert NATIVE[0] not in recorder.names
    with torch.no_grad():
        wide = block.double().attention_half(y.double())
    assert_close(wide, expected, BACKEND_OUTPUT[torch.float64])


def test_training_drops_paths() -> None:
    block, y = make_block(drop_path=0.5), make_map(16, 64, 6, 6)
    with torch.no_grad():
        dropped = (block.train().attention_half(y) == y).flatten(1).all(1)
    assert dropped.any() and not dropped.all()


@pytest.mark.parametrize("name", ["attention_norm", "attention", "attention.qkv", "attention.proj"])
def test_hooked_layers_run_as_themselves(name: str) -> None:
    block, y = make_block(), make_map(1, 64, 6, 6)
    seen: list[torch.Size] = []
    block.get_submodule(name).register_forward_hook(lambda module, x, out: seen.append(out.shape))
    with torch.no_grad():
        assert_close(block.attention_half(y), stock(block, y), BACKEND_OUTPUT[torch.float32])
    assert seen


def test_replaced_layers_run_as_themselves() -> None:
    block, y = make_block(), make_map(1, 64, 6, 6)

    class Doubled(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    block.attention.proj = Doubled(64, 64)
    with torch.no_grad():
        assert_close(block.attention_half(y), stock(block, y), BACKEND_OUTPUT[torch.float32])


def test_parametrized_layers_are_read_through() -> None:
    block, y = make_block(), make_map(1, 64, 6, 6)
    nn.utils.parametrizations.weight_norm(block.attention.qkv)
    assert_close(run_native(block, y), stock(block, y), BACKEND_OUTPUT[torch.float32])


def test_compiles_without_graph_breaks() -> None:
    block, y = make_block(window_size=4), make_map(1, 64, 6, 6)
    torch._dynamo.reset()
    compiled = torch.compile(block.attention_half, fullgraph=True, backend="aot_eager")
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("error", mk.FallbackWarning)
        assert_close(compiled(y), stock(block, y), BACKEND_OUTPUT[torch.float32])


def test_the_op_names_what_it_cannot_read() -> None:
    op = torch.ops.moat_kernels.cpu_attention_half_eval
    block, y = make_block(), make_map(1, 64, 6, 6)
    weights = [block.attention.qkv.weight, None, block.attention.proj.weight, None, None]
    with torch.no_grad():
        with pytest.raises(RuntimeError, match="y must have 64 channels, got 32"):
            op(y[:, :32], None, None, *weights, 2, 32, 6, 6, 1.0, 1e-5)
        with pytest.raises(RuntimeError, match="y must be float32, bfloat16 or float16"):
            op(y.double(), None, None, *weights, 2, 32, 6, 6, 1.0, 1e-5)
        with pytest.raises(RuntimeError, match=r"heads and head_dim must be positive .*, got 0"):
            op(y, None, None, *weights, 0, 32, 6, 6, 1.0, 1e-5)
        with pytest.raises(RuntimeError, match=r"window_width must be positive .*, got 0 and 6"):
            op(y, None, None, *weights, 2, 32, 0, 6, 1.0, 1e-5)
        with pytest.raises(RuntimeError, match=r"qkv_weight must be \[576, 64\], got"):
            op(y, None, None, *weights, 6, 32, 6, 6, 1.0, 1e-5)
