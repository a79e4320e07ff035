"""`python -m moat_kernels.tune` where there is nothing to measure; triton_kernels/ has the rest."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from moat_kernels import tune
from moat_kernels.ops.triton_support import user_table

without_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")


@without_gpu
def test_without_a_gpu_the_command_says_so_and_fails() -> None:
    command = [sys.executable, "-m", "moat_kernels.tune", "--model", "tiny_moat_0"]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 1
    assert result.stderr.startswith("nothing can be measured here: no CUDA device")
    assert "The static launch tables are in use." in result.stderr


def test_a_missing_triton_is_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(tune, "backend_status", lambda: {"triton": _Missing})
    with pytest.raises(SystemExit, match="nothing can be measured here: triton is not installed"):
        tune.main([])


class _Missing:
    reason = "triton is not installed"


class _Usable:
    reason = ""


@pytest.mark.parametrize(
    ("prepare", "reason"),
    [
        (lambda file: file.mkdir(), "it is no file"),
        (lambda file: file.write_text("my notes"), "Expecting value"),
        (lambda file: file.parent.rmdir() or file.parent.write_text(""), "cannot be written: "),
    ],
    ids=["folder", "notes", "no folder"],
)
def test_a_table_that_cannot_be_written_is_found_before_measuring(
    prepare, reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "tables" / "launches.json"
    file.parent.mkdir()
    prepare(file)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(tune, "backend_status", lambda: {"triton": _Usable})
    monkeypatch.setenv(user_table.ENVIRONMENT_VARIABLE, str(file))
    with pytest.raises(SystemExit, match=f"{file} cannot take what is measured: {reason}"):
        tune.main([])


@pytest.mark.parametrize("arguments", [["--model", "moat_9"], ["--dtype", "int8"]])
def test_bad_arguments(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        tune.main(arguments)
    assert f"invalid choice: '{arguments[1]}'" in capsys.readouterr().err
