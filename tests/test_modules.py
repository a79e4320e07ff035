"""Fused blocks are drop-in: names, state, modes, hooks, copies, autocast, compile, recompute."""

from __future__ import annotations

import copy
import io
import pickle
import warnings

import pytest
import torch
from support.tolerances import BACKEND_GRADIENT, BACKEND_OUTPUT, assert_close
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import moat_kernels as mk
from moat_kernels.ops.common import backends
from moat_kernels.reference import MBConvBlock, MOATBlock

PAIRS = {
    "MBConv": (MBConvBlock, mk.FusedMBConv, {"in_channels": 8, "out_channels": 8}),
    "MBConv, stride 2": (
        MBConvBlock,
        mk.FusedMBConv,
        {"in_channels": 8, "out_channels": 16, "stride": 2, "pool_size": 3},
    ),
    "MOAT": (
        MOATBlock,
        mk.FusedMOATBlock,
        {"in_channels": 32, "out_channels": 32, "window_size": 4, "position_size": 7},
    ),
}


def make_pair(name: str, **options) -> tuple[MBConvBlock, MBConvBlock, Tensor]:
    """(reference block, fused block with the same weights, an input), in float64."""
    reference_class, fused_class, arguments = PAIRS[name]
    torch.manual_seed(0)
    reference = reference_class(**arguments, **options).double()
    for norm in (reference.pre_norm, reference.expand_norm, reference.depthwise_norm):
        nn.init.normal_(norm.weight, 1.0, 0.2)
        nn.init.normal_(norm.bias)
    for parameter in reference.parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=0.2)
    fused = fused_class(**arguments, **options).double()
    fused.load_state_dict(reference.state_dict())
    x = torch.randn(4, arguments["in_channels"], 9, 10, dtype=torch.float64)
    return reference, fused, x


def train_step(block: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """Output, gradients and buffers after one forward and backward."""
    x = x.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    block.zero_grad()
    torch.manual_seed(7)  # drop path draws
    output = block(x)
    output.square().mean().backward()
    gradients = {f"{name}.grad": p.grad for name, p in block.named_parameters()}
    return {"output": output, "x.grad": x.grad, **gradients, **dict(block.named_buffers())}


def check_same(
    actual: dict[str, Tensor], expected: dict[str, Tensor], dtype: torch.dtype = torch.float64
) -> None:
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        tolerance = BACKEND_GRADIENT if name.endswith("grad") else BACKEND_OUTPUT
        assert_close(actual[name], value, tolerance[dtype], name, floor=1e-3)


@pytest.mark.parametrize("name", PAIRS)
def test_same_names_and_state_dict(name: str) -> None:
    reference, fused, _ = make_pair(name)
    assert isinstance(fused, type(reference))
    assert list(reference.state_dict()) == list(fused.state_dict())
    reference.load_state_dict(fused.state_dict())


@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
@pytest.mark.parametrize("recompute", ["auto", "none", "expand", "block"])
@pytest.mark.parametrize("name", PAIRS)
def test_same_numbers(name: str, recompute: str, training: bool) -> None:
    reference, fused, x = make_pair(name, drop_path=0.4)
    fused.recompute = recompute
    expected = train_step(reference.train(training), x)
    check_same(train_step(fused.train(training), x), expected)


@pytest.mark.parametrize("name", PAIRS)
def test_memory_format_is_kept(name: str) -> None:
    _, fused, x = make_pair(name)
    assert fused(x).is_contiguous()
    channels_last = fused(x.to(memory_format=torch.channels_last))
    assert channels_last.is_contiguous(memory_format=torch.channels_last)


def edit_with_optimizer(block: nn.Module, x: Tensor) -> None:
    block(x).sum().backward()
    torch.optim.SGD(block.parameters(), lr=0.1).step()


def edit_by_loading(block: nn.Module, x: Tensor) -> None:
    state = {name: value + 0.1 for name, value in block.state_dict().items()}
    block.load_state_dict(state)


def edit_in_place(block: nn.Module, x: Tensor) -> None:
    with torch.no_grad():
        block.expand_norm.running_var.mul_(2)
        block.expand_conv.weight.add_(0.1)


def edit_data(block: nn.Module, x: Tensor) -> None:
    block.depthwise_conv.weight.data.mul_(2)  # invisible to version counters
    block.pre_norm.running_mean.data.add_(1)


def edit_by_moving(block: nn.Module, x: Tensor) -> None:
    block.float().double()


@pytest.mark.parametrize(
    "edit", [edit_with_optimizer, edit_by_loading, edit_in_place, edit_data, edit_by_moving]
)
@pytest.mark.parametrize("name", ["MBConv", "MOAT"])
def test_eval_never_serves_stale_weights(name: str, edit) -> None:
    reference, fused, x = make_pair(name)
    reference.eval(), fused.eval()
    with torch.no_grad():
        fused(x)
    for block in (reference, fused):
        edit(block, x)
    with torch.no_grad():
        assert_close(fused(x), reference(x), BACKEND_OUTPUT[torch.float64])


@pytest.mark.parametrize("frozen", ["pre_norm", "expand_norm", "depthwise_norm"])
def test_a_norm_put_in_eval_mode_alone(frozen: str) -> None:
    reference, fused, x = make_pair("MBConv")
    for block in (reference, fused):
        getattr(block, frozen).eval()
    check_same(train_step(fused, x), train_step(reference, x))


@pytest.mark.parametrize("name", PAIRS)
def test_deepcopy_and_pickle(name: str) -> None:
    _, fused, x = make_pair(name)
    expected = fused.eval()(x)
    assert torch.equal(copy.deepcopy(fused)(x), expected)
    assert torch.equal(pickle.loads(pickle.dumps(fused))(x), expected)
    file = io.BytesIO()
    torch.save(fused.state_dict(), file)
    file.seek(0)
    fused.load_state_dict(torch.load(file, weights_only=True))


def test_hooked_or_replaced_children_run_as_themselves() -> None:
    reference, fused, x = make_pair("MBConv")
    backends._warned.clear()
    seen: list[torch.Size] = []
    handle = fused.expand_norm.register_forward_hook(lambda m, i, out: seen.append(out.shape))
    with pytest.warns(mk.FallbackWarning, match="expand_norm has hooks; running unfused"):
        check_same(train_step(fused, x), train_step(reference, x))
    assert len(seen) == 1
    handle.remove()
    fused.expand_conv.forward = fused.expand_conv.forward
    with pytest.warns(mk.FallbackWarning, match="the forward of expand_conv was replaced"):
        fused(x)
    del fused.expand_conv.forward
    fused.shrink_conv = nn.Sequential(fused.shrink_conv)
    with pytest.warns(mk.FallbackWarning, match="shrink_conv was replaced by Sequential"):
        fused(x)


def test_block_hooks_and_parametrizations_work() -> None:
    reference, fused, x = make_pair("MBConv")

    class Doubled(nn.Module):
        def forward(self, weight: Tensor) -> Tensor:
            return 2 * weight

    for block in (reference, fused):
        parametrize.register_parametrization(block.expand_conv, "weight", Doubled())
        block.register_forward_hook(lambda module, inputs, output: output + 1)
    with warnings.catch_warnings():
        warnings.simplefilter("error", mk.FallbackWarning)
        check_same(train_step(fused, x), train_step(reference, x))


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("name", PAIRS)
def test_checkpointing_around_a_block(name: str, use_reentrant: bool) -> None:
    """All as without it: running statistics see a batch once, though its forward runs twice."""
    reference, fused, x = make_pair(name, drop_path=0.4)

    class Checkpointed(nn.Module):
        def __init__(self, block: nn.Module) -> None:
            super().__init__()
            self.block = block

        def forward(self, x: Tensor) -> Tensor:
            return checkpoint(self.block, x, use_reentrant=use_reentrant)

    expected = train_step(copy.deepcopy(reference), x)
    for block in (fused, reference):
        actual = train_step(Checkpointed(block), x)
        check_same({key.removeprefix("block."): value for key, value in actual.items()}, expected)
    assert int(fused.depthwise_norm.num_batches_tracked) == 1


@pytest.mark.parametrize("name", ["MBConv", "MOAT"])
def test_checkpointing_inside_a_compiled_function(name: str) -> None:
    _, fused, x = make_pair(name)
    expected = train_step(copy.deepcopy(fused), x)
    torch._dynamo.reset()

    class Checkpointed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block = fused

        def forward(self, x: Tensor) -> Tensor:
            return checkpoint(self.block, x, use_reentrant=False)

    compiled = torch.compile(Checkpointed(), fullgraph=True, backend="aot_eager")
    actual = train_step(compiled, x)
    check_same({k.removeprefix("_orig_mod.block."): v for k, v in actual.items()}, expected)


def test_a_forward_inside_no_backward_counts_every_time() -> None:
    _, fused, x = make_pair("MBConv")
    for count in (1, 2):
        fused(x).sum().backward()
        assert int(fused.pre_norm.num_batches_tracked) == count


@pytest.mark.parametrize("name", PAIRS)
def test_recompute_updates_running_statistics_once(name: str) -> None:
    _, fused, x = make_pair(name)
    fused.recompute = "block"
    train_step(fused, x)
    assert int(fused.pre_norm.num_batches_tracked) == 1


def test_the_backward_pass_stays_with_the_backend_of_the_forward_pass() -> None:
    reference, fused, x = make_pair("MOAT")
    fused.recompute = "block"
    expected = train_step(reference.float(), x.float())
    x = x.float().requires_grad_()
    for backend in ("reference", "torch"):
        with mk.use_backend(backend):
            output = fused.float()(x)
        (gradient,) = torch.autograd.grad(output.square().mean(), x)  # outside the block
        assert_close(gradient, expected["x.grad"], BACKEND_GRADIENT[torch.float32])


@pytest.mark.parametrize("input_dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", PAIRS)
def test_autocast(name: str, input_dtype: torch.dtype) -> None:
    """Output dtype as stock blocks give; values within bfloat16 rounding of float64."""
    reference, fused, x = make_pair(name)
    exact = train_step(copy.deepcopy(reference), x.to(input_dtype).double())
    results = []
    for block in (reference.float(), fused.float()):
        with torch.autocast("cpu", torch.bfloat16):
            torch.manual_seed(7)
            output = block(x.to(input_dtype))
        output.float().square().mean().backward()
        results.append(output)
        assert all(p.grad.dtype == torch.float32 for p in block.parameters())
    stock, ours = results
    assert ours.dtype == stock.dtype
    scale = exact["output"].abs().max()
    stock_error = (stock - exact["output"]).abs().max() / scale
    assert (ours - exact["output"]).abs().max() / scale <= 2 * stock_error + 2**-8


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("name", PAIRS)
def test_compile_without_graph_breaks(name: str, dtype: torch.dtype) -> None:
    """float64 takes the torch backend, float32 the native one where it is built."""
    _, fused, x = make_pair(name)
    fused, x = fused.to(dtype), x.to(dtype)
    expected = train_step(copy.deepcopy(fused), x)
    torch._dynamo.reset()
    compiled = torch.compile(fused, fullgraph=True, backend="aot_eager")
    actual = {k.removeprefix("_orig_mod."): v for k, v in train_step(compiled, x).items()}
    check_same(actual, expected, dtype)


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_nothing_is_kept_for_a_backward_that_cannot_come(context) -> None:
    """Parameters that require grad do not make an evaluation pay for gradients."""
    _, fused, x = make_pair("MBConv")

    class Recorder(TorchDispatchMode):
        results: object = None

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            results = function(*args, **(kwargs or {}))
            if "mbconv" in str(function):
                self.results = results
            return results

    fused.eval()
    with context(), Recorder() as recorder:
        fused(x)
    assert isinstance(recorder.results, Tensor)  # the output alone


def test_repr_names_the_choices() -> None:
    _, fused, _ = make_pair("MOAT")
    assert "recompute='auto'" in repr(fused)
    assert "window_size=(4, 4)" in repr(fused)


def test_the_reference_names_an_unbiased_variance_of_one_value() -> None:
    block = MBConvBlock(8, 8, unbiased_running_var=True)
    with pytest.raises(ValueError, match="needs at least two values per channel"):
        block(torch.randn(1, 8, 1, 1))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"in_channels": 0}, "in_channels must be a positive integer, got 0"),
        ({"stride": 1.5}, "stride must be a positive integer, got 1.5"),
        ({"se_ratio": -1}, "se_ratio must be None or > 0"),
        ({"drop_path": 1.0}, r"drop_path must be within \[0, 1\)"),
        ({"recompute": "some"}, "recompute must be one of"),
    ],
)
def test_bad_arguments_are_named(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        mk.FusedMBConv(**{"in_channels": 8, "out_channels": 8, **arguments})
