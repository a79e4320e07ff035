"""The golden checkpoint, to read and to damage."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
from checkpoints.keras_writer import SMALL_KERAS, keras_shapes
from support.golden import variable_values

from moat_kernels.checkpoints import TensorBundle

GOLDEN_FOLDER = Path(__file__).parents[1] / "golden" / "ckpt_small"


@pytest.fixture
def golden_folder() -> Path:
    """A checkpoint of a small MOAT that TensorFlow wrote, with 10 classes."""
    return GOLDEN_FOLDER


@pytest.fixture
def golden_copy(tmp_path: Path) -> Path:
    """A copy of the golden checkpoint that a test may damage: its prefix."""
    shutil.copytree(GOLDEN_FOLDER, tmp_path / "copy")
    return tmp_path / "copy" / "model.ckpt-1234"


@pytest.fixture(scope="session")
def _golden_arrays() -> dict[str, np.ndarray]:
    arrays = dict(TensorBundle(GOLDEN_FOLDER))
    for array in arrays.values():
        array.flags.writeable = False
    return arrays


@pytest.fixture
def variables(_golden_arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The official variables of the golden checkpoint, by name; in a dict of the test's own."""
    return dict(_golden_arrays)


@pytest.fixture(scope="session")
def _keras_arrays() -> dict[str, np.ndarray]:
    arrays = {
        name: variable_values(name, shape, 5) for name, shape in keras_shapes(*SMALL_KERAS).items()
    }
    for array in arrays.values():
        array.flags.writeable = False
    return arrays


@pytest.fixture
def keras(_keras_arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The variables of a small Keras MOAT, by full name; in a dict of the test's own."""
    return dict(_keras_arrays)
