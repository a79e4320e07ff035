"""CHANGELOG.md names every release with its date, the version of this package first."""

from __future__ import annotations

import re
from datetime import date
from pathlib import Path

import moat_kernels

CHANGELOG = Path(__file__).parent.parent / "CHANGELOG.md"


def test_the_first_release_is_this_version_and_all_have_dates() -> None:
    lines = CHANGELOG.read_text().splitlines()
    headings = [line for line in lines if line.startswith("## ") and line != "## [Unreleased]"]
    releases = [
        re.fullmatch(r"## \[(\d+\.\d+\.\d+)\] - (\d{4}-\d{2}-\d{2})", line) for line in headings
    ]
    assert releases and all(releases), headings
    assert releases[0][1] == moat_kernels.__version__
    dates = [date.fromisoformat(release[2]) for release in releases]
    assert dates == sorted(dates, reverse=True)
    assert dates[0] <= date.today()


def test_what_is_not_released_yet_stands_first() -> None:
    headings = re.findall(r"^## (.*)$", CHANGELOG.read_text(), re.MULTILINE)
    assert "[Unreleased]" not in headings[1:]
