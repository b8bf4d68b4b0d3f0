"""SHA-256 of a file while other things are done."""

from __future__ import annotations

import hashlib
import mmap
import threading
from pathlib import Path

# Bytes between two looks at the interpreter, which hands itself over every few milliseconds only.
STRIDE = 64 * 2**20


class Digest:
    """SHA-256 of a file's bytes, found by a thread of its own; `stop` where nobody asks for it."""

    def __init__(self, path: Path) -> None:
        self._path, self._stopped = path, threading.Event()
        self._found: str | Exception | None = None
        self._thread = threading.Thread(target=self._run, name=f"sha256 {path.name}", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        state = hashlib.sha256()
        try:
            with (
                open(self._path, "rb") as file,
                mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped,
                memoryview(mapped) as whole,
            ):
                for start in range(0, len(whole), STRIDE):
                    if self._stopped.is_set():
                        return
                    with whole[start : start + STRIDE] as part:
                        state.update(part)
                        size = len(part)
                    # Pages that were read count as the process's memory; Windows has no such call.
                    if hasattr(mmap, "MADV_DONTNEED"):
                        mapped.madvise(mmap.MADV_DONTNEED, start, size)
            self._found = state.hexdigest()
        except (OSError, ValueError) as error:  # ValueError: nothing to map
            self._found = error

    def result(self) -> str:
        """In hex, once it is there. Raises `OSError` for a file that cannot be read, `ValueError`
        for an empty one."""
        self._thread.join()
        assert self._found is not None, "stopped before it was asked for"
        if isinstance(self._found, Exception):
            raise self._found
        return self._found

    def stop(self) -> None:
        """Read no further."""
        self._stopped.set()
