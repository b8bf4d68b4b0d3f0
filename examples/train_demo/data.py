"""Labelled images in memory, read once: CIFAR-10 as folders of PNGs or in its binary version.

    DIR/train/<class>/*.png and DIR/test/<class>/*.png      classes in alphabetical order
    DIR/data_batch_1.bin .. 5, DIR/test_batch.bin           rows of 1 label byte and 3072 bytes
The pickled version is not read: a pickle is a program. The images are kept as one .npz beside the
run, which a second start reads in a second. Nothing is downloaded.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from varptq.errors import InputError
from varptq.files import write_atomic

CIFAR_SIDE, CIFAR_CLASSES = 32, 10
PARTS = ("train", "test")


@dataclass(frozen=True)
class Images:
    """pixels (N, 3, S, S) uint8 and labels (N,) int64."""

    pixels: Tensor
    labels: Tensor

    def batch(self, index: Tensor, flip: Tensor, device: torch.device) -> Tensor:
        """Images `index` (B,) as float32 in [-1, 1] on `device`, mirrored where `flip` (B,)."""
        picked = self.pixels[index]
        picked = torch.where(flip.view(-1, 1, 1, 1), picked.flip(-1), picked)
        return picked.to(device).float() / 127.5 - 1


@dataclass(frozen=True)
class Dataset:
    """Both parts and the number of classes."""

    train: Images
    test: Images
    num_classes: int


def load(folder: Path, cache: Path, side: int) -> Dataset:
    """The images of `folder`, from `cache` if they have been read before.

    Raises `InputError` where images are missing, of another size than `side`, or unreadable.
    """
    if not cache.is_file():
        read = _read_binary if (folder / "data_batch_1.bin").is_file() else _read_pngs
        arrays = read(folder)
        write_atomic(cache, lambda file: np.savez(file, **arrays))
    with np.load(cache, allow_pickle=False) as arrays:
        parts = {name: torch.from_numpy(arrays[name]) for name in arrays.files}
    found = tuple(parts["train_pixels"].shape[2:])
    if found != (side, side):
        raise InputError(
            f"images {folder}: {found[0]} x {found[1]}, expected {side} x {side}, the last side of "
            "the tokens times the downsampling"
        )
    train, test = (Images(parts[f"{p}_pixels"], parts[f"{p}_labels"]) for p in PARTS)
    return Dataset(train, test, int(train.labels.max()) + 1)


def _read_pngs(folder: Path) -> dict[str, np.ndarray]:
    classes = sorted(path.name for path in (folder / "train").glob("*") if path.is_dir())
    if not classes:
        raise InputError(
            f"images {folder}: no folders train/<class> with PNGs and no data_batch_1.bin; see the "
            "README of this example"
        )
    arrays: dict[str, np.ndarray] = {}
    for part in PARTS:
        files = [(f, k) for k, c in enumerate(classes) for f in _pngs(folder / part / c)]
        images = [_pixels(file) for file, _ in files]
        if not images or len({image.shape for image in images}) > 1:
            raise InputError(f"images {folder / part}: expected PNGs of one size")
        arrays[f"{part}_pixels"] = np.stack(images)
        arrays[f"{part}_labels"] = np.array([label for _, label in files], dtype=np.int64)
    return arrays


def _pngs(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.png"))


def _pixels(file: Path) -> np.ndarray:
    try:
        with Image.open(file) as image:
            return np.asarray(image.convert("RGB")).transpose(2, 0, 1)
    except (OSError, ValueError, SyntaxError) as error:
        raise InputError(f"image {file}: cannot be read ({error})") from None


def _read_binary(folder: Path) -> dict[str, np.ndarray]:
    names = {"train": [f"data_batch_{i}.bin" for i in range(1, 6)], "test": ["test_batch.bin"]}
    arrays: dict[str, np.ndarray] = {}
    for part in PARTS:
        rows = [_rows(folder / name) for name in names[part]]
        whole = np.concatenate(rows)
        arrays[f"{part}_labels"] = whole[:, 0].astype(np.int64)
        arrays[f"{part}_pixels"] = whole[:, 1:].reshape(-1, 3, CIFAR_SIDE, CIFAR_SIDE)
    return arrays


def _rows(path: Path) -> np.ndarray:
    width = 1 + 3 * CIFAR_SIDE**2
    try:
        values = np.fromfile(path, np.uint8)
    except OSError as error:
        raise InputError(f"images {path}: cannot be read ({error.strerror})") from None
    if len(values) % width or not len(values) or values[::width].max() >= CIFAR_CLASSES:
        raise InputError(f"images {path}: not rows of 1 label and {width - 1} bytes")
    return values.reshape(-1, width)
