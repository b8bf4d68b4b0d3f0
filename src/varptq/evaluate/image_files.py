"""Images on disk as other tools of the field keep them: an npz with `arr_0`, or a folder of PNGs.

The npz is what the ADM evaluator reads: `arr_0` (N, H, W, 3) uint8, labels (if any) as `arr_1`; the
names `images` and `labels` are read too.
Both ways go in pieces, so the size of a set is bounded by the disk. Sets we sample ourselves are in
sampling.py.
"""

from __future__ import annotations

import shutil
import tempfile
import zipfile
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from varptq.errors import InputError
from varptq.files import write_atomic
from varptq.pictures import Pixels

IMAGES, LABELS = "arr_0", "arr_1"
# Other writers call them so; the first name found counts.
IMAGE_NAMES, LABEL_NAMES = (IMAGES, "images"), (LABELS, "labels")
# What a zip file that is damaged, encrypted or of a kind we cannot unpack raises.
READ_ERRORS = (
    *(OSError, ValueError, LookupError, EOFError, RuntimeError),
    *(zipfile.BadZipFile, zlib.error),
)

Part = tuple[NDArray[np.int64], Pixels, NDArray[np.int64]]


def write_npz(path: str | Path, count: int, parts: Iterable[Part]) -> None:
    """Write images and labels that come in pieces (places in the file, images, labels).

    The places of all pieces together are 0 .. count - 1. Needs the size of the images twice on the
    disk for a moment. Raises `OutputError` where the file cannot be written.
    """

    def fill(file: IO[bytes]) -> None:
        with tempfile.TemporaryDirectory(prefix=".varptq-", dir=Path(path).parent) as scratch:
            raw = Path(scratch, "images.npy")
            labels_N = _scatter(raw, count, parts)
            with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
                with raw.open("rb") as source, _member(archive, IMAGES) as target:
                    shutil.copyfileobj(source, target, 2**20)
                with _member(archive, LABELS) as target:
                    np.lib.format.write_array(target, labels_N, allow_pickle=False)

    write_atomic(path, fill)


def _member(archive: zipfile.ZipFile, name: str) -> IO[bytes]:
    """An entry without a time stamp: the same images give the same bytes."""
    return archive.open(zipfile.ZipInfo(f"{name}.npy"), "w", force_zip64=True)


def _scatter(path: Path, count: int, parts: Iterable[Part]) -> NDArray[np.int64]:
    """Put every image at its place in one .npy file; returns the labels in that order. Nothing is
    mapped: a full disk under a mapping ends the process without an exception."""
    labels_N = np.empty(count, np.int64)
    begin = 0
    with path.open("wb") as file:
        for places, images, labels in parts:
            if not begin:
                shape = (count, *images.shape[1:])
                header = {"descr": "|u1", "fortran_order": False, "shape": shape}
                np.lib.format.write_array_header_1_0(file, header)
                begin = file.tell()
            for place, image in zip(places.tolist(), images, strict=True):
                file.seek(begin + place * image.nbytes)
                file.write(image.tobytes())
            labels_N[places] = labels
    return labels_N


@dataclass(frozen=True)
class ImageFiles:
    """The images of an npz or of a folder of PNGs, to be read in batches.

    size: (height, width) of the images, of the first one in a folder. warning: what a user should
    know about this set, None if nothing.
    """

    path: Path
    count: int
    size: tuple[int, int]
    warning: str | None = None

    @classmethod
    def open(cls, path: str | Path) -> ImageFiles:
        """Look at `path` without reading all images. Raises `InputError` if it holds none."""
        path = Path(path)
        if path.is_dir():
            files = _png_files(path)
            if not files:
                raise InputError(f"images {path}: no .png in this folder; give one with images")
            height, width, _ = _read_png(files[0]).shape
            return cls(path, len(files), (height, width))
        with _npz(path) as archive, _images(archive) as (_, shape):
            count, height, width, _ = shape
            labels_N = _labels(archive)
        warning = None
        if labels_N is not None and _is_sorted(labels_N):
            warning = (
                f"images {path}: sorted by label; the Inception Score of such a file is wrong, "
                "shuffle it"
            )
        return cls(path, count, (height, width), warning)

    def batches(self, size: int) -> Iterator[Pixels]:
        """(b, H, W, 3) uint8 in the order of the file, or of the names. Raises `InputError`."""
        return self._png_batches(size) if self.path.is_dir() else self._npz_batches(size)

    def _png_batches(self, size: int) -> Iterator[Pixels]:
        files = _png_files(self.path)
        for start in range(0, len(files), size):
            images = [_read_png(file) for file in files[start : start + size]]
            shapes = {image.shape for image in images}
            if len(shapes) > 1:
                raise InputError(f"images {self.path}: of sizes {sorted(shapes)}, expected one")
            yield np.stack(images)

    def _npz_batches(self, size: int) -> Iterator[Pixels]:
        with _npz(self.path) as archive, _images(archive) as (file, shape):
            bytes_each = int(np.prod(shape[1:]))
            for start in range(0, self.count, size):
                length = min(size, self.count - start)
                content = file.read(length * bytes_each)
                if len(content) < length * bytes_each:
                    raise ValueError("ends too early")
                yield np.frombuffer(content, np.uint8).reshape(length, *shape[1:])


def _png_files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.suffix.lower() == ".png")


def _read_png(path: Path) -> Pixels:
    try:
        with Image.open(path) as image:
            return np.asarray(image.convert("RGB"))
    except (OSError, ValueError, SyntaxError) as error:
        raise InputError(f"image {path}: cannot be read ({error})") from None


@contextmanager
def _npz(path: Path) -> Iterator[zipfile.ZipFile]:
    """The open archive; whatever is wrong with it becomes an `InputError` naming the file."""
    try:
        with zipfile.ZipFile(path) as archive:
            yield archive
    except READ_ERRORS as error:
        if isinstance(error, InputError):
            raise
        reason = getattr(error, "strerror", None) or (error.args[0] if error.args else error)
        raise InputError(
            f"images {path}: cannot be read ({reason}); expected a folder of PNGs or an npz with "
            f"{IMAGES} (N, H, W, 3) uint8"
        ) from None


@contextmanager
def _images(archive: zipfile.ZipFile) -> Iterator[tuple[IO[bytes], tuple[int, ...]]]:
    """The values of the image array as a stream, and its shape."""
    name = next((name for name in IMAGE_NAMES if f"{name}.npy" in archive.namelist()), IMAGES)
    with archive.open(f"{name}.npy") as file:
        version = np.lib.format.read_magic(file)
        read = np.lib.format.read_array_header_1_0
        if version != (1, 0):
            read = np.lib.format.read_array_header_2_0
        shape, fortran, dtype = read(file)
        if fortran or dtype != np.uint8 or len(shape) != 4 or shape[-1] != 3 or not shape[0]:
            raise ValueError(f"{name} is {dtype} {shape}")
        yield file, shape


def _labels(archive: zipfile.ZipFile) -> NDArray[Any] | None:
    for name in LABEL_NAMES:
        if f"{name}.npy" in archive.namelist():
            with archive.open(f"{name}.npy") as file:
                return np.lib.format.read_array(file, allow_pickle=False)
    return None


def _is_sorted(labels_N: NDArray[Any]) -> bool:
    """Whether whole classes stand one behind the other; a single class is no order."""
    flat = labels_N.reshape(-1)
    return len(flat) > 1 and flat[0] != flat[-1] and bool((flat[1:] >= flat[:-1]).all())
