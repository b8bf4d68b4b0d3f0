"""Memory that large maps leave and the next ones take.

    room = Room()
    y = room.empty((1, 256, 256, 160))      as torch.empty, until every tensor on it is gone

The system gives fresh memory page by page and clears each: for a map of 40 MB that takes a third of
the time of the convolution that fills it. Here a map gets the memory of one that nobody holds any
more, the largest in huge pages where the system has them.
"""

from __future__ import annotations

import math
import mmap
import os
import sys
import threading

import torch
from torch import Tensor

# Below, the allocator of C keeps memory by itself.
LEAST_BYTES = 2**20
# Where processes fork, a child's maps are its own: memory as `mmap` makes it would be its parent's.
_PRIVATE = {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS} if hasattr(mmap, "MAP_PRIVATE") else {}
# Below, huge pages cost more than they save: rows of a Linear's output lie a multiple of a page
# apart, and in one huge page such rows meet in a few sets of the L2 cache.
LEAST_HUGE_BYTES = 2**24
# More than this many times the size would keep memory from the maps that need it.
MOST_WASTE = 2


class Room:
    """Buffers of one decoder. A buffer is free when no tensor refers to it. A copy of a room, here
    or in another process, is an empty one."""

    def __init__(self) -> None:
        self._buffers: list[mmap.mmap] = []

    def __reduce__(self) -> tuple[type[Room], tuple[()]]:
        return Room, ()

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> Tensor:
        """A contiguous CPU tensor with undefined contents."""
        size = math.prod(shape) * dtype.itemsize
        if size < LEAST_BYTES:
            return torch.empty(shape, dtype=dtype, device="cpu")
        with _lock:
            fitting = [b for b in self._free() if size <= len(b) <= MOST_WASTE * size]
            buffer = min(fitting, key=len) if fitting else self._new(size)
            return torch.frombuffer(buffer, dtype=dtype, count=math.prod(shape)).view(shape)

    @property
    def nbytes(self) -> int:
        """What is kept, taken and free."""
        return sum(len(buffer) for buffer in self._buffers)

    def _free(self) -> list[mmap.mmap]:
        # A tensor adds a reference to those of the list, the loop and the call itself.
        return [buffer for buffer in self._buffers if sys.getrefcount(buffer) <= _UNUSED]

    def _new(self, size: int) -> mmap.mmap:
        """Free buffers that are smaller go first: maps have grown."""
        outgrown = {id(buffer) for buffer in self._free() if len(buffer) < size}
        self._buffers = [buffer for buffer in self._buffers if id(buffer) not in outgrown]
        buffer = mmap.mmap(-1, size, **_PRIVATE)
        if size >= LEAST_HUGE_BYTES and hasattr(mmap, "MADV_HUGEPAGE"):
            buffer.madvise(mmap.MADV_HUGEPAGE)
        self._buffers.append(buffer)
        return buffer


def _references_without_tensors() -> int:
    buffers = [mmap.mmap(-1, 1)]
    return next(sys.getrefcount(buffer) for buffer in buffers)


def _forked() -> None:
    """In the child: the lock may be held by a thread that does not exist there."""
    global _lock
    _lock = threading.Lock()


# One for all rooms, so that a forked child needs to replace no others.
_lock = threading.Lock()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forked)
_UNUSED = _references_without_tensors()
