"""Planning counts what PyTorch does by default."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(autouse=True)
def default_algorithms(poisoned_memory: None) -> Iterator[None]:
    torch.use_deterministic_algorithms(False)
    yield
