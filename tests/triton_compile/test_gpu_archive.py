"""Kernels compiled here and carried elsewhere are found there: `benchmarks.gpu.archive`."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

from support.compile_only_driver import compiling_for, record_launches
from triton import knobs

from benchmarks.gpu import archive
from moat_kernels.functional import WindowAttentionDescription
from moat_kernels.ops.window_attention.triton import backend as triton_backend

ARCHITECTURE = 90


def compile_attention() -> list[bool]:
    """For each kernel of a small attention, whether it was found on disk."""
    found: list[bool] = []

    def listen(*, cache_hit: bool, **others: object) -> None:
        found.append(cache_hit)

    qkv = torch.empty(1, 4, 4, 96, dtype=torch.bfloat16, device="meta")
    table = torch.empty(2, 7, 7, device="meta")
    with record_launches(ARCHITECTURE) as launches:
        triton_backend.forward(qkv, table, WindowAttentionDescription(2, 16))
    with pytest.MonkeyPatch.context() as patch, compiling_for(ARCHITECTURE):
        patch.setattr(knobs.compilation, "listener", listen)
        for launch in launches:
            launch.compile.func.__self__.device_caches.clear()  # what this process has compiled
            launch.compile()
    return found


def test_carried_kernels_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here, there = tmp_path / "here", tmp_path / "there"
    monkeypatch.setenv("TRITON_CACHE_DIR", str(here))
    assert set(compile_attention()) == {False}
    monkeypatch.setattr(archive, "LIBRARY", ())
    archive.pack(here, [], tmp_path / "kernels.tar.xz")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(there))
    archive.unpack(tmp_path / "kernels.tar.xz", there)
    here.rename(tmp_path / "away")
    assert set(compile_attention()) == {True}
