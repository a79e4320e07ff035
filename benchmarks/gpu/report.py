"""Turn what `make gpu` found into docs/gpu_results.md and its charts.

    python -m benchmarks.gpu.report build/gpu

reads the folders that `python -m benchmarks.gpu` wrote. Of several runs on a card the later folder
wins, step by step, and every row names its run; different cards have chapters of their own. What no
run has measured says so.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "tests"))

from benchmarks.gpu import chapters, charts, comparison, losses  # noqa: E402
from benchmarks.gpu.findings import MERGED_FACTS, NOT_YET, Card, read_cards  # noqa: E402

HEAD = """# On a GPU: what was measured

Made by `python -m benchmarks.gpu.report` of what `make gpu` found ([gpu.md](gpu.md)); do not edit.
"""
CHAPTERS: dict[str, Callable[[Card], list[str]]] = {
    "Steps": chapters.overview,
    "Ceilings": chapters.ceilings,
    "Training and inference": comparison.models,
    "Where the time goes": losses.kernels,
    "Errors against float64": chapters.correctness,
    "Attention": chapters.attention,
    "Tests and sanitizers": chapters.checks,
    "Tuned launches": comparison.tuning,
    "What was not done, and why": chapters.undone,
}


def format_document(cards: list[Card], pictures: dict[str, str | None]) -> str:
    """pictures: {title: path from the document, or None where there is none}."""
    lines = [HEAD]
    if not cards:
        lines += [f"Nothing has been run on a GPU: everything is {NOT_YET}.", ""]
        cards = [Card("No GPU so far", [], {})]
    for title, path in pictures.items():
        lines += [f"![{title}]({path})" if path else f"Chart, {title}: {NOT_YET}.", ""]
    for card in cards:
        lines += [f"## {card.name}", "", *_introduce(card)]
        where = f", {card.name}" if len(cards) > 1 else ""
        for title, write in CHAPTERS.items():
            body = [f"{line}{where}" if line.startswith("####") else line for line in write(card)]
            lines += [f"### {title}{where}", "", *body, ""]
    return _tidy(lines)


def _introduce(card: Card) -> list[str]:
    lines = [f"- {run}" for run in card.runs]
    if card.is_rehearsal:
        lines += ["", "**A rehearsal on a CPU: all its numbers are invented.**"]
    if len(card.runs) > 1:
        lines += ["", "Tables name the run that each row is of."]
        differing = [
            name for name in MERGED_FACTS if len({run.facts.get(name) for run in card.runs}) > 1
        ]
        if differing:
            lines.append(
                f"The runs differ in {', '.join(differing)}: so may what a ratio compares."
            )
    return [*lines, ""] if lines else []


def _tidy(lines: list[str]) -> str:
    """One empty line at most between paragraphs."""
    found: list[str] = []
    for line in "\n".join(lines).splitlines():
        if line or (found and found[-1]):
            found.append(line)
    return "\n".join(found).rstrip() + "\n"


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu.report",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("folders", type=Path, nargs="+", help="that `make gpu` wrote")
    parser.add_argument("--document", type=Path, default=ROOT / "docs" / "gpu_results.md")
    parser.add_argument("--charts", type=Path, default=ROOT / "docs", help="their folder")
    options = parser.parse_args(arguments)
    for folder in options.folders:
        if not (folder / "results.jsonl").exists():
            print(f"{folder} has no results.jsonl: nothing is read of it", file=sys.stderr)
    cards = read_cards(options.folders)
    options.document.parent.mkdir(parents=True, exist_ok=True)
    pictures = {
        title: os.path.relpath(path, options.document.parent) if path else None
        for title, path in charts.draw(cards, options.charts).items()
    }
    options.document.write_text(format_document(cards, pictures))


if __name__ == "__main__":
    main()
