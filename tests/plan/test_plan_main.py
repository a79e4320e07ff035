"""`python -m moat_kernels.plan`."""

from __future__ import annotations

import pytest

from moat_kernels.ops.triton_support.launching import triton_missing
from moat_kernels.plan.__main__ import main

COMMAND = ["--model", "tiny_moat_0", "--gpu", "l4", "--resolution", "33"]


@pytest.mark.skipif(bool(triton_missing()), reason=triton_missing())
def test_a_batch_that_fits(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*COMMAND, "--batch", "2", "--kernels"]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("Predicted, not measured: a training step of tiny_moat_0 at 33 px")
    assert "six numbers that were measured on H200s" in printed
    ways = ("fwd/all", "at least", "issue", "graph", "compiled", "eager", "at most")
    assert "".join(f"{way:>11}" for way in ways) in printed
    for row in ("stock", 'fused, recompute="none"', 'fused, recompute="block"', "expand_kernel"):
        assert row in printed


@pytest.mark.skipif(bool(triton_missing()), reason=triton_missing())
def test_nothing_fits(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("moat_kernels.plan.__main__.capacity", lambda gpu: 1000)
    assert main(COMMAND) == 1
    assert capsys.readouterr().out.count("none fits") == 4


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("--model", "moat_9", "invalid choice: 'moat_9' (choose from"),
        ("--gpu", "v100", "invalid choice: 'v100' (choose from"),
        ("--resolution", "0", "invalid positive number value: '0'"),
        ("--resolution", "32", "resolution must be more than 32 pixels"),
        ("--batch", "many", "invalid batch size value: 'many'"),
    ],
)
def test_unknown_arguments_are_named(
    option: str, value: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as exit:
        main([*COMMAND, option, value])
    assert exit.value.code == 2
    assert message in capsys.readouterr().err
