"""The hash of a file from a thread of its own."""

from __future__ import annotations

import hashlib
import mmap
import os
from pathlib import Path

import pytest

from varptq.artifact import digest
from varptq.artifact.digest import Digest

PAGE = mmap.ALLOCATIONGRANULARITY


@pytest.mark.parametrize("size", [1, PAGE - 1, PAGE, PAGE + 1, 2 * PAGE, 5 * PAGE + 7])
def test_whatever_the_strides_the_hash_is_that_of_the_bytes(
    size: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(digest, "STRIDE", 2 * PAGE)
    path = tmp_path / "file"
    path.write_bytes(bytes(i * i % 251 for i in range(size)))
    assert Digest(path).result() == hashlib.sha256(path.read_bytes()).hexdigest()


def test_a_system_without_advice_on_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As Windows is."""
    monkeypatch.delattr(mmap, "MADV_DONTNEED")
    path = tmp_path / "file"
    path.write_bytes(b"bytes")
    assert Digest(path).result() == hashlib.sha256(b"bytes").hexdigest()


def test_what_cannot_be_read_is_said_when_it_is_asked_for(tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.touch()
    for path, error in ((tmp_path / "missing", FileNotFoundError), (empty, ValueError)):
        found = Digest(path)
        with pytest.raises(error):
            found.result()


def test_nothing_more_is_read_once_it_is_stopped(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.touch()
    os.truncate(path, 2**36)  # without blocks on the disk; minutes to hash
    found = Digest(path)
    found.stop()
    with pytest.raises(AssertionError, match="stopped before"):
        found.result()
