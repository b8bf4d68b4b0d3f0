"""Pictures of any kind as upright 8-bit RGB or RGBA; pictures that cannot be trusted are refused.

JPEG, PNG and WebP, recognised by their content. EXIF orientation is applied; grey, palette, CMYK
and 16-bit grey become RGB, an alpha channel is kept. The number of pixels is checked in the header,
before anything is decoded. An RGB colour profile is kept and not applied; other metadata, such as
the place of a photo, is dropped, sound or damaged. Of an animation the first frame is read.
"""

from __future__ import annotations

import io
import os
import struct
import warnings
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageStat, UnidentifiedImageError

from varptq.errors import InputError
from varptq.reading.chunks import MAX_METADATA, only_what_shows

# No other formats: each of their many old decoders is a way in for a hostile file.
FORMATS = ("JPEG", "PNG", "WEBP")
# More than phones take (50 megapixels); an edit holds a few copies of 4 bytes per pixel.
MAX_PIXELS = 64_000_000
OPAQUE_FROM = 128

ImageLike = str | Path | bytes | Image.Image

PROFILE = "icc_profile"
ORIENTATION = 0x0112
# How a viewer turns a picture of each EXIF orientation; 1 is upright.
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_LIES_DOWN = 5
# How an intact file ends; files that end otherwise are decoded before they are trusted.
_ENDS = {"PNG": b"IEND\xaeB`\x82", "JPEG": b"\xff\xd9"}
# First bytes, as (place, bytes), of formats that we do not read, and of files that are no pictures.
_STRANGERS = {
    "a GIF": (0, b"GIF8"),
    "a BMP": (0, b"BM"),
    "a TIFF": (0, b"II*\0"),
    "a TIFF of a Mac": (0, b"MM\0*"),
    "HEIC or AVIF": (4, b"ftyp"),
    "a resource fork of macOS": (0, b"\0\5\x16\7"),
    "a pointer of git-lfs": (0, b"version https://git-lfs"),
    "HTML or SVG": (0, b"<"),
    "an array of NumPy": (0, b"\x93NUMPY"),
}

# What Pillow raises for damaged files, depending on format and damage.
_DAMAGE = (
    *(OSError, ValueError, SyntaxError, EOFError, LookupError, TypeError, struct.error),
    *(zlib.error, OverflowError, MemoryError, Image.DecompressionBombError),
)


@dataclass(frozen=True)
class Header:
    """size: (width, height) when upright. transparent: whether it has an alpha channel or a colour
    that stands for one."""

    size: tuple[int, int]
    transparent: bool


def read_image(
    source: ImageLike, *, what: str = "image", max_pixels: int = MAX_PIXELS
) -> Image.Image:
    """The picture, upright, loaded, in mode "RGB", or "RGBA" if it has transparency.

    source: a path, the bytes of a file, or a Pillow image, which does not change. what: its name in
    messages. Raises `InputError` for a source that is not a picture, is damaged, or has more than
    `max_pixels`.
    """
    with opened(source, what=what, max_pixels=max_pixels) as (image, what):
        image.load()
        return turned(eight_bit(image, what), image)


def read_header(path: Path, *, what: str = "image", max_pixels: int = MAX_PIXELS) -> Header:
    """The header of what `read_image` would return, without decoding a file that ends as it should.

    Raises `InputError` as `read_image` does, except for damage inside the file.
    """
    with opened(path, what=what, max_pixels=max_pixels) as (image, _):
        with path.open("rb") as file:
            file.seek(-min(12, file.seek(0, os.SEEK_END)), os.SEEK_END)
            ending = file.read()
        if not ending.endswith(_ENDS.get(image.format or "", b"")):
            image.load()
        width, height = image.size
        size = (height, width) if _orientation(image) >= _LIES_DOWN else (width, height)
        return Header(size, image.has_transparency_data)


@contextmanager
def opened(
    source: ImageLike, *, what: str = "image", max_pixels: int = MAX_PIXELS
) -> Iterator[tuple[Image.Image, str]]:
    """The image with its header read and checked, and its name in messages; a file opened here is
    closed again. Whatever Pillow raises inside the block becomes an `InputError`."""
    if isinstance(source, str | Path):
        what = f"{what} {source}"
    elif not isinstance(source, bytes | Image.Image):
        kind = type(source).__name__
        raise InputError(f"{what}: {kind}, expected a path, bytes or a Pillow image")
    with _damage_named(what, source, max_pixels), _opened(source) as image:
        width, height = image.size
        if width * height > max_pixels:
            raise InputError(
                f"{what}: {width} x {height} pixels, expected at most {max_pixels / 1e6:g} "
                "megapixels; make it smaller"
            )
        if not width * height:
            raise InputError(f"{what}: {width} x {height} pixels, expected at least one")
        yield image, what


def eight_bit(image: Image.Image, what: str) -> Image.Image:
    """A new image in RGB or RGBA, without metadata other than an RGB profile.

    The upper 8 of 16 bits are kept. Raises `InputError` for floats, and for values beyond 16 bits.
    """
    if image.mode == "F":
        raise InputError(
            f"{what}: floats (mode F), expected 8 or 16 bits; scale them and save it as PNG"
        )
    if image.mode.startswith("I"):
        found = _upper_eight(image, what)
    else:
        # Pillow converts these premultiplied greys only in two steps.
        straight = image.convert("LA") if image.mode == "La" else image
        found = straight.convert("RGBA" if image.has_transparency_data else "RGB")
    found.info = {}
    profile = image.info.get(PROFILE)
    if image.mode in ("RGB", "RGBA", "P") and profile and len(profile) <= MAX_METADATA:
        found.info[PROFILE] = profile
    return found


def turned(picture: Image.Image, original: Image.Image) -> Image.Image:
    """`picture` turned upright, by the EXIF orientation of `original`."""
    turn = _TURNS.get(_orientation(original))
    if turn is None:
        return picture
    upright = picture.transpose(turn)
    upright.info = picture.info
    return upright


def is_opaque(image: Image.Image) -> Image.Image:
    """RGBA -> "L": 255 where alpha is at least one half, else 0."""
    return at_least(image.getchannel("A"), OPAQUE_FROM)


def at_least(grey: Image.Image, threshold: int) -> Image.Image:
    """ "L" -> "L": 255 where the value is at least `threshold`, else 0."""
    return grey.point([255 * (value >= threshold) for value in range(256)])


def flattened(image: Image.Image) -> Image.Image:
    """RGB of an RGB or RGBA image. Transparent pixels get the mean colour of the opaque ones, so
    that hidden colours do not reach the coarse tokens of the picture."""
    if image.mode == "RGB":
        return image
    opaque = is_opaque(image)
    seen = ImageStat.Stat(image.convert("RGB"), opaque)
    mean = [round(value) for value in seen.mean] if any(seen.count) else [127] * 3
    background = Image.new("RGB", image.size, tuple(mean))
    background.paste(image.convert("RGB"), mask=image.getchannel("A"))
    return background


@contextmanager
def _opened(source: ImageLike) -> Iterator[Image.Image]:
    if isinstance(source, Image.Image):
        yield source
        return
    with warnings.catch_warnings():
        # Pillow warns of damaged metadata, and of images up to twice its own limit, above ours.
        warnings.simplefilter("ignore")
        with (
            io.BytesIO(source) if isinstance(source, bytes) else Path(source).open("rb") as file,
            Image.open(only_what_shows(file), formats=FORMATS) as image,
        ):
            yield image


@contextmanager
def _damage_named(what: str, source: ImageLike, max_pixels: int) -> Iterator[None]:
    try:
        yield
    except InputError:
        raise
    except FileNotFoundError:
        if isinstance(source, str | Path) and Path(source).is_symlink():
            raise InputError(f"{what}: a link to a file that does not exist; remove it") from None
        raise InputError(f"{what}: no such file; give a JPEG, PNG or WebP") from None
    except PermissionError:
        raise InputError(f"{what}: cannot be read (Permission denied); allow it") from None
    except Image.DecompressionBombError:
        raise InputError(
            f"{what}: its header claims far more than {max_pixels / 1e6:g} megapixels; "
            "make it smaller"
        ) from None
    except UnidentifiedImageError:
        raise InputError(
            f"{what}: not a JPEG, PNG or WebP image{_kind(source)}; convert it"
        ) from None
    except _DAMAGE as error:
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        raise InputError(
            f"{what}: cannot be read ({reason}); it may be incomplete, save it as PNG again"
        ) from None


def _kind(source: ImageLike) -> str:
    """What a file that is not a picture is instead, if its first bytes tell."""
    head = source[:32] if isinstance(source, bytes) else b"?"
    if isinstance(source, str | Path):
        with Path(source).open("rb") as file:
            head = file.read(32)
    if not head:
        return " but empty (0 bytes)"
    found = (name for name, (at, begin) in _STRANGERS.items() if head[at:].startswith(begin))
    return "".join(f" but {name}" for name in found)


def _orientation(image: Image.Image) -> int:
    """1 to 8 as in EXIF; 1 if EXIF is missing or damaged."""
    try:
        # The method of a PNG would decode it, to look for EXIF after the pixels; chunks.py has
        # moved it before them.
        found = Image.Image.getexif(image).get(ORIENTATION, 1)
    except _DAMAGE:
        return 1
    return found if isinstance(found, int) and found in _TURNS else 1


def _upper_eight(image: Image.Image, what: str) -> Image.Image:
    """RGB, or RGBA, of 16-bit grey, which Pillow would clip at 255."""
    values = np.asarray(image)
    low, high = int(values.min()), int(values.max())
    if low < 0 or high > 0xFFFF:
        raise InputError(
            f"{what}: values from {low} to {high}, expected 8 bits, or 16 (0 to 65535); scale them "
            "and save it as PNG"
        )
    found = Image.fromarray((values >> 8).astype(np.uint8)).convert("RGB")
    if "transparency" in image.info:
        opaque = values != image.info["transparency"]
        found.putalpha(Image.fromarray(opaque.astype(np.uint8) * 255))
    return found
