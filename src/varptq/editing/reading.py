"""Masks written by drawing and segmentation programs, as 8-bit black and white.

    white, 128 and above, is regenerated; 0 and 1, and in 16 bits 0 and 255, are black and white
    an array is read by the same rule, True is white; transparent is black
Masks that this rule would misread are refused, naming a value found in them: maps of labels,
colours, and masks stored only in the alpha channel.
"""

from __future__ import annotations

from pathlib import Path
from tokenize import TokenError
from typing import Any
from zipfile import BadZipFile

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from varptq.errors import InputError
from varptq.reading import MAX_PIXELS, ImageLike, at_least, opened, read_image, turned

MaskLike = ImageLike | NDArray[Any]

WHITE_FROM = 128
ARRAY_SUFFIX = ".npy"
# Largest difference between the channels of a grey; JPEG moves them by a few steps.
COLOURED = 64
# A map of labels has few values and nearly black regions; soft edges have no such regions.
FEWEST, FEW, NEARLY_BLACK = 3, 32, 64
# Values that JPEG leaves near white, and correspondingly near black.
ALMOST_WHITE = set(range(248, 255))
REMEDY = "make the part to regenerate 255 and the rest 0"


def read_mask(source: MaskLike) -> Image.Image:
    """ "L", 255 where the image is regenerated and 0 elsewhere, upright.

    source: as `read_image` takes it, the path of a .npy file, or an array (H, W) of booleans or
    integers. Raises `InputError` as `read_image` does, and for a mask that has other values but no
    white, holds labels or colours, or is an array of another kind.
    """
    what = f"mask {source}" if isinstance(source, str | Path) else "mask"
    if isinstance(source, np.ndarray):
        return _of_array(source, what)
    if isinstance(source, str | Path) and Path(source).suffix.lower() == ARRAY_SUFFIX:
        return _of_array(_array(Path(source), what), what)
    with opened(source, what="mask") as (image, _):
        image.load()
        if image.mode.startswith("I"):
            values = np.asarray(image)
            if (grey := _two_valued(values)) is not None:
                return turned(grey, image)
            _check_white(int(values.max()), WHITE_FROM << 8, what)
    return _of_picture(read_image(source, what="mask"), what)


def _of_picture(picture: Image.Image, what: str) -> Image.Image:
    if picture.mode == "RGBA":
        # A stroke on a transparent layer; everything unpainted is black.
        black = Image.new("RGBA", picture.size, (0, 0, 0, 255))
        painted = Image.alpha_composite(black, picture)
        alpha = picture.getchannel("A").getextrema()
        if not painted.convert("RGB").getbbox() and alpha[0] != alpha[1]:
            raise InputError(
                f"{what}: black all over, only its alpha channel differs; give that channel as a "
                "picture of its own, white where it is to be regenerated"
            )
        picture = painted
    pixels = np.asarray(picture.convert("RGB"))
    apart = pixels.max(2) - pixels.min(2)
    if apart.max() > COLOURED:
        colour = tuple(pixels[np.unravel_index(apart.argmax(), apart.shape)].tolist())
        raise InputError(
            f"{what}: holds colours, such as {colour}, expected black (kept) and white "
            "(regenerated); paint the part to regenerate white"
        )
    return _of_grey(picture.convert("L"), what)


def _of_grey(grey: Image.Image, what: str) -> Image.Image:
    """Black and white of "L"; 0 and 1 are what they say."""
    values = {value for value, count in enumerate(grey.histogram()) if count}
    if values <= {0, 1}:
        return at_least(grey, 1)
    _check_white(max(values), WHITE_FROM, what)
    few = FEWEST <= len(values) <= FEW and not values & ALMOST_WHITE
    if few and _has_dark_region(np.asarray(grey)):
        first = ", ".join(map(str, sorted(values)[:8]))
        raise InputError(f"{what}: the values {first} look like labels; {REMEDY}")
    return at_least(grey, WHITE_FROM)


def _check_white(highest: int, white_from: int, what: str) -> None:
    if highest < white_from:
        raise InputError(
            f"{what}: values up to {highest}, none is white ({white_from} and above); {REMEDY}"
        )


def _has_dark_region(values_HW: NDArray[np.uint8]) -> bool:
    """Whether 3 x 3 neighbours somewhere share one value that is nearly black but not black."""
    middle = values_HW[1:-1, 1:-1]
    flat = (middle > 0) & (middle < NEARLY_BLACK)
    height, width = flat.shape
    for down, across in np.ndindex(3, 3):
        flat &= values_HW[down : down + height, across : across + width] == middle
    return bool(flat.any())


def _two_valued(values: NDArray[Any]) -> Image.Image | None:
    """ "L" of an array of 0 and 1, or of 0 and 255; None for other values."""
    highest = int(values.max()) if values.size else 0
    if highest not in (0, 1, 255) or not np.isin(values, (0, highest)).all():
        return None
    return Image.fromarray((values != 0).astype(np.uint8) * 255)


def _array(path: Path, what: str) -> NDArray[Any]:
    """The array of a .npy file, not read into memory. Raises `InputError`, also for a pickle."""
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError, TokenError, SyntaxError, BadZipFile) as error:
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        raise InputError(
            f"{what}: cannot be read ({reason}); give a picture, or an array of booleans"
        ) from None
    if not isinstance(array, np.ndarray):
        raise InputError(f"{what}: several arrays, expected one; save the mask alone as .npy")
    return array


def _of_array(array: NDArray[Any], what: str) -> Image.Image:
    values = array
    if array.ndim == 3 and 1 in (array.shape[0], array.shape[-1]):  # as models give it
        values = array[0] if array.shape[0] == 1 else array[..., 0]
    if values.dtype.kind not in "bui" or values.ndim != 2 or not 0 < values.size <= MAX_PIXELS:
        raise InputError(
            f"{what}: an array of {array.dtype} {array.shape}, expected booleans (height, width); "
            "compare it with the label or the threshold that is meant"
        )
    if (grey := _two_valued(values)) is not None:
        return grey
    low, high = int(values.min()), int(values.max())
    if low < 0 or high > 255:
        raise InputError(
            f"{what}: an array with values from {low} to {high}, expected booleans, or 0 and 255; "
            "compare it with the label that is meant"
        )
    return _of_grey(Image.fromarray(values.astype(np.uint8)), what)
