"""One process at a time: an advisory lock on a file.

The system releases the lock however its holder ends, so no stale lock remains. Some file systems
(network and user-space ones) have no locks: there every process gets the lock, and `Lock.kept` is
False. The callers decide what a lock protects.
"""

from __future__ import annotations

import errno
import os
from contextlib import suppress
from pathlib import Path
from typing import Self

# Answers of flock if another process holds the lock; any other error means "no locks here".
_HELD = {errno.EWOULDBLOCK, errno.EAGAIN, errno.EACCES}


class HeldError(Exception):
    """Another process has the lock; `owner` is its process id, or "?"."""

    def __init__(self, owner: str) -> None:
        super().__init__(owner)
        self.owner = owner


class Lock:
    """A lock on the file `path`, which is created if missing. `kept`: whether it excludes others.

    Raises `HeldError` if another process has it, `OSError` if the file cannot be created.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._descriptor = _taken(path)
        while self._descriptor is not None and not _is_at(self._descriptor, path):
            # The last holder removed the file after we opened and before we locked it.
            os.close(self._descriptor)
            self._descriptor = _taken(path)
        self.kept = self._descriptor is not None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()

    def release(self, *, remove: bool = True) -> None:
        """Release it; the file is removed first, while the lock is ours."""
        if self._descriptor is None:
            return
        if remove:
            with suppress(OSError):
                self.path.unlink()
        os.close(self._descriptor)
        self._descriptor = None


def _taken(path: Path) -> int | None:
    """A descriptor that holds the lock until it is closed or the process ends; None if the file
    system has no locks."""
    import fcntl  # not on Windows

    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        owner = os.read(descriptor, 20).decode(errors="replace").strip()
        os.close(descriptor)
        if error.errno in _HELD:
            raise HeldError(owner or "?") from None
        return None
    # The process id is for `HeldError`; the lock works without it, as on a full disk.
    with suppress(OSError):
        os.truncate(descriptor, 0)
        os.write(descriptor, str(os.getpid()).encode())
    return descriptor


def _is_at(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path))
    except FileNotFoundError:
        return False
