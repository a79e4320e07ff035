"""The bfloat16 of support/triton_interpreter.py: right with it, wrong without, or an error."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

triton = pytest.importorskip("triton")

import triton.language as tl  # noqa: E402
from triton.runtime.errors import InterpreterError  # noqa: E402

pytestmark = pytest.mark.oldest_triton
SIZE = 16


@triton.jit
def _load(pointer, SIZE: tl.constexpr):
    index = tl.arange(0, SIZE)[:, None] * SIZE + tl.arange(0, SIZE)[None, :]
    return tl.load(pointer + index)


@triton.jit
def _store(pointer, value, SIZE: tl.constexpr):
    index = tl.arange(0, SIZE)[:, None] * SIZE + tl.arange(0, SIZE)[None, :]
    tl.store(pointer + index, value)


@triton.jit
def round_kernel(a, b, out, SIZE: tl.constexpr):
    _store(out, (_load(a, SIZE).to(tl.float32) * 1.003).to(tl.bfloat16), SIZE)


@triton.jit
def dot_kernel(a, b, out, SIZE: tl.constexpr):
    _store(out, tl.dot(_load(a, SIZE), _load(b, SIZE)).to(tl.bfloat16), SIZE)


@triton.jit
def multiply_add_kernel(a, b, out, SIZE: tl.constexpr):
    _store(out, _load(a, SIZE) * _load(b, SIZE) + _load(a, SIZE), SIZE)


@triton.jit
def compare_kernel(a, b, out, SIZE: tl.constexpr):
    a, b = _load(a, SIZE), _load(b, SIZE)
    _store(out, tl.where(a > b, a, b), SIZE)


@triton.jit
def sum_kernel(a, b, out, SIZE: tl.constexpr):
    _store(out, tl.sum(_load(a, SIZE), 1)[:, None] + _load(b, SIZE), SIZE)


@triton.jit
def negate_kernel(a, b, out, SIZE: tl.constexpr):
    _store(out, -_load(a, SIZE), SIZE)


EXPECTED = {
    round_kernel: lambda a, b: (a.float() * 1.003).bfloat16(),
    dot_kernel: lambda a, b: (a.float() @ b.float()).bfloat16(),
    multiply_add_kernel: lambda a, b: a * b + a,
    compare_kernel: torch.maximum,
}


def inputs(device: str) -> tuple[Tensor, Tensor]:
    a, b = torch.randn(2, SIZE, SIZE, device=device).bfloat16()
    return a, b


def run(kernel, a: Tensor, b: Tensor) -> Tensor:
    out = torch.empty_like(a)
    kernel[(1,)](a, b, out, SIZE=SIZE)
    return out


@pytest.mark.parametrize("kernel", EXPECTED, ids=lambda kernel: kernel.__name__)
def test_bfloat16_is_right(kernel, device: str) -> None:
    if device != "cpu" and kernel is multiply_add_kernel:
        pytest.skip("a GPU multiplies and adds with one rounding")
    a, b = inputs(device)
    assert torch.equal(run(kernel, a, b), EXPECTED[kernel](a, b))


@pytest.mark.parametrize("kernel", EXPECTED, ids=lambda kernel: kernel.__name__)
def test_it_is_wrong_without_the_patch(
    kernel, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If this fails, Triton was repaired and support/triton_interpreter.py can go."""
    if device != "cpu":
        pytest.skip("a GPU needs no patch")
    monkeypatch.undo()
    a, b = inputs(device)
    assert not torch.equal(run(kernel, a, b), EXPECTED[kernel](a, b))


def test_rounding_keeps_infinity_and_nan(device: str) -> None:
    a, b = inputs(device)
    a.view(-1)[:3] = torch.tensor([float("inf"), -float("inf"), float("nan")])
    expected = (a.float() * 1.003).bfloat16()
    torch.testing.assert_close(run(round_kernel, a, b), expected, rtol=0, atol=0, equal_nan=True)


def test_a_reduction_is_refused(device: str) -> None:
    if device != "cpu":
        pytest.skip("a GPU computes it")
    with pytest.raises(InterpreterError, match="reduction of bfloat16"):
        run(sum_kernel, *inputs(device))


def test_negation_is_refused_or_right(device: str) -> None:
    """Triton 3.7 subtracts from zero; 3.9 has an operation for it."""
    a, b = inputs(device)
    try:
        result = run(negate_kernel, a, b)
    except InterpreterError as error:
        assert "unary_op on bfloat16" in str(error)
    else:
        assert torch.equal(result, -a)
