"""The choice of a backend: by context, by environment, by coverage; falling back is visible."""

from __future__ import annotations

import threading

import pytest
import torch

import moat_kernels as mk
from moat_kernels.ops.common import backends
from moat_kernels.ops.common.backends import choose_backend, requested_backend

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def fresh_warnings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "_warned", set())
    monkeypatch.delenv(backends.ENVIRONMENT_VARIABLE, raising=False)


def choose(reasons: dict[str, str]) -> str:
    """The choice among implementations that do not cover a call for `reasons` (empty: cover it)."""
    return choose_backend("an_op", CPU, {name: name for name in reasons}, reasons.__getitem__)


def test_context_and_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    assert requested_backend() is None
    monkeypatch.setenv(backends.ENVIRONMENT_VARIABLE, "torch")
    assert requested_backend() == "torch"
    with mk.use_backend("reference"):
        assert requested_backend() == "reference"
        with mk.use_backend("torch"):
            assert requested_backend() == "torch"
        assert requested_backend() == "reference"
    assert requested_backend() == "torch"


def test_context_is_left_after_an_error() -> None:
    with pytest.raises(KeyError), mk.use_backend("reference"):
        raise KeyError
    assert requested_backend() is None


def test_context_belongs_to_its_thread() -> None:
    seen: list[str | None] = []
    with mk.use_backend("reference"):
        thread = threading.Thread(target=lambda: seen.append(requested_backend()))
        thread.start()
        thread.join()
    assert seen == [None]


def test_unknown_names_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=r"use_backend names the backend 'tpu'; this version has"):
        mk.use_backend("tpu").__enter__()
    monkeypatch.setenv(backends.ENVIRONMENT_VARIABLE, "tpu")
    with pytest.raises(ValueError, match="MOAT_KERNELS_BACKEND names the backend 'tpu'"):
        requested_backend()


def test_an_asked_for_backend_that_does_not_cover_a_call_falls_back_with_one_warning() -> None:
    with mk.use_backend("torch"):
        with pytest.warns(mk.FallbackWarning, match="an_op: backend 'torch' does not cover int8"):
            assert choose({"torch": "int8"}) == "reference"
        assert choose({"torch": "int8"}) == "reference"  # a second warning would be an error
        assert choose({"torch": ""}) == "torch"


def test_reference_is_always_there() -> None:
    with mk.use_backend("reference"):
        assert choose({"torch": ""}) == "reference"
    with pytest.warns(mk.FallbackWarning, match="falling back to 'reference'"):
        assert choose({"torch": "int8"}) == "reference"


def test_status_lists_every_backend() -> None:
    status = backends.backend_status()
    assert set(status) == set(backends.BACKENDS)
    assert status["reference"].usable and status["torch"].usable
    assert all(entry.usable or entry.reason for entry in status.values())
