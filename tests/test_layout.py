"""Tests stand where what they test stands: tests/<part>/ mirrors src/varptq/<part>/."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[1] / "src" / "varptq"
TESTS = Path(__file__).parent

MAX_LINES = 400
# Folders of tests that mirror none of src, and what they hold instead.
OTHER_TESTS = {
    "benchmarks": "the scripts of benchmarks/",
    "examples": "the scripts of examples/",
    "integrations": "the packs of integrations/",
    "golden": "numbers of the papers' own implementations",
    "helpers": "what several test files share",
    "robustness": "hostile files, failing machines, hard surroundings: across all parts",
}
# Files of tests at the top that are about no module.
OTHER_TEST_FILES = {"test_architecture", "test_docs", "test_layout", "test_links"}


def misplaced_tests(files: set[str], modules: set[str]) -> Iterator[str]:
    """Paths of tests, below tests/, whose folder mirrors none of src/varptq, or that stand at the
    top without being about a module there; `modules`: files and folders below src/varptq."""
    for file in sorted(files):
        *folders, name = file.removesuffix(".py").split("/")
        if folders and folders[0] not in OTHER_TESTS and "/".join(folders) not in modules:
            yield f"{file}: src/varptq has no {'/'.join(folders)}"
        top = f"{name.removeprefix('test_')}.py" in modules or name in OTHER_TEST_FILES
        if not folders and name.startswith("test_") and not top:
            yield f"{file}: src/varptq has no module of this name"
        if not folders and not name.startswith("test_") and name != "conftest":
            yield f"{file}: belongs into tests/helpers"


def test_tests_mirror_the_source() -> None:
    modules = {str(p.relative_to(SOURCE)) for p in SOURCE.rglob("*")}
    files = {str(p.relative_to(TESTS)) for p in TESTS.rglob("*.py")}
    assert not list(misplaced_tests(files, modules))
    assert all((TESTS / name).is_dir() for name in OTHER_TESTS)


def test_a_misplaced_test_is_seen() -> None:
    modules = {"models", "models/var.py", "files.py"}
    right = {"conftest.py", "test_files.py", "models/test_var.py", "golden/test_var.py"}
    assert not list(misplaced_tests(right, modules))
    wrong = {"test_var.py", "model/test_var.py", "models/var/test_var.py", "oracle.py"}
    assert len(list(misplaced_tests(wrong, modules))) == len(wrong)


def test_no_test_file_is_too_long_to_read() -> None:
    lengths = {p: len(p.read_text().splitlines()) for p in TESTS.rglob("*.py")}
    assert not {p.name: n for p, n in lengths.items() if n > MAX_LINES}


@pytest.mark.skipif("PYTEST_XDIST_WORKER" not in os.environ, reason="only workers share out tests")
@pytest.mark.xdist_group("layout")
def test_groups_stay_on_one_worker(request: pytest.FixtureRequest) -> None:
    """By the ending of the name, which pytest-xdist writes: without it every fixture of a group is
    made by every worker, and nothing else would tell."""
    if request.config.getoption("loadgroup", False):
        assert request.node.nodeid.endswith("@layout")
