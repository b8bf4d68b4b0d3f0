"""The tables of the pages are those that the scripts make of the results."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("script", "page"),
    [
        ("methods_report", "docs/tables/methods.md"),
        ("quality_report", "docs/tables/quality4bit.md"),
        ("readme_table", "README.md"),
    ],
)
def test_a_page_is_what_its_script_makes_of_the_results(
    tmp_path: Path, script: str, page: str
) -> None:
    shutil.copytree(ROOT / "benchmarks", tmp_path / "benchmarks")
    shutil.copytree(ROOT / "docs", tmp_path / "docs")
    shutil.copy(ROOT / "README.md", tmp_path)
    before = (tmp_path / page).stat().st_mtime_ns
    command = [sys.executable, "-m", f"benchmarks.quality.{script}"]
    subprocess.run(command, check=True, cwd=tmp_path, capture_output=True, timeout=300)
    assert (tmp_path / page).stat().st_mtime_ns > before, "the script wrote nothing"
    assert (tmp_path / page).read_text() == (ROOT / page).read_text()
