"""Writing is all or nothing: whatever fails, and when, the target is whole and nothing lies beside.

The faults are injected at every call that touches the disk, one test per call: a full disk
(OSError) and Ctrl-C (KeyboardInterrupt). The tests may run as root, to whom no folder is forbidden,
so a place that cannot be written is a path below a file.
"""

from __future__ import annotations

import builtins
import errno
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from varptq.errors import OutputError
from varptq.files import StagedFolder, write_atomic

FAULTS = {
    "disk full": lambda: OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)),
    "ctrl-c": KeyboardInterrupt,
}
# More than any write here makes; the last ones hit nothing and check the undisturbed run.
CALLS = range(8)


@contextmanager
def fault_at(call: int, fault: Callable[[], BaseException]) -> Iterator[list[str]]:
    """Let disk call number `call` raise, before it does its work; yields the calls seen so far."""
    seen: list[str] = []

    def watched(name: str, real: Callable[..., object]) -> Callable[..., object]:
        def wrapper(*args: object, **kwargs: object) -> object:
            seen.append(name)
            if len(seen) == call + 1:
                raise fault()
            return real(*args, **kwargs)

        return wrapper

    with pytest.MonkeyPatch.context() as patch:
        for name in ("fsync", "replace"):
            patch.setattr(os, name, watched(name, getattr(os, name)))
        patch.setattr(builtins, "open", watched("open", builtins.open))
        yield seen


def content_of(folder: Path) -> dict[str, bytes]:
    """Everything below `folder`, hidden names included."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def one_line(error: pytest.ExceptionInfo[OutputError], *parts: str) -> None:
    message = str(error.value)
    assert "\n" not in message
    assert all(part in message for part in parts), message


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("old", [None, b"old"])
def test_a_file_is_old_or_new_wherever_writing_fails(
    tmp_path: Path, old: bytes | None, fault: str, call: int
) -> None:
    target = tmp_path / "result.bin"
    if old is not None:
        target.write_bytes(old)
    failed = False
    with fault_at(call, FAULTS[fault]) as seen:
        try:
            write_atomic(target, b"new")
        except (OutputError, KeyboardInterrupt):
            failed = True
    assert failed == (len(seen) > call)
    assert failed or seen == ["open", "fsync", "replace", "fsync"]
    before = {} if old is None else {"result.bin": old}
    # The last step, fsync of the folder, comes after the rename.
    after_rename = seen.count("replace") == 1 and seen[-1] == "fsync"
    assert content_of(tmp_path) == ({"result.bin": b"new"} if after_rename else before)


def test_the_message_of_a_full_disk_says_what_to_do(tmp_path: Path) -> None:
    with fault_at(1, FAULTS["disk full"]), pytest.raises(OutputError) as error:
        write_atomic(tmp_path / "x.bin", b"new")
    one_line(error, str(tmp_path / "x.bin"), "No space left", "free some space")


def test_a_function_may_write_the_content(tmp_path: Path) -> None:
    write_atomic(tmp_path / "a" / "b" / "x.bin", lambda file: file.write(b"streamed"))
    assert content_of(tmp_path) == {"a/b/x.bin": b"streamed"}


def test_an_error_of_the_content_function_passes_through(tmp_path: Path) -> None:
    (tmp_path / "x.bin").write_bytes(b"old")

    def reads_a_missing_file(file: object) -> None:
        Path("/nonexistent/input").read_bytes()

    with pytest.raises(FileNotFoundError, match="nonexistent"):
        write_atomic(tmp_path / "x.bin", reads_a_missing_file)
    with pytest.raises(ZeroDivisionError):
        write_atomic(tmp_path / "x.bin", lambda file: 1 // 0)
    assert content_of(tmp_path) == {"x.bin": b"old"}


def test_a_new_file_has_the_usual_permissions(tmp_path: Path) -> None:
    write_atomic(tmp_path / "atomic", b"")
    (tmp_path / "plain").write_bytes(b"")
    assert (tmp_path / "atomic").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_a_symbolic_link_is_followed(tmp_path: Path) -> None:
    (tmp_path / "real").write_bytes(b"old")
    (tmp_path / "link").symlink_to("real")
    write_atomic(tmp_path / "link", b"new")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "real").read_bytes() == b"new"


def test_a_name_as_long_as_allowed_can_be_written(tmp_path: Path) -> None:
    name = "n" * os.pathconf(tmp_path, "PC_NAME_MAX")
    write_atomic(tmp_path / name, b"new")
    with StagedFolder(tmp_path / ("f" + name[1:])) as folder:
        (folder / "x").write_bytes(b"x")
    assert len(content_of(tmp_path)) == 2


@pytest.mark.parametrize("target", ["file/child", "file/deep/child"])
def test_a_place_that_cannot_be_written_is_refused(tmp_path: Path, target: str) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(OutputError) as error:
        write_atomic(tmp_path / target, b"new")
    one_line(error, str(tmp_path / target), "cannot be written")
    entered = False
    with pytest.raises(OutputError) as error, StagedFolder(tmp_path / target):
        entered = True
    one_line(error, str(tmp_path / target), "cannot be written")
    assert not entered


@pytest.mark.parametrize("target", [".", os.devnull])
def test_a_path_that_is_no_ordinary_file_is_refused(target: str) -> None:
    with pytest.raises(OutputError) as error:
        write_atomic(target, b"new")
    one_line(error, "not an ordinary file")


def fill(folder: Path) -> None:
    (folder / "config.json").write_bytes(b"new")
    (folder / "sub").mkdir()
    (folder / "sub" / "data.bin").write_bytes(b"new")


NEW = {"model/config.json": b"new", "model/sub/data.bin": b"new"}
OLD = {"model/config.json": b"old", "model/extra.bin": b"old"}


def old_model(tmp_path: Path) -> Path:
    target = tmp_path / "model"
    target.mkdir()
    for name in OLD:
        (tmp_path / name).write_bytes(b"old")
    return target


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("replaces", [False, True])
def test_a_folder_is_old_or_new_wherever_writing_fails(
    tmp_path: Path, replaces: bool, fault: str, call: int
) -> None:
    target = old_model(tmp_path) if replaces else tmp_path / "model"
    failed = False
    with fault_at(call, FAULTS[fault]) as seen:
        try:
            with StagedFolder(target, force=replaces) as folder:
                fill(folder)
        except (OutputError, KeyboardInterrupt):
            failed = True
    assert failed == (len(seen) > call)
    # Two files, two folders; only fsync of the parent comes after the last rename.
    assert failed or seen == ["fsync"] * 4 + ["replace"] * (1 + replaces) + ["fsync"]
    renamed = seen.count("replace") == 1 + replaces and seen[-1] == "fsync"
    assert content_of(tmp_path) == (NEW if renamed else OLD if replaces else {})
    assert [p.name for p in tmp_path.iterdir() if p.name != "model"] == []


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
def test_any_exception_of_the_block_discards_the_folder(
    tmp_path: Path, error: type[BaseException]
) -> None:
    with pytest.raises(error), StagedFolder(tmp_path / "model") as folder:
        fill(folder)
        raise error
    assert list(tmp_path.iterdir()) == []


def test_an_error_about_another_file_passes_through(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError), StagedFolder(tmp_path / "model"):
        (tmp_path / "input").read_bytes()
    with pytest.raises(OutputError), StagedFolder(tmp_path / "model") as folder:
        (folder / "missing" / "x").write_bytes(b"")


def test_a_failed_safetensors_write_is_an_output_error(tmp_path: Path) -> None:
    with pytest.raises(OutputError) as error, StagedFolder(tmp_path / "model") as folder:
        save_file({"x": torch.zeros(3)}, folder / "missing" / "x.safetensors")
    one_line(error, str(tmp_path / "model"), "cannot be written")
    assert list(tmp_path.iterdir()) == []


def test_a_full_folder_is_replaced_by_force_only(tmp_path: Path) -> None:
    target = old_model(tmp_path)
    with pytest.raises(OutputError) as error, StagedFolder(target) as folder:
        fill(folder)
    one_line(error, str(target), "not empty")
    assert content_of(tmp_path) == OLD
    with StagedFolder(target, force=True) as folder:
        fill(folder)
        assert content_of(target) == {name.removeprefix("model/"): b"old" for name in OLD}
    assert content_of(tmp_path) == NEW


def test_an_empty_folder_is_filled_without_force(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    with StagedFolder(tmp_path / "model") as folder:
        fill(folder)
    assert content_of(tmp_path) == NEW


def test_a_folder_filled_meanwhile_is_not_replaced(tmp_path: Path) -> None:
    with pytest.raises(OutputError), StagedFolder(tmp_path / "model") as folder:
        fill(folder)
        old_model(tmp_path)
    assert content_of(tmp_path) == OLD


def test_force_spares_folders_without_the_marker(tmp_path: Path) -> None:
    target = old_model(tmp_path)
    with (
        pytest.raises(OutputError) as error,
        StagedFolder(target, force=True, marker="artifact.json"),
    ):
        pass
    one_line(error, str(target), "holds no artifact.json")
    with StagedFolder(target, force=True, marker="config.json") as folder:
        fill(folder)
    assert content_of(tmp_path) == NEW


@pytest.mark.parametrize("which", ["working", "home", "above"])
def test_force_spares_the_working_and_the_home_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, which: str
) -> None:
    target = old_model(tmp_path)
    if which == "home":
        monkeypatch.setenv("HOME", str(target))
    else:
        monkeypatch.chdir(target)
    with (
        pytest.raises(OutputError) as error,
        StagedFolder(tmp_path if which == "above" else target, force=True),
    ):
        pass
    one_line(error, "not replaced")
    assert content_of(tmp_path) == OLD


def test_a_file_is_not_replaced_by_a_folder(tmp_path: Path) -> None:
    (tmp_path / "model").write_bytes(b"old")
    with pytest.raises(OutputError) as error, StagedFolder(tmp_path / "model", force=True):
        pass
    one_line(error, "is a file, expected a folder")
