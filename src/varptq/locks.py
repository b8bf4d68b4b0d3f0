"""One process at a time: an advisory lock on a file.

The system gives the lock back however its holder ends, so nothing stale is ever in the way. A file
system without locks (some network and user-space ones) cannot tell who works there: then the lock
is had by everyone, and `Lock.kept` says so. What a lock protects is not decided here.
"""

from __future__ import annotations

import errno
import os
from contextlib import suppress
from pathlib import Path
from typing import Self

# What flock answers where somebody else holds the lock; anything else is "no locks here".
_HELD = {errno.EWOULDBLOCK, errno.EAGAIN, errno.EACCES}


class HeldError(Exception):
    """Another process has the lock; `owner` is its number, or "?"."""

    def __init__(self, owner: str) -> None:
        super().__init__(owner)
        self.owner = owner


class Lock:
    """A lock on the file `path`, made if it is not there. `kept`: whether it excludes others.

    Raises `HeldError` where another process has it, `OSError` where the file cannot be made.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._descriptor = _taken(path)
        while self._descriptor is not None and not _is_at(self._descriptor, path):
            # Its last holder removed the file between our opening and locking it.
            os.close(self._descriptor)
            self._descriptor = _taken(path)
        self.kept = self._descriptor is not None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()

    def release(self, *, remove: bool = True) -> None:
        """Give it back; the file goes first, while it is ours."""
        if self._descriptor is None:
            return
        if remove:
            with suppress(OSError):
                self.path.unlink()
        os.close(self._descriptor)
        self._descriptor = None


def _taken(path: Path) -> int | None:
    """A descriptor that holds the lock until it is closed or its process ends; None without
    locks."""
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
    # The number is for `HeldError`; on a full disk the lock holds without it.
    with suppress(OSError):
        os.truncate(descriptor, 0)
        os.write(descriptor, str(os.getpid()).encode())
    return descriptor


def _is_at(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path))
    except FileNotFoundError:
        return False
