"""Write docs/roofline.md: `python benchmarks/roofline.py`, a minute of tracing, no GPU."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from support.roofline import DOCUMENT, format_document

if __name__ == "__main__":
    DOCUMENT.write_text(format_document())
