"""Arrays of an npz file one by one, without reading those that are not asked for.

The size of an array is known from its header, before it is read. Arrays of objects, which would be
pickles, are refused.
"""

from __future__ import annotations

import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tokenize import TokenError
from typing import IO, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from varptq.errors import InputError

# Raised for a zip file that is damaged, encrypted or in a format we cannot unpack, and by NumPy for
# the header of an array.
READ_ERRORS = (
    *(OSError, ValueError, LookupError, EOFError, RuntimeError, MemoryError),
    *(zipfile.BadZipFile, zlib.error, TokenError, SyntaxError),
)
_MEMBER = ".npy"


class ArrayHeader(NamedTuple):
    """The header of the array `name`."""

    name: str
    shape: tuple[int, ...]
    fortran: bool
    dtype: np.dtype[Any]

    def __str__(self) -> str:
        order = " in Fortran order" if self.fortran else ""
        return f"{self.name} is {self.dtype} {self.shape}{order}"


@contextmanager
def opened(path: Path, expected: str) -> Iterator[zipfile.ZipFile]:
    """The open archive. Any error in it, or raised inside the block, becomes an `InputError` that
    names the file and what was `expected`."""
    try:
        with zipfile.ZipFile(path) as archive:
            yield archive
    except InputError:
        raise
    except READ_ERRORS as error:
        reason = getattr(error, "strerror", None) or (error.args[0] if error.args else error)
        raise InputError(f"images {path}: cannot be read ({reason}); expected {expected}") from None


def names(archive: zipfile.ZipFile) -> list[str]:
    """Names of all arrays, in the order of the file."""
    found = archive.namelist()
    return [name.removesuffix(_MEMBER) for name in found if name.endswith(_MEMBER)]


@contextmanager
def stream(archive: zipfile.ZipFile, name: str) -> Iterator[tuple[IO[bytes], ArrayHeader]]:
    """The values of an array as a stream, and its header."""
    with archive.open(name + _MEMBER) as file:
        version = np.lib.format.read_magic(file)
        read = np.lib.format.read_array_header_1_0
        if version != (1, 0):
            read = np.lib.format.read_array_header_2_0
        shape, fortran, dtype = read(file)
        yield file, ArrayHeader(name, shape, fortran, dtype)


def header(archive: zipfile.ZipFile, name: str) -> ArrayHeader:
    with stream(archive, name) as (_, found):
        return found


def array(archive: zipfile.ZipFile, name: str) -> NDArray[Any]:
    """The whole array, in any order of its axes."""
    with archive.open(name + _MEMBER) as file:
        return np.lib.format.read_array(file, allow_pickle=False)
