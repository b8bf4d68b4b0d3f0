"""benchmarks/README.md lists every script, and what it lists is there; scripts import no script."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "benchmarks"
ROOMS = ("quality", "speed")
# In the rooms, and at the front door.
SCRIPTS = [
    path
    for folder in (*(FOLDER / room for room in ROOMS), FOLDER)
    for path in sorted(folder.glob("*.py"))
    if path.stem != "__init__"
]
ROW = re.compile(r"^\| `((?:\w+\.)?\w+)` \|(.*)\|(.*)\|(.*)\|$", re.MULTILINE)
LINK = re.compile(r"\[([^]]+)\]\(([^)]+)\)")
RUN = re.compile(r"python -m benchmarks\.(\w+)\.(\w+)|benchmarks/([\w/]+\.(?:py|jsonl?))")
INDEX = {name: cells for name, *cells in ROW.findall((FOLDER / "README.md").read_text())}


def linked(cell: str) -> Iterator[tuple[str, Path]]:
    return ((text, (FOLDER / target).resolve()) for text, target in LINK.findall(cell))


def test_every_script_stands_in_the_index_once_and_in_order() -> None:
    parts = [path.relative_to(FOLDER).with_suffix("").parts for path in SCRIPTS]
    assert list(INDEX) == [".".join(names) for names in parts]


def test_every_result_stands_in_the_index() -> None:
    listed = {path for result, *_ in INDEX.values() for _, path in linked(result)}
    assert listed == set((FOLDER / "results").iterdir())


def test_what_a_row_names_is_there() -> None:
    for name, (result, section, time) in INDEX.items():
        assert time.strip(), name
        for text, path in linked(result):
            assert path.name == text
        source = (FOLDER / f"{name.replace('.', '/')}.py").read_text()
        for mark, page in linked(section):
            assert f"<!-- {mark}: begin -->" in page.read_text(), f"{page.name}: no section {mark}"
            assert f'"{mark}"' in source, f"{name} writes no section {mark}"
        assert set(re.findall(r"`(\w+\.\w+)`", result + section)) <= set(INDEX), name


def test_no_script_imports_a_script() -> None:
    for path in FOLDER.rglob("*.py"):
        imported = re.findall(r"(?:from|import) benchmarks\.(\w+)", path.read_text())
        assert set(imported) <= {"common"}, path
        assert ast.get_docstring(ast.parse(path.read_text())), path


def test_scripts_and_results_that_a_text_names_are_there() -> None:
    pages = {*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *FOLDER.rglob("*.py")}
    # These two tell what was there at the time.
    for page in pages - {ROOT / "CHANGELOG.md", ROOT / "docs" / "log.md"}:
        for room, script, path in RUN.findall(page.read_text()):
            target = path or f"{room}/{script}.py"
            assert (FOLDER / target).is_file(), f"{page.name}: no benchmarks/{target}"
