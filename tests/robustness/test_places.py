"""Where results are asked to go: mounts, links, the working folder, file systems of all kinds."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from varptq import artifact
from varptq.cli.compared import Models
from varptq.cli.exported import Export, Exported
from varptq.cli.generate import Files
from varptq.cli.quantize import work_folder
from varptq.errors import ArtifactError, OutputError
from varptq.files import StagedFolder, is_whole, write_atomic
from varptq.models.pipeline import Pipeline
from varptq.work import Piece, Work

SRC = Path(__file__).parents[2] / "src"
MOUNTS = """
import os, subprocess, sys
from pathlib import Path
from varptq.errors import OutputError
from varptq.files import StagedFolder

def mount(name, *words):
    Path(name).mkdir()
    subprocess.run(["mount", *words, name], check=True)
    return Path(name)

def fill(target, content, **options):
    with StagedFolder(target, marker="config.json", **options) as folder:
        (folder / "config.json").write_text(content)
        (folder / "sub").mkdir()
        (folder / "sub" / content).write_text(content)

def refused(*words, **options):
    try:
        fill(*words, **options)
    except OutputError as error:
        return str(error)
    raise AssertionError("was not refused")

Path("host").mkdir()
volume = mount("volume", "-t", "tmpfs", "tmpfs")
(volume / "lost+found").mkdir()
(volume / ".varptq-work").mkdir()
(volume / ".varptq-work" / "piece").write_text("kept")
bound = mount("bound", "--bind", "host")
for target, besides in ((volume, {"lost+found", ".varptq-work"}), (bound, set())):
    fill(target, "one")
    assert "not empty" in refused(target, "two")
    assert (target / "config.json").read_text() == "one"
    fill(target, "two", force=True)
    assert set(os.listdir(target)) == {"config.json", "sub"} | besides, os.listdir(target)
    assert os.listdir(target / "sub") == ["two"]
readonly = mount("readonly", "-t", "tmpfs", "-o", "ro", "tmpfs")
assert "Read-only" in refused(readonly, "x") and "Read-only" in refused(readonly / "new", "x")
print("done")
"""


FULL = """
import os, subprocess
from pathlib import Path
import numpy as np
from varptq.errors import OutputError
from varptq.evaluate.image_files import write_npz

small = Path("small")
small.mkdir()
subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", "small"], check=True)
images = np.ones((100, 64, 64, 3), np.uint8)
try:
    write_npz(small / "x.npz", 100, [(np.arange(100), images, np.arange(100))])
except OutputError as error:
    assert "No space left" in str(error)
assert not os.listdir(small)
print("done")
"""


def with_mounts(script: str, folder: Path) -> None:
    """Run where this process may mount; the script prints "done" at its end."""
    own = ["unshare", "-rm"]
    if shutil.which("unshare") is None or subprocess.run([*own, "true"], check=False).returncode:
        pytest.skip("no user namespaces here")
    done = subprocess.run(
        [*own, sys.executable, "-c", script],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(SRC)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.stdout == "done\n", (done.returncode, done.stderr)


def test_mount_points(tmp_path: Path, counted: Callable[[], None]) -> None:
    """Volumes, with what a disk holds at its root; bind mounts; read-only ones."""
    for _ in range(3):
        counted()
    with_mounts(MOUNTS, tmp_path)


@pytest.mark.slow
def test_a_disk_that_is_full_under_an_npz(tmp_path: Path, counted: Callable[[], None]) -> None:
    """Under a mapping it would end the process without an exception."""
    counted()
    with_mounts(FULL, tmp_path)


def fill(target: Path, content: bytes, **options: Any) -> None:
    with StagedFolder(target, **options) as folder:
        (folder / "config.json").write_bytes(content)
        (folder / "sub").mkdir()
        (folder / "sub" / "x").write_bytes(content)


def content(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


OLD = {"config.json": b"old", "extra": b"old"}
NEW = {"config.json": b"new", "sub/x": b"new"}


@pytest.fixture
def mounted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A full folder that cannot be renamed over."""
    target = tmp_path / "out"
    target.mkdir()
    for name, value in OLD.items():
        (target / name).write_bytes(value)
    real = os.rename

    def busy(source: Path, place: Path) -> None:
        if Path(place) == target:
            raise OSError(errno.EBUSY, "busy")
        real(source, place)

    monkeypatch.setattr(os, "rename", busy)
    return target


@pytest.mark.parametrize("code", [errno.EBUSY, errno.EXDEV, errno.EACCES, errno.EPERM])
def test_a_rename_that_is_refused_late(
    code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, counted: Callable[[], None]
) -> None:
    """Mounted on meanwhile, or of a lower layer of an overlay: its files are exchanged instead."""
    counted()
    target, real = tmp_path / "out", os.replace
    fill(target, b"old")

    def refused(source: Path, place: Path) -> None:
        if target in (Path(source), Path(place)):
            raise OSError(code, "refused")
        real(source, place)

    monkeypatch.setattr(os, "replace", refused)
    fill(target, b"new", force=True)
    assert content(tmp_path) == {f"out/{name}": value for name, value in NEW.items()}


def test_a_parent_that_is_not_ours(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, counted: Callable[[], None]
) -> None:
    counted()
    target, real = tmp_path / "out", os.mkdir
    target.mkdir()

    def guarded(path: Path, *args: Any, **extra: Any) -> None:
        if Path(path).parent == tmp_path:
            raise OSError(errno.EACCES, "denied", str(path))
        real(path, *args, **extra)

    monkeypatch.setattr(os, "mkdir", guarded)
    fill(target, b"new")
    assert content(target) == NEW


def test_a_fault_at_any_step_of_filling_in_place(
    mounted: Path, monkeypatch: pytest.MonkeyPatch, counted: Callable[[], None]
) -> None:
    """One failed step puts the old content back; a run that is killed leaves the marker, by which
    readers and the next run know."""
    real = os.replace
    for killed in (False, True):
        for place in range(4):
            counted()
            calls = []

            def broken(
                *args: Any, killed: bool = killed, place: int = place, calls: list[int] = calls
            ) -> None:
                calls.append(1)
                if len(calls) == place + 1 or (killed and len(calls) > place):
                    raise KeyboardInterrupt
                real(*args)

            monkeypatch.setattr(os, "replace", broken)
            with pytest.raises(KeyboardInterrupt):
                fill(mounted, b"new", force=True, marker="config.json")
            monkeypatch.setattr(os, "replace", real)
            if not killed or place == 0:
                assert is_whole(mounted)
                assert content(mounted) == OLD
                continue
            assert not is_whole(mounted)
            with pytest.raises(ArtifactError, match="not whole"):
                artifact.load(mounted)
            with pytest.raises(OutputError, match="killed run"):
                fill(mounted, b"new")
            fill(mounted, b"new", force=True, marker="config.json")
            assert is_whole(mounted)
            assert NEW.items() <= content(mounted).items()
            shutil.rmtree(mounted)
            mounted.mkdir()
            for name, value in OLD.items():
                (mounted / name).write_bytes(value)


def test_the_working_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, counted: Callable[[], None]
) -> None:
    """A shell that stands there would stand in a folder that is gone."""
    counted()
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    before = here.stat().st_ino
    fill(Path("."), b"new")
    assert content(here) == NEW and here.stat().st_ino == before
    with pytest.raises(OutputError, match="working"):
        fill(Path(), b"newer", force=True)


def test_links_files_and_roots(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, counted: Callable[[], None]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to("folder")
    (tmp_path / "dangling").symlink_to("later")
    (tmp_path / "file").write_bytes(b"")
    for name, place in (("link", "folder"), ("dangling", "later")):
        counted()
        fill(tmp_path / name, b"new")
        assert (tmp_path / name).is_symlink() and content(tmp_path / place) == NEW
    for target, reason in (
        (Path("/"), "not empty"),
        (Path(".."), "not empty"),
        (Path("file"), "is a file"),
        (Path("n" * 300), "too long"),
    ):
        counted()
        with pytest.raises(OutputError, match=reason):
            fill(target, b"new")
    with pytest.raises(OutputError, match="working or the home"):
        fill(Path("/"), b"new", force=True)


def test_where_the_work_folder_lies(
    mounted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, counted: Callable[[], None]
) -> None:
    """Beside the artifact, and inside where nothing beside it is kept."""
    inside = ".varptq-work"
    (tmp_path / "here").mkdir()
    (tmp_path / "deep").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    for out, place in (
        (tmp_path / "new", tmp_path / "new.work"),
        (tmp_path / "deep" / "..", tmp_path / "deep" / ".." / inside),
        (tmp_path / "deep" / "deeper" / "..", tmp_path / "deep.work"),
        (Path(), Path(inside)),
        (Path("/"), Path("/", inside)),
        (mounted, mounted / inside),
    ):
        counted()
        assert work_folder(out) == place


def test_a_work_folder_of_something_else_is_left_alone(
    tmp_path: Path, counted: Callable[[], None]
) -> None:
    counted()
    (tmp_path / "var.safetensors").write_bytes(b"mine")
    with pytest.raises(OutputError, match=r"holds 'var\.safetensors'"), Work(tmp_path):
        pass
    assert content(tmp_path) == {"var.safetensors": b"mine"}


@pytest.mark.parametrize("name", ["lock", "work.json"])
def test_a_folder_that_only_looks_like_a_work_folder_is_left_alone(
    name: str, tmp_path: Path, counted: Callable[[], None]
) -> None:
    """A file of another program that has the name of one of ours."""
    counted()
    theirs = {name: b"theirs", "notes.txt": b"mine"}
    for file, text in theirs.items():
        (tmp_path / file).write_bytes(text)
    with pytest.raises(OutputError, match=r"holds 'notes\.txt'"), Work(tmp_path):
        pass
    assert content(tmp_path) == theirs


def test_files_that_come_into_a_work_folder_meanwhile_stay(
    tmp_path: Path, counted: Callable[[], None]
) -> None:
    counted()
    for begun in (True, False):
        with Work(tmp_path / "w") as work:
            if begun:
                work.begin({"of": "a test"}, lambda stage, done, total, info="": None)
                work.write("piece", Piece({"x": torch.arange(3)}))
            (tmp_path / "w" / "notes.txt").write_bytes(b"mine")
            if begun:
                work.remove()
        assert content(tmp_path / "w") == {"notes.txt": b"mine"}
        (tmp_path / "w" / "notes.txt").unlink()


@pytest.mark.parametrize("code", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP])
def test_a_file_system_without_locks(
    code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, counted: Callable[[], None]
) -> None:
    """It is used all the same, and the run says that it excludes nobody."""
    counted()

    def none(*_: object) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr("fcntl.flock", none)
    said: list[str] = []
    with Work(tmp_path / "w") as work:
        work.begin({"of": "a test"}, lambda stage, done, total, info="": said.append(info))
        assert work.once("piece", lambda: Piece({"x": torch.arange(3)})).tensors
    assert "without a lock" in said[-1]


@pytest.mark.parametrize("code", [errno.EINVAL, errno.ENOTSUP, errno.ENOSYS])
def test_a_file_system_without_fsync(
    code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, counted: Callable[[], None]
) -> None:
    counted()

    def none(_: int) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "fsync", none)
    fill(tmp_path / "out", b"new")
    write_atomic(tmp_path / "file", b"new")
    assert content(tmp_path / "out") == NEW


def test_two_runs_of_generate_in_one_folder(tmp_path: Path, counted: Callable[[], None]) -> None:
    counted()
    first, second = Files.plan(tmp_path, ["cat"]), Files.plan(tmp_path, ["dog"])
    with first.claimed(force=False):
        for force in (False, True):
            with pytest.raises(OutputError, match="is writing it"), second.claimed(force):
                pass
        with Files.plan(tmp_path / "other.png", ["cat"]).claimed(force=False):
            pass
    assert not list(tmp_path.iterdir())
    with second.claimed(force=False):
        pass


def test_what_evaluate_would_refuse_at_the_end(
    tiny: Pipeline, tmp_path: Path, counted: Callable[[], None]
) -> None:
    counted()
    (tmp_path / "report.html").mkdir()
    with pytest.raises(OutputError, match="not an ordinary file"):
        Exported(None, tmp_path).check(Models(tiny))
    (tmp_path / "report.html").rmdir()
    (tmp_path / "float").mkdir()
    (tmp_path / "float" / "mine.txt").write_bytes(b"mine")
    Exported(None, tmp_path).check(Models(tiny))
    with pytest.raises(OutputError, match=r"holds no 000000\.png"):
        Exported(Export.png, tmp_path).check(Models(tiny))
    assert content(tmp_path) == {"float/mine.txt": b"mine"}
