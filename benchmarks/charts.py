"""What all charts of benchmark results share: colours, labelled bars, the note at the foot."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Rows of the same kind keep their colour in every chart.
GREY, DIM, LIGHT, DARK = "#8b929e", "#c3c8d0", "#f0a67f", "#d9480f"


def draw_bars(
    axis: Axes, labels: Sequence[str], colours: Sequence[str], values: Sequence[float], text: str
) -> None:
    """Horizontal bars, labelled with the value and its share of the first; 0: not measured."""
    positions = range(len(values))
    axis.barh(positions, values, color=colours, height=0.68)
    axis.set_yticks(positions, labels)
    axis.invert_yaxis()
    axis.set_xticks([])
    axis.set_xlim(0, 1.45 * max(values) or 1.0)
    axis.tick_params(length=0)
    for side in ("top", "right", "bottom"):
        axis.spines[side].set_visible(False)
    for position, value in zip(positions, values, strict=True):
        share = f"  ({value / values[0]:.2f}×)" if position and values[0] else ""
        label = f" {text.format(value)}{share}" if value else " not measured"
        axis.text(value, position, label, va="center", size=9)


def title(axis: Axes, text: str) -> None:
    axis.set_title(text, loc="left", size=10, weight="bold")


def title_beside(axis: Axes, text: str) -> None:
    """Left of the axis's own title, above the labels of its bars."""
    axis.annotate(
        text,
        (0, 1),
        xytext=(-6, 6),  # points
        xycoords="axes fraction",
        textcoords="offset points",
        ha="right",
        weight="bold",
    )


def save(figure: Figure, note: str, path: Path) -> None:
    """note: where it was measured; its lines stand at the foot."""
    figure.text(0.01, 0.015, note, size=8, color=GREY)
    lines = note.count("\n") + 1
    figure.tight_layout(rect=(0, (0.15 + 0.15 * lines) / figure.get_figheight(), 1, 1))
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
