"""Images on disk as other tools store them: an npz with `arr_0`, or a folder of pictures.

The npz is what the ADM evaluator reads: `arr_0` (N, H, W, 3) uint8, labels (if any) as `arr_1`; the
names `images` and `labels` are read too. The file may hold statistics of images as well, or instead
(statistics.py).
Reading and writing go in pieces, so only the disk bounds the size of a set. Sets that we sample
ourselves are in sampling.py.
"""

from __future__ import annotations

import shutil
import tempfile
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from varptq.errors import InputError
from varptq.evaluate import folders, npz, statistics
from varptq.files import write_atomic
from varptq.pictures import Pixels
from varptq.reading import flattened, read_image

IMAGES, LABELS = "arr_0", "arr_1"
# Names that other programs use; the first one found counts.
IMAGE_NAMES, LABEL_NAMES = (IMAGES, "images"), (LABELS, "labels")
EXPECTED = (
    f"a folder of pictures, or an npz with {IMAGES} (N, H, W, 3) uint8 or {statistics.EXPECTED}"
)

Part = tuple[NDArray[np.int64], Pixels, NDArray[np.int64]]


def write_npz(path: str | Path, count: int, parts: Iterable[Part]) -> None:
    """Write images and labels that come in pieces (places in the file, images, labels).

    The places of all pieces together are 0 .. count - 1. For a moment this needs twice the size
    of the images on disk. Raises `OutputError` if the file cannot be written.
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
    """An entry without a time stamp, so that the same images give the same bytes."""
    return archive.open(zipfile.ZipInfo(f"{name}.npy"), "w", force_zip64=True)


def _scatter(path: Path, count: int, parts: Iterable[Part]) -> NDArray[np.int64]:
    """Put every image at its place in one .npy file; returns the labels in that order. The file is
    not mapped: writing to a mapped file on a full disk kills the process without an exception."""
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
    """The images of an npz or of a folder of pictures, to be read in batches, and their statistics.

    count: 0 for a file of statistics alone. size: (height, width) of all images, None without any.
    warning: what a user should know about this set, None if nothing. files: of a folder.
    moments: the features of which the file has mean and covariance, and their number D; keys as
    in `statistics.NAMES`.
    """

    path: Path
    count: int
    size: tuple[int, int] | None
    warning: str | None = None
    files: tuple[Path, ...] = ()
    moments: Mapping[str, int] = field(default_factory=dict)

    @classmethod
    def open(cls, path: str | Path) -> ImageFiles:
        """Inspect `path` without decoding the images. Raises `InputError` if it holds none, and for
        a picture in a folder that cannot be read or has another size."""
        path = Path(path)
        if path.is_dir():
            files, notes = folders.find_pictures(path)
            size, more = folders.common_size(path, files)
            return cls(path, len(files), size, _warning(path, notes + more), tuple(files))
        with npz.opened(path, EXPECTED) as archive:
            moments = statistics.widths(archive)
            names = npz.names(archive)
            if moments and not any(name in names for name in IMAGE_NAMES):
                return cls(path, 0, None, moments=moments)
            with _images(archive) as (_, header):
                count, *size, _ = header.shape
            notes = _about_labels(archive, header)
        return cls(path, count, (size[0], size[1]), _warning(path, notes), moments=moments)

    def batches(self, size: int) -> Iterator[Pixels]:
        """(b, H, W, 3) uint8 in the order of the file, or of the names. Raises `InputError`."""
        return self._picture_batches(size) if self.files else self._npz_batches(size)

    def _picture_batches(self, size: int) -> Iterator[Pixels]:
        for start in range(0, len(self.files), size):
            images = [
                np.asarray(flattened(read_image(file))) for file in self.files[start : start + size]
            ]
            shapes = {image.shape for image in images}
            if len(shapes) > 1:
                raise InputError(
                    f"images {self.path}: of sizes {sorted(shapes)}, expected one size"
                )
            yield np.stack(images)

    def _npz_batches(self, size: int) -> Iterator[Pixels]:
        with npz.opened(self.path, EXPECTED) as archive, _images(archive) as (file, header):
            shape = header.shape[1:]
            bytes_each = int(np.prod(shape))
            for start in range(0, self.count, size):
                length = min(size, self.count - start)
                content = file.read(length * bytes_each)
                if len(content) < length * bytes_each:
                    raise ValueError("ends too early")
                yield np.frombuffer(content, np.uint8).reshape(length, *shape)


def _warning(path: Path, notes: list[str]) -> str | None:
    return f"images {path}: {'; '.join(notes)}" if notes else None


@contextmanager
def _images(archive: zipfile.ZipFile) -> Iterator[tuple[IO[bytes], npz.ArrayHeader]]:
    """The values of the image array as a stream, and its header."""
    there = npz.names(archive)
    name = next((name for name in IMAGE_NAMES if name in there), None)
    if name is None:
        raise ValueError(f"holds {', '.join(there[:8]) or 'no array'}")
    with npz.stream(archive, name) as (file, header):
        shape = header.shape
        if header.fortran or header.dtype != np.uint8 or len(shape) != 4 or shape[-1] != 3:
            remedy = "; save it with numpy.ascontiguousarray" if header.fortran else ""
            raise ValueError(f"{header}{remedy}")
        if not shape[0]:
            raise ValueError(f"{header}, no image")
        yield file, header


def _about_labels(archive: zipfile.ZipFile, images: npz.ArrayHeader) -> list[str]:
    """Sentences about the order of the images, and about arrays that are not read."""
    there, notes = npz.names(archive), []
    known = {images.name, *chain(*statistics.NAMES.values())}
    name = next((name for name in LABEL_NAMES if name in there), None)
    if name is not None:
        header, count = npz.header(archive, name), images.shape[0]
        if header.dtype.kind in "biuf" and header.shape in {(count,), (count, 1)}:
            known.add(name)
            if _is_sorted(npz.array(archive, name)):
                notes.append("sorted by label, which makes the Inception Score wrong; shuffle them")
    if unread := [name for name in there if name not in known]:
        notes.append(f"left out {', '.join(unread[:8])}, only {images.name} is read")
    return notes


def _is_sorted(labels_N: NDArray[Any]) -> bool:
    """Whether the images are sorted by class; those of a single class are not."""
    flat = labels_N.reshape(-1)
    return len(flat) > 1 and flat[0] != flat[-1] and bool((flat[1:] >= flat[:-1]).all())
