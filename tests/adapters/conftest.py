"""Every test sees the warnings that this process has emitted before, too."""

from __future__ import annotations

import pytest

from moat_kernels.ops.common import backends


@pytest.fixture(autouse=True)
def warnings_afresh(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "_warned", set())
