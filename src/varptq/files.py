"""Writing that leaves the old file, the new file, or nothing, but never half of one.

`write_atomic` does it for one file, `StagedFolder` for a folder: everything is written under a
hidden temporary name beside the target, forced to the disk, and renamed at the end. An exception
of any kind, Ctrl-C included, removes the temporary; a failed write raises `OutputError`. A process
that is killed outright may leave a hidden ".varptq-*" beside the target. Reading and file formats
are not here.
"""

from __future__ import annotations

import errno
import os
import secrets
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

from safetensors import SafetensorError

from varptq.errors import OutputError

# safetensors reports a full disk as an error of its own.
_WRITE_ERRORS = (OSError, SafetensorError)
_DISK_FULL = {errno.ENOSPC, errno.EDQUOT}
# Some network file systems refuse fsync on a folder; there is nothing better to do there.
_NO_FOLDER_SYNC = {errno.EINVAL, errno.ENOTSUP}


def write_atomic(path: str | Path, content: bytes | Callable[[BinaryIO], object]) -> None:
    """Write `content` (bytes, or a function that writes to the open binary file) in one step.

    Missing parent folders are made; an existing file is replaced; a symbolic link is followed.
    Raises `OutputError` if the file cannot be written or `path` is no ordinary file; what else
    `content` raises passes through. In both cases an existing file keeps its old content.
    """
    target = Path(os.path.realpath(path))
    with _as_output_error(target):
        if target.exists() and not target.is_file():
            raise OutputError(f"{target}: is not an ordinary file; give the name of a file")
        target.parent.mkdir(parents=True, exist_ok=True)
    with _as_output_error(target, inside=target.parent):
        temporary = _sibling(target, "tmp")
        try:
            with open(temporary, "xb") as file:
                if isinstance(content, bytes):
                    file.write(content)
                else:
                    content(file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, target)
        finally:
            with suppress(OSError):
                temporary.unlink(missing_ok=True)
        _sync_folder(target.parent)


class StagedFolder:
    """A folder that appears whole or not at all.

        with StagedFolder("out/model") as folder:
            (folder / "config.json").write_text(...)

    `folder` is a temporary sibling of the target, renamed when the block ends without an exception.
    Entering makes the temporary, so a place that cannot be written to is refused before the work.

    force: an existing folder that is not empty is refused without it, and with it replaced at the
        very end. A folder that holds the working or the home folder is never replaced.
    marker: with force, replace only a folder that holds a file of this name, e.g. "config.json", so
        that a mistyped path does not delete something else.

    Raises `OutputError` where the target cannot be written or must not be replaced. Errors that
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

    def _refuse_occupied(self) -> None:
        target = self.target
        if not target.exists():
            return
        if not target.is_dir():
            raise OutputError(f"{target}: is a file, expected a folder; choose another name")
        if not any(target.iterdir()):
            return
        if not self.force:
            raise OutputError(
                f"{target}: exists and is not empty; choose another folder or force=True (--force)"
            )
        if any(place.is_relative_to(target) for place in (Path.cwd(), Path.home())):
            raise OutputError(
                f"{target}: holds the working or the home folder and is not replaced; "
                "choose another folder"
            )
        if self.marker is not None and not (target / self.marker).is_file():
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
        if self.target.exists():
            self._swap()
        else:
            os.replace(self._staging, self.target)
        _sync_folder(self.target.parent)

    def _swap(self) -> None:
        """A folder cannot be renamed onto a full one, so the old one steps aside for a moment."""
        retired = _sibling(self.target, "old")
        try:
            os.replace(self.target, retired)
            os.replace(self._staging, self.target)
        finally:
            if retired.exists() and not self.target.exists():
                os.replace(retired, self.target)
            # Not reached if the line above fails: then `retired` is the only copy.
            shutil.rmtree(retired, ignore_errors=True)


def _sibling(target: Path, kind: str) -> Path:
    """A new hidden name beside the target; not made from its name, which may fill the limit."""
    return target.parent / f".varptq-{secrets.token_hex(8)}.{kind}"


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
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
    """Turn a failed write into an `OutputError`; with `inside`, only one that concerns it."""
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


def _output_error(target: Path, error: OSError | SafetensorError) -> OutputError:
    reason = getattr(error, "strerror", None) or error
    full = getattr(error, "errno", None) in _DISK_FULL or "No space left" in str(error)
    remedy = "free some space or choose another disk" if full else "choose another place"
    return OutputError(f"{target}: cannot be written ({reason}); {remedy}")
