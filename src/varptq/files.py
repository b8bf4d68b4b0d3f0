"""Writing that leaves the old file, the new file, or nothing, but never half a file.

`write_atomic` does it for one file, `StagedFolder` for a folder: everything is written under a
hidden temporary name beside the target, forced to the disk, and renamed at the end. An exception
of any kind, Ctrl-C included, removes the temporary; a failed write raises `OutputError`. A process
that is killed outright may leave a hidden ".varptq-*" beside the target.

A folder that cannot be replaced by a rename (a mount point, the working folder, one whose parent we
may not write to) is filled in place: the temporary lies inside it, and its files are moved up at
the end. Meanwhile a file `UNFINISHED` tells readers that the folder is not whole.
Reading and file formats are elsewhere.
"""

from __future__ import annotations

import errno
import os
import secrets
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

from safetensors import SafetensorError

from varptq.errors import OutputError

# safetensors reports a full disk as an error of its own.
_WRITE_ERRORS = (OSError, SafetensorError)
_DISK_FULL = {errno.ENOSPC, errno.EDQUOT}
# Answers of file systems without fsync, or without fsync of folders; these errors are ignored.
_NO_SYNC = {errno.EINVAL, errno.ENOTSUP, errno.ENOSYS, errno.EBADF}
# A folder that one may write to but not list cannot be opened for fsync.
_NO_FOLDER_SYNC = _NO_SYNC | {errno.EACCES, errno.EPERM}
# Errors of renaming a folder over another: a mount, an overlay layer, a parent of another user.
_NOT_RENAMED = {errno.EBUSY, errno.EXDEV, errno.EACCES, errno.EPERM, errno.EROFS}
_NOT_EMPTY = {errno.ENOTEMPTY, errno.EEXIST}

# Prefix of all our hidden names; a folder that holds nothing else counts as empty.
PREFIX = ".varptq-"
# Lies in a folder while it is filled in place, and stays if the process is killed meanwhile.
UNFINISHED = f"{PREFIX}unfinished"
# Entries at the root of a fresh disk.
_OF_THE_DISK = {"lost+found"}


def write_atomic(path: str | Path, content: bytes | Callable[[BinaryIO], object]) -> None:
    """Write `content` (bytes, or a function that writes to the open binary file) in one step.

    Missing parent folders are made; an existing file is replaced; a symbolic link is followed.
    Raises `OutputError` if the file cannot be written or `path` is not an ordinary file; other
    exceptions of `content` pass through. In both cases an existing file keeps its old content.
    """
    target = _file_target(path)
    with _as_output_error(target, inside=target.parent):
        temporary = _sibling(target, "tmp")
        try:
            with open(temporary, "xb") as file:
                if isinstance(content, bytes):
                    file.write(content)
                else:
                    content(file)
                file.flush()
                fsync(file.fileno())
            os.replace(temporary, target)
        finally:
            with suppress(OSError):
                temporary.unlink(missing_ok=True)
        _sync_folder(target.parent)


def check_file(path: str | Path) -> None:
    """Raise `OutputError` now for what `write_atomic` would refuse; creates nothing but missing
    parent folders."""
    target = _file_target(path)
    with _as_output_error(target):
        temporary = _sibling(target, "trial")
        temporary.touch()
        temporary.unlink()


def _file_target(path: str | Path) -> Path:
    target = Path(os.path.realpath(path))
    with _as_output_error(target):
        if target.exists() and not target.is_file():
            raise OutputError(f"{target}: is not an ordinary file; give the name of a file")
        target.parent.mkdir(parents=True, exist_ok=True)
    return target


class StagedFolder:
    """A folder that appears whole or not at all.

        with StagedFolder("out/model") as folder:
            (folder / "config.json").write_text(...)

    `folder` is a temporary beside the target, renamed when the block ends without an exception, or
    inside the target if that cannot be replaced by a rename. Entering makes the temporary and tries
    the rename, so a place that cannot be written to is refused before the work.

    force: replace an existing folder that is not empty, at the very end; without it such a folder
        is refused. A folder that holds the working or the home folder is never replaced.
    marker: with force, replace only a folder that holds a file of this name, e.g. "config.json", so
        that a mistyped path does not delete something else.

    Raises `OutputError` if the target cannot be written or must not be replaced. Errors that
    name a file outside the temporary, and other exceptions of the block, pass through.
    """

    def __init__(
        self, target: str | Path, *, force: bool = False, marker: str | None = None
    ) -> None:
        self.target = Path(os.path.realpath(target))
        self.force = force
        self.marker = marker
        self._staging = _sibling(self.target, "staging")

    def __enter__(self) -> Path:
        with _as_output_error(self.target):
            self._refuse_occupied()
            if self.in_place():
                self._staging = _inside(self.target, "staging")
            else:
                self.target.parent.mkdir(parents=True, exist_ok=True)
            self._staging.mkdir()
        return self._staging

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            if error is None:
                with _as_output_error(self.target):
                    self._publish()
            elif isinstance(error, _WRITE_ERRORS) and _concerns(error, self._staging):
                raise _output_error(self.target, error) from error
        finally:
            shutil.rmtree(self._staging, ignore_errors=True)

    def check(self) -> None:
        """Raise now for what the end of the block would refuse; creates nothing."""
        self.__enter__()
        shutil.rmtree(self._staging, ignore_errors=True)

    def in_place(self) -> bool:
        """Whether the target is a folder that cannot be replaced by a rename. Tried by renaming an
        empty folder onto it, which otherwise fails because the target is not empty. Raises
        `OutputError` for a folder that cannot be written to."""
        target = self.target
        if not target.is_dir():
            return False
        with _as_output_error(target):
            # This also keeps the trial from replacing an empty target.
            content = _inside(target, "trial")
            content.mkdir()
            beside = _sibling(target, "trial")
            try:
                if _holds(target, _working_folder()):
                    return True
                beside.mkdir()
                os.rename(beside, target)
            except OSError as error:
                return error.errno not in _NOT_EMPTY
            finally:
                for folder in (content, beside):
                    with suppress(OSError):
                        folder.rmdir()
        return False

    def _refuse_occupied(self) -> None:
        target = self.target
        if not target.exists():
            return
        if not target.is_dir():
            raise OutputError(f"{target}: is a file, expected a folder; choose another name")
        unfinished = (target / UNFINISHED).exists()
        if not unfinished and not any(_content(target)):
            return
        if not self.force:
            state = "holds files of a killed run" if unfinished else "exists and is not empty"
            raise OutputError(f"{target}: {state}; choose another folder or force=True (--force)")
        if any(_holds(target, place) for place in (_working_folder(), home())):
            raise OutputError(
                f"{target}: holds the working or the home folder and is not replaced; "
                "choose another folder"
            )
        if self.marker is not None and not (unfinished or (target / self.marker).is_file()):
            raise OutputError(
                f"{target}: holds no {self.marker} and is not replaced; "
                "choose another folder or empty this one"
            )

    def _publish(self) -> None:
        for folder, _, names in os.walk(self._staging):
            for name in names:
                _sync(Path(folder, name))
            _sync_folder(Path(folder))
        # Asked again: the target may have been filled while the block ran.
        self._refuse_occupied()
        if self._staging.parent == self.target:
            self._fill()
        elif self.target.exists():
            try:
                self._swap()
            except OSError as error:
                # Something was mounted on it meanwhile, or it is in a lower layer of an overlay.
                if error.errno not in _NOT_RENAMED:
                    raise
                self._fill()
        else:
            os.replace(self._staging, self.target)
        _sync_folder(self.target.parent)

    def _swap(self) -> None:
        """Replace the target; as a folder cannot be renamed onto a full one, the old one moves
        aside first."""
        retired = _sibling(self.target, "old")
        try:
            os.replace(self.target, retired)
            os.replace(self._staging, self.target)
        finally:
            if retired.exists() and not self.target.exists():
                os.replace(retired, self.target)
            # Not reached if the line above fails: then `retired` is the only copy.
            shutil.rmtree(retired, ignore_errors=True)

    def _fill(self) -> None:
        """Replace the content of the target, entry by entry, under the marker `UNFINISHED`; an
        exception restores the old content."""
        target, retired = self.target, _inside(self.target, "old")
        unfinished, was_whole = target / UNFINISHED, is_whole(target)
        new = sorted(entry.name for entry in self._staging.iterdir())
        retired.mkdir()
        try:
            unfinished.touch()
            _sync_folder(target)
            _move([entry.name for entry in _content(target)], target, retired)
            _move(new, self._staging, target)
            _sync_folder(target)
            unfinished.unlink()
        except BaseException:
            # If this fails too, the marker stays, and so does `retired` with the rest.
            moved = [name for name in new if not os.path.lexists(self._staging / name)]
            _move(moved, target, self._staging)
            _move([entry.name for entry in retired.iterdir()], retired, target)
            if was_whole:
                unfinished.unlink(missing_ok=True)
            retired.rmdir()
            raise
        shutil.rmtree(retired, ignore_errors=True)
        _sync_folder(target)


def home() -> Path | None:
    """The user's home folder; None for a user without $HOME and without a passwd entry."""
    try:
        return Path.home()
    except RuntimeError:
        return None


def cache_folder() -> Path | None:
    """Where this user's downloads and features are kept; None for one without a home folder."""
    if found := os.environ.get("XDG_CACHE_HOME"):
        return Path(found, "varptq")
    place = home()
    return None if place is None else place / ".cache" / "varptq"


def is_whole(folder: Path) -> bool:
    """Whether `folder` is complete: no run is filling it in place, or was killed while doing so."""
    return not (folder / UNFINISHED).exists()


@contextmanager
def utf8_name(path: str | Path) -> Iterator[Path]:
    """A name of `path` for libraries that accept only UTF-8: its own, or that of a temporary link
    to it."""
    path = Path(path)
    if _is_utf8(str(path)):
        yield path
        return
    with tempfile.TemporaryDirectory(prefix="varptq-") as folder:
        # Libraries recognise a format by the suffix.
        link = Path(folder, "link" + (path.suffix if _is_utf8(path.suffix) else ""))
        link.symlink_to(os.path.abspath(path))
        yield link


def _is_utf8(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _working_folder() -> Path | None:
    """The working folder; None if it was removed."""
    try:
        return Path.cwd()
    except FileNotFoundError:
        return None


def _holds(folder: Path, place: Path | None) -> bool:
    return place is not None and place.is_relative_to(folder)


def _content(folder: Path) -> Iterator[Path]:
    """The entries of a folder, without our hidden files and those of a fresh disk."""
    passed = _OF_THE_DISK if os.path.ismount(folder) else set()
    for entry in folder.iterdir():
        if not entry.name.startswith(PREFIX) and entry.name not in passed:
            yield entry


def _move(names: Sequence[str], source: Path, target: Path) -> None:
    for name in names:
        try:
            os.replace(source / name, target / name)
        except OSError as error:
            if error.errno != errno.EXDEV:
                raise
            shutil.move(source / name, target / name)


def _sibling(target: Path, kind: str) -> Path:
    """A new hidden name beside the target, independent of its name, which may be as long as
    allowed."""
    return _inside(target.parent, kind)


def _inside(folder: Path, kind: str) -> Path:
    return folder / f"{PREFIX}{secrets.token_hex(8)}.{kind}"


def fsync(descriptor: int) -> None:
    """Flush a file to its disk; nothing where the file system cannot."""
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in _NO_SYNC:
            raise


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        fsync(descriptor)
    finally:
        os.close(descriptor)


def _sync_folder(folder: Path) -> None:
    """Make a rename inside `folder` survive a power cut."""
    try:
        _sync(folder)
    except OSError as error:
        if error.errno not in _NO_FOLDER_SYNC:
            raise


@contextmanager
def _as_output_error(target: Path, inside: Path | None = None) -> Iterator[None]:
    """Turn a failed write into an `OutputError`; with `inside`, only if it concerns that folder."""
    try:
        yield
    except _WRITE_ERRORS as error:
        if inside is not None and not _concerns(error, inside):
            raise
        raise _output_error(target, error) from error


def _concerns(error: OSError | SafetensorError, folder: Path) -> bool:
    """Whether the error is about `folder`: a failed write names no file, a failed open its own."""
    named = getattr(error, "filename", None)
    return not isinstance(named, str | os.PathLike) or Path(named).is_relative_to(folder)


def is_disk_full(error: Exception) -> bool:
    """Whether a write failed because the disk, or the user's share of it, is full."""
    return getattr(error, "errno", None) in _DISK_FULL or "No space left" in str(error)


def _output_error(target: Path, error: OSError | SafetensorError) -> OutputError:
    reason = getattr(error, "strerror", None) or error
    remedy = "free some space or choose another disk"
    if not is_disk_full(error):
        remedy = "choose another place"
    return OutputError(f"{target}: cannot be written ({reason}); {remedy}")
