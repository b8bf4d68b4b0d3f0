"""Masks as programs of painting and segmentation write them: read as they are meant, or refused
with the value that stands in them."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageFilter

from helpers.picture_files import file_of
from varptq.editing.reading import read_mask
from varptq.errors import InputError

SIDE = 32
INSIDE = np.zeros((SIDE, SIDE), bool)
INSIDE[8:20, 10:24] = True
WHITE = Image.fromarray(INSIDE.astype(np.uint8) * 255)


def grey(outside: int, inside: int, dtype: Any = np.uint8) -> np.ndarray:
    return np.where(INSIDE, inside, outside).astype(dtype)


def png(values: np.ndarray, mode: str | None = None) -> bytes:
    image = Image.fromarray(values)
    return file_of(image.convert(mode) if mode else image)


def layer(colour: tuple[int, int, int], under: tuple[int, int, int] = (0, 0, 0)) -> Image.Image:
    """Strokes on a transparent layer."""
    image = Image.new("RGBA", (SIDE, SIDE), (*under, 0))
    image.paste((*colour, 255), mask=WHITE)
    return image


def palette(colours: list[int], values: np.ndarray) -> Image.Image:
    image = Image.fromarray(values, "L")
    image.putpalette(colours)
    return image


def rotated() -> bytes:
    made = Image.Exif()
    made[0x0112] = 3
    return file_of(WHITE.rotate(180), exif=made)


def npy(values: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, values)
    return buffer.getvalue()


READ: dict[str, bytes | np.ndarray] = {
    "0 and 255": file_of(WHITE),
    "0 and 1": png(grey(0, 1)),
    "0 and 1 in RGB": png(grey(0, 1), "RGB"),
    "1-bit": file_of(WHITE.convert("1")),
    "black and white palette": file_of(WHITE.convert("P")),
    "palette of two": file_of(WHITE.convert("1").convert("P")),
    "RGB": file_of(WHITE.convert("RGB")),
    "opaque RGBA": file_of(WHITE.convert("RGBA")),
    "white strokes": file_of(layer((255, 255, 255))),
    "white strokes in grey": file_of(layer((255, 255, 255)).convert("LA")),
    "white under transparency": file_of(layer((255, 255, 255), (255, 255, 255))),
    "16 bits": png(grey(0, 65535, np.uint16)),
    "16 bits, 0 and 1": png(grey(0, 1, np.uint16)),
    "16 bits, 0 and 255": png(grey(0, 255, np.uint16)),
    "dark grey and white": png(grey(30, 255)),
    "black and light grey": png(grey(0, 128)),
    "JPEG": file_of(WHITE, "JPEG", quality=60),
    "JPEG in colour": file_of(WHITE.convert("RGB"), "JPEG", quality=30),
    "lossy WebP": file_of(WHITE.convert("RGB"), "WEBP", quality=50),
    "turned by EXIF": rotated(),
    "booleans": INSIDE,
    "booleans of a batch": INSIDE[None],
    "booleans with a channel": INSIDE[..., None],
    "integers 0 and 1": INSIDE.astype(np.int64),
    "bytes 0 and 255": grey(0, 255),
    "in Fortran order": np.asfortranarray(INSIDE),
}


def test_masks_are_read_as_they_are_meant(tmp_path: Path, counted: Callable[[], None]) -> None:
    expected = np.asarray(WHITE)
    for what, source in READ.items():
        counted()
        assert np.array_equal(np.asarray(read_mask(source)), expected), what
        name = "mask.NPY" if isinstance(source, np.ndarray) else "mask.png"
        content = npy(source) if isinstance(source, np.ndarray) else source
        (tmp_path / name).write_bytes(content)
        assert np.array_equal(np.asarray(read_mask(tmp_path / name)), expected), what


def test_soft_edges_are_no_labels(counted: Callable[[], None]) -> None:
    large = WHITE.resize((256, 256))
    drawn = large.resize((SIDE, SIDE), Image.Resampling.BOX)  # 4 shades, as drawn with antialias
    for radius in (1, 2, 5):
        counted()
        soft = WHITE.filter(ImageFilter.GaussianBlur(radius))
        assert np.array_equal(np.asarray(read_mask(soft)) > 0, np.asarray(soft) >= 128)
    for picture in (drawn, WHITE.rotate(30, Image.Resampling.BICUBIC), Image.new("L", (4, 4))):
        counted()
        assert np.array_equal(np.asarray(read_mask(picture)) > 0, np.asarray(picture) >= 128)


def labels(*values: int) -> np.ndarray:
    """Bands of these values."""
    return np.repeat(np.array(values, np.uint8), SIDE // len(values))[:, None].repeat(SIDE, 1)


VOC = [0, 0, 0, 128, 0, 0, 0, 128, 0, 128, 128, 0]
SAID: dict[str, tuple[bytes | np.ndarray, str]] = {
    "labels": (png(labels(0, 1, 2, 3)), "values up to 3, none is white"),
    "one label": (png(grey(0, 15)), "values up to 15, none is white"),
    "labels and border": (png(labels(0, 15, 255)), "values 0, 15, 255 look like labels"),
    "labels from 1": (png(labels(1, 2, 255)), "values 1, 2, 255 look like labels"),
    "many labels": (
        png(labels(0, 3, 4, 7, 120, 140)),
        "values 0, 3, 4, 7, 120, 140 look like labels",
    ),
    "16-bit labels": (png(grey(0, 300, np.uint16)), r"values up to 300, none is white \(32768 and"),
    "coloured palette": (file_of(palette(VOC, labels(0, 1, 2, 3))), r"colours, such as \("),
    "red on black": (file_of(Image.merge("RGB", (WHITE, *[Image.new("L", WHITE.size)] * 2))),
                     r"colours, such as \(255, 0, 0\), expected black"),
    "orange strokes": (file_of(layer((224, 112, 42))), r"colours, such as \(224, 112, 42\)"),
    "alpha alone": (file_of(layer((0, 0, 0))), "black all over, only its alpha channel differs"),
    "alpha of grey": (file_of(layer((0, 0, 0)).convert("LA")), "only its alpha channel differs"),
    "logits": (np.zeros((4, 4), np.float32), r"an array of float32 \(4, 4\), expected booleans"),
    "masks": (np.zeros((3, 4, 4), bool), r"an array of bool \(3, 4, 4\), expected booleans"),
    "one row": (np.zeros(16, bool), r"an array of bool \(16,\), expected booleans"),
    "nothing": (np.zeros((0, 4), bool), r"an array of bool \(0, 4\), expected booleans"),
    "below 0": (np.array([[-1, 5]]), "an array with values from -1 to 5"),
    "ids": (np.array([[0, 1000]]), "an array with values from 0 to 1000"),
    "labels in an array": (labels(0, 1, 2, 3), "values up to 3, none is white"),
}  # fmt: skip


def test_masks_that_would_be_misread_are_refused(
    tmp_path: Path, counted: Callable[[], None]
) -> None:
    for what, (source, expected) in SAID.items():
        counted()
        with pytest.raises(InputError, match=expected) as error:
            read_mask(source)
        assert "\n" not in str(error.value), what
        name = "mask.npy" if isinstance(source, np.ndarray) else "mask.png"
        (tmp_path / name).write_bytes(npy(source) if isinstance(source, np.ndarray) else source)
        with pytest.raises(InputError, match=expected) as error:
            read_mask(str(tmp_path / name))
        assert str(error.value).startswith(f"mask {tmp_path / name}: "), what


def test_arrays_that_cannot_be_read(tmp_path: Path, counted: Callable[[], None]) -> None:
    path = tmp_path / "mask.npy"
    several = io.BytesIO()
    np.savez(several, a=INSIDE, b=INSIDE)
    objects = io.BytesIO()
    np.save(objects, np.array([[INSIDE]], object), allow_pickle=True)
    for content, expected in (
        (b"", "cannot be read"),
        (npy(INSIDE)[:-9], "cannot be read"),
        (objects.getvalue(), "cannot be read"),
        (several.getvalue(), "several arrays, expected one"),
    ):
        counted()
        path.write_bytes(content)
        with pytest.raises(InputError, match=expected) as error:
            read_mask(path)
        assert "\n" not in str(error.value)
    counted()
    with pytest.raises(InputError, match=r"mask .*gone\.npy: cannot be read \(No such file"):
        read_mask(tmp_path / "gone.npy")
