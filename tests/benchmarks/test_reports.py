"""The tables of the pages are those that the scripts make of the results."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


PAGES = {
    "methods_report": ("docs/tables/methods.md", "docs/tables/methods_text.md"),
    "quality_report": ("docs/tables/quality4bit.md",),
    "readme_table": ("README.md",),
}
# One process for all scripts, each run as `python -m benchmarks.quality.NAME`.
PROGRAM = """\
import runpy, sys
for script in sys.argv[1:]:
    runpy.run_module(f"benchmarks.quality.{script}", run_name="__main__")
"""


@pytest.mark.slow
def test_pages_are_what_their_scripts_make_of_the_results(tmp_path: Path) -> None:
    shutil.copytree(ROOT / "benchmarks", tmp_path / "benchmarks")
    shutil.copytree(ROOT / "docs", tmp_path / "docs")
    shutil.copy(ROOT / "README.md", tmp_path)
    pages = [page for written in PAGES.values() for page in written]
    before = {page: (tmp_path / page).stat().st_mtime_ns for page in pages}
    command = [sys.executable, "-c", PROGRAM, *PAGES]
    subprocess.run(command, check=True, cwd=tmp_path, capture_output=True, timeout=300)
    for page, time in before.items():
        assert (tmp_path / page).stat().st_mtime_ns > time, f"nothing was written to {page}"
        assert (tmp_path / page).read_text() == (ROOT / page).read_text(), page
