"""Tensors on mapped files, whose pages are memory that the system can have back.

What was read of a file counts as memory of the process until the system wants it. A process that
reads a file larger than memory once says itself what it is done with.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import re
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from varptq.errors import OutputError
from varptq.files import utf8_name

SMAPS = Path("/proc/self/smaps")
# The line of a mapping whose last column is a path, so that its pages can be read again; and how
# much of it is not the file's any more, because somebody has written to it.
MAPPING = re.compile(r"([0-9a-f]+)-([0-9a-f]+) \S+ \S+ \S+ [1-9]\d* +/")
WRITTEN = re.compile(r"Anonymous: +(\d+) kB")


class FilePages:
    """The files that this process has mapped and not written to, as of the first `release`; none
    where the system does not say."""

    @cached_property
    def _ranges(self) -> list[tuple[int, int]]:
        found, last = list[tuple[int, int]](), None
        for line in _lines():
            if line[0] in "0123456789abcdef":
                mapping = MAPPING.match(line)
                last = (int(mapping[1], 16), int(mapping[2], 16)) if mapping else None
            elif last is not None and (written := WRITTEN.match(line)) and written[1] == "0":
                found.append(last)
        return found

    def release(self, tensor: Tensor) -> None:
        """Give back the whole pages of a tensor, which is read again where it is used. Nothing
        happens to one that is not on a file."""
        if tensor.device.type != "cpu" or not hasattr(mmap, "MADV_DONTNEED"):
            return
        first = tensor.data_ptr()
        start = first + -first % mmap.PAGESIZE
        length = (first + tensor.nbytes - start) & -mmap.PAGESIZE
        if length > 0 and any(
            low <= start and start + length <= high for low, high in self._ranges
        ):
            libc = ctypes.CDLL(None)
            libc.madvise(ctypes.c_void_p(start), ctypes.c_size_t(length), mmap.MADV_DONTNEED)


def mapped_empty(path: Path, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """A tensor on a new file. Raises `OutputError` where its folder has too little room."""
    numel = int(torch.Size(shape).numel())
    _reserve(path, numel * dtype.itemsize)
    with utf8_name(path) as file:
        return torch.from_file(str(file), shared=True, size=numel, dtype=dtype).view(shape)


def _reserve(path: Path, size: int) -> None:
    """A file with all its blocks allocated: writing to a mapped file on a full disk would kill the
    process without an exception."""
    try:
        with path.open("wb") as file:
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(file.fileno(), 0, max(size, 1))
    except OSError as error:
        raise OutputError(
            f"spool_dir {path.parent.parent}: cannot take {size / 2**30:.1f} GiB "
            f"({error.strerror}); give another folder or take fewer samples"
        ) from None


def _lines() -> list[str]:
    try:
        return SMAPS.read_text().splitlines()
    except OSError:
        return []
