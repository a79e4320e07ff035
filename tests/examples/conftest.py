"""The example program on pictures and with models small enough to take seconds."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
from support.example_program import STEPS, small_model

import moat_kernels

if TYPE_CHECKING:
    from training import Settings

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))


@pytest.fixture(scope="package")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two classes of three small pictures each: coarse and fine random blotches."""
    from PIL import Image

    folder = tmp_path_factory.mktemp("pictures")
    random = np.random.default_rng(0)
    for name, size in (("coarse", 4), ("fine", 24)):
        (folder / name).mkdir()
        for index in range(3):
            pixels = random.integers(0, 256, (size, size, 3), dtype=np.uint8)
            Image.fromarray(pixels).resize((48, 40)).save(folder / name / f"{index}.png")
    return folder


@pytest.fixture
def run(pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """Calls the program on tiny data and models; peak memory and chart have tests of their own."""
    import train_classifier

    monkeypatch.setattr(moat_kernels, "create_model", small_model)
    monkeypatch.setattr(train_classifier, "peak_of_step", lambda *arguments: 2**20)
    monkeypatch.setattr(train_classifier, "draw_chart", lambda *arguments: False)
    monkeypatch.setattr(train_classifier, "RUNS", tmp_path / "runs")

    def call(*arguments: object) -> int:
        small = ("--data", pictures, "--steps", STEPS, "--resolution", 32, "--batch-size", 4)
        return train_classifier.main([str(one) for one in (*small, "--device", "cpu", *arguments)])

    return call


@pytest.fixture
def settings() -> Settings:
    from training import Settings

    return Settings(
        model="tiny_moat_0",
        classes=["a", "b"],
        resolution=32,
        batch_size=2,
        steps=4,
        lr=1e-3,
        seed=0,
        amp=False,
        recompute="auto",
        device="cpu",
    )
