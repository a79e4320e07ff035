"""Calls from many threads, in forked processes, and while the number of threads changes."""

from __future__ import annotations

import functools
import multiprocessing
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from support.mbconv_cases import Case, make_parameters, run
from support.native import needs_extension
from torch import Tensor

from moat_kernels import FusedMOATBlock, use_backend
from moat_kernels.functional import (
    MBConvDescription,
    WindowAttentionDescription,
    mbconv,
    window_attention,
)
from moat_kernels.stem import FusedStem

pytestmark = needs_extension

Work = Callable[[], list[Tensor]]


def evaluation() -> Work:
    case = Case(wide_channels=140)
    parameters = make_parameters(case, torch.float32)
    x = torch.randn(3, case.in_channels, 20, 19)

    def work() -> list[Tensor]:
        with torch.no_grad(), use_backend("cpu"):
            return [mbconv(x, parameters, case.description)]

    return work


def training(autocast: bool = False) -> Work:
    case = Case(MBConvDescription(), wide_channels=140)
    parameters = make_parameters(case, torch.float32)
    x = torch.randn(3, case.in_channels, 20, 19)

    def work() -> list[Tensor]:
        with use_backend("cpu"), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            return list(run(x, parameters, case.description, training=True).values())

    return work


def attention() -> Work:
    description = WindowAttentionDescription(heads=3, head_dim=32, window_size=(7, 7))
    qkv, table = torch.randn(2, 14, 13, 3 * 3 * 32), torch.randn(3, 13, 13)

    def work() -> list[Tensor]:
        leaves = [qkv.clone().requires_grad_(), table.clone().requires_grad_()]
        with use_backend("cpu"):
            output = window_attention(*leaves, description)
        return [output, *torch.autograd.grad(output.square().sum(), leaves)]

    return work


def attention_half() -> Work:
    block = FusedMOATBlock(8, 64, window_size=7).eval()
    y = torch.randn(2, 64, 14, 13)

    def work() -> list[Tensor]:
        with torch.no_grad(), use_backend("cpu"):
            return [block.attention_half(y)]

    return work


def stem_training() -> Work:
    stem = FusedStem(24)
    x = torch.randn(2, 3, 30, 27)

    def work() -> list[Tensor]:
        with use_backend("cpu"):
            output = stem(x)
        return [output, *torch.autograd.grad(output.square().sum(), list(stem.parameters()))]

    return work


WORK = {
    "evaluation": evaluation,
    "training": training,
    "training in bfloat16": functools.partial(training, autocast=True),
    "attention": attention,
    "attention_half": attention_half,
    "stem_training": stem_training,
}


def same(actual: list[Tensor], expected: list[Tensor]) -> bool:
    return all(torch.equal(one, other) for one, other in zip(actual, expected, strict=True))


@pytest.mark.parametrize("name", WORK)
def test_concurrent_calls_of_many_threads_do_not_disturb_each_other(name: str) -> None:
    work = WORK[name]()
    expected = work()
    with ThreadPoolExecutor(8) as pool:
        results = [future.result() for future in [pool.submit(work) for _ in range(24)]]
    assert all(same(result, expected) for result in results)


@pytest.mark.parametrize("name", WORK)
def test_the_number_of_threads_may_change_between_calls(name: str) -> None:
    """Sums may be ordered by how many threads there are, but by nothing else."""
    work, first = WORK[name](), {}
    try:
        for threads in (1, 4, 2, 4, 1, 2):
            torch.set_num_threads(threads)
            result = work()
            expected = first.setdefault(threads, result)
            assert same(result, expected), f"{threads} threads"
            for one, other in zip(result, first[1], strict=True):
                torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-3)
    finally:
        torch.set_num_threads(1)


def _worker(work: Work, queue: multiprocessing.Queue) -> None:
    torch.set_num_threads(1)  # as the workers of a DataLoader do: OpenMP's pool does not survive
    queue.put([tensor.detach().numpy() for tensor in work()])


@pytest.mark.parametrize("name", WORK)
def test_a_forked_process_computes_the_same(name: str) -> None:
    work = WORK[name]()
    expected = work()
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    process = context.Process(target=_worker, args=(work, queue))
    process.start()
    try:
        result = [torch.from_numpy(array) for array in queue.get(timeout=60)]
        process.join(timeout=60)
    finally:
        process.kill()
    assert same(result, expected)


def test_other_python_threads_run_meanwhile_without_the_interpreters_lock() -> None:
    """While a kernel runs, a second thread counts; with the lock held it could not start to."""
    case = Case(in_channels=64, wide_channels=256, out_channels=64)
    parameters = make_parameters(case, torch.float32)
    x = torch.randn(8, 64, 64, 64)
    counted, stop = 0, threading.Event()

    def count() -> None:
        nonlocal counted
        while not stop.is_set():
            counted += 1

    counter = threading.Thread(target=count)
    counter.start()
    try:
        before = counted
        with torch.no_grad(), use_backend("cpu"):
            mbconv(x, parameters, case.description)
        during = counted - before
    finally:
        stop.set()
        counter.join()
    # The kernel takes tens of milliseconds, a count well under a microsecond. What the Python
    # around the kernel lets through is one slice of the interpreter: 5 ms, some 50 000 counts.
    assert during > 100_000
