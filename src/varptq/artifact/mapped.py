"""The tensors of a safetensors file, memory-mapped: read from disk when used, dropped afterwards.

Copying one tensor after another needs memory only for the copies; tensors that stay views of the
mapping take none until they are used. The mapping is private, so nothing is written to the file.
load.py checks the file before anything is read here.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import mmap
import os
import weakref
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from varptq.errors import ArtifactError

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I8": torch.int8,
}
LENGTH_BYTES = 8


def return_free_memory() -> None:
    """Return freed memory to the system. glibc keeps freed memory between live tensors, which after
    unpacking layer by layer is as much as the model."""
    with contextlib.suppress(AttributeError, OSError):
        ctypes.CDLL(None).malloc_trim(0)


class MappedTensors:
    """Tensors by name, of a file whose header safetensors has validated."""

    def __init__(self, path: Path) -> None:
        self._path, self._fd = path, os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        weakref.finalize(self, os.close, self._fd)
        self._map = mmap.mmap(self._fd, 0, access=mmap.ACCESS_COPY)
        self._start = torch.frombuffer(self._map, dtype=torch.uint8, count=1).data_ptr()
        self._stamp = self._now()
        length = int.from_bytes(self._map[:LENGTH_BYTES], "little")
        self._data = LENGTH_BYTES + length
        self._entries: dict[str, Any] = json.loads(self._map[LENGTH_BYTES : self._data])

    def _now(self) -> tuple[int, int]:
        found = os.fstat(self._fd)
        return found.st_size, found.st_mtime_ns

    def check(self, module: nn.Module) -> None:
        """Raise `ArtifactError` if tensors of `module` lie on the mapping and the file was
        written to since: they would have other values, or kill the process if the file got shorter.
        A file replaced by a rename is still the old one here."""
        end = self._start + len(self._map)
        tensors = (*module.parameters(), *module.buffers())
        mapped = any(self._start <= t.data_ptr() < end for t in tensors)
        if mapped and self._now() != self._stamp:
            raise ArtifactError(f"{self._path}: changed while the model was in use; load it again")

    def view(self, name: str) -> Tensor:
        """The tensor as a view of the mapping, which it keeps alive."""
        entry = self._entries[name]
        start, end = entry["data_offsets"]
        dtype, shape = DTYPES[entry["dtype"]], entry["shape"]
        if start == end:
            return torch.empty(shape, dtype=dtype, device="cpu")
        count = (end - start) // dtype.itemsize
        flat = torch.frombuffer(self._map, dtype=dtype, count=count, offset=self._data + start)
        return flat.view(shape)

    def take(self, name: str) -> Tensor:
        """A copy of the tensor in memory."""
        copy = self.view(name).clone()
        self.drop(name)
        return copy

    def drop(self, name: str) -> None:
        """Release the memory that reading the tensor took; it is read again when needed."""
        start, end = (self._data + offset for offset in self._entries[name]["data_offsets"])
        start += -start % mmap.PAGESIZE
        if hasattr(mmap, "MADV_DONTNEED") and end - start >= mmap.PAGESIZE:
            self._map.madvise(mmap.MADV_DONTNEED, start, (end - start) & -mmap.PAGESIZE)


class Unchanged:
    """A hook before a module whose tensors lie on a mapping: `MappedTensors.check`.

    What another process gets by pickle has its tensors in memory and asks nothing."""

    def __init__(self, tensors: MappedTensors | None) -> None:
        self._tensors = tensors

    def __call__(self, module: nn.Module, _: Any) -> None:
        if self._tensors is not None:
            self._tensors.check(module)

    def __deepcopy__(self, _: Any) -> Unchanged:
        return self

    def __reduce__(self) -> tuple[type[Unchanged], tuple[None]]:
        return Unchanged, (None,)
