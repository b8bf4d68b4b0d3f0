"""What scripts write into the pages of docs/: the text between two markers, tables and pictures."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

DOCS = Path(__file__).parents[2] / "docs"
IMAGES = DOCS / "images"


def replace(path: Path, mark: str, lines: list[str]) -> None:
    """Put `lines` between `<!-- mark: begin -->` and `<!-- mark: end -->`."""
    begin, end = f"<!-- {mark}: begin -->", f"<!-- {mark}: end -->"
    before, _, rest = path.read_text().partition(begin)
    after = rest.partition(end)[2]
    path.write_text("\n".join([before + begin, *lines, end + after]))


def table(head: list[str], rows: Iterable[list[str]]) -> list[str]:
    """The lines of a table, and an empty one behind it."""
    text = [" | ".join(row) for row in [head, ["---"] * len(head), *rows]]
    return [*(f"| {row} |" for row in text), ""]


def save(figure: Any, name: str) -> None:
    """A figure of matplotlib as docs/images/`name`."""
    from matplotlib import pyplot as plt  # an extra, and slow to import

    IMAGES.mkdir(parents=True, exist_ok=True)
    figure.tight_layout()
    figure.savefig(IMAGES / name, dpi=110)
    plt.close(figure)
