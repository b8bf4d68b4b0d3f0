"""Links of the pages lead to files, headings and lines that exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from helpers import walk

ROOT = Path(__file__).parents[1]
FOLDERS = ("benchmarks", "docs", "examples")
PAGES = [*ROOT.glob("*.md"), *(page for name in FOLDERS for page in (ROOT / name).rglob("*.md"))]
LINK = re.compile(r"\]\((?!https?:)(?P<path>[^)#\s]*)(?:#(?P<heading>[^)\s]+))?\)")


def headings(page: Path) -> set[str]:
    """Names that headings have in links: lower case, spaces to hyphens, no punctuation."""
    titles = re.findall(r"^#+ (.+)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def broken(page: Path) -> list[str]:
    found = []
    for link in LINK.finditer(page.read_text()):
        target = (page.parent / link["path"]).resolve() if link["path"] else page
        heading = link["heading"] if target.suffix == ".md" else None
        if not target.exists() or (heading and heading not in headings(target)):
            found.append(link[0])
    return found


@pytest.mark.parametrize("page", sorted(PAGES), ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_lead_somewhere(page: Path) -> None:
    assert broken(page) == []


def test_a_broken_link_is_found(tmp_path: Path) -> None:
    (tmp_path / "other.md").write_text("# One, two\n")
    page = tmp_path / "page.md"
    page.write_text("[a](other.md#one-two) [b](other.md#three) [c](gone.md) [d](https://x.org)")
    assert broken(page) == ["](other.md#three)", "](gone.md)"]


def test_the_walk_leads_to_the_definitions() -> None:
    text = walk.PAGE.read_text()
    assert 10 <= len(walk.LINK.findall(text)) <= 16
    assert text.count("#L") == len(walk.LINK.findall(text)), "a link of another form"
    assert walk.mended(text) == text, "run: python tests/helpers/walk.py"


def test_a_link_of_the_walk_is_mended() -> None:
    path, line = walk.place("src/varptq/models/nowhere/pyramid.py", "TokenPyramid.add_scale")
    assert (ROOT / path).read_text().splitlines()[line - 1].strip().startswith("def add_scale(")
    with pytest.raises(LookupError, match="does not define nothing_of_that_name"):
        walk.place("src/varptq/models/pyramid.py", "nothing_of_that_name")
