"""The build of the native core: what it says without a compiler, and that a stale library is not
used."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from varptq.native import binding, build


def test_without_a_compiler_the_build_says_so_in_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert build.main([]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "no C++ compiler (no-such-compiler)" in error


@pytest.fixture
def loading(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A path that the binding takes for the library's; what it remembers is forgotten."""
    monkeypatch.setattr(build, "LIBRARY", tmp_path / "_core.so")
    binding.forget()
    return tmp_path / "_core.so"


@pytest.fixture(autouse=True)
def _forget_afterwards() -> Iterator[None]:
    yield
    binding.forget()


def test_a_missing_library_is_a_reason_not_an_error(loading: Path) -> None:
    assert binding.core() is None
    assert "not built: run `python -m varptq.native.build`" in binding.reason()


def test_a_file_that_is_no_library_is_a_reason_not_an_error(loading: Path) -> None:
    loading.write_bytes(b"\x7fELF but not really")
    assert binding.core() is None
    assert "cannot be loaded" in binding.reason()


@pytest.mark.native
def test_a_library_of_other_sources_is_not_used(
    loading: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    built = Path(build.__file__).parent / "_core.so"
    if not built.exists():
        pytest.skip("the native core is not built")
    shutil.copy(built, loading)
    monkeypatch.setattr(build, "source_hash", lambda: "0123456789abcdef")
    assert binding.core() is None
    assert "built from other sources" in binding.reason()
