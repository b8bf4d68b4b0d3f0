"""Pictures of any kind as upright 8-bit RGB or RGBA, and refusing those that cannot be trusted.

JPEG, PNG and WebP; EXIF orientation is applied; grey, palette, CMYK and 16-bit grey become RGB, an
alpha channel is kept. The number of pixels is read off the header and refused before anything is
decoded. A colour profile of RGB goes along and is not applied; EXIF, with the place of a photo, is
dropped. Of an animation the first frame counts.
"""

from __future__ import annotations

import io
import struct
import warnings
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, ImageStat, UnidentifiedImageError

from varptq.errors import InputError

# Decoders for other formats are old and many; each is a way in for a hostile file.
FORMATS = ("JPEG", "PNG", "WEBP")
# Above what phones take (50 megapixels); an edit holds a few copies of 4 bytes per pixel.
MAX_PIXELS = 64_000_000
OPAQUE_FROM = 128

ImageLike = str | Path | bytes | Image.Image

PROFILE = "icc_profile"

# What Pillow raises on damaged files, by format and kind of damage.
_DAMAGE = (
    *(OSError, ValueError, SyntaxError, EOFError, LookupError, TypeError, struct.error),
    *(zlib.error, OverflowError, MemoryError, Image.DecompressionBombError),
)


def read_image(
    source: ImageLike, *, what: str = "image", max_pixels: int = MAX_PIXELS
) -> Image.Image:
    """The picture, upright, loaded, in mode "RGB", or "RGBA" if it has transparency.

    source: a path, the bytes of a file, or a Pillow image, which is left as it is. what: its name
    in messages. Raises `InputError` for what is no picture, damaged, or above `max_pixels`.
    """
    if isinstance(source, str | Path):
        what = f"{what} {source}"
    elif not isinstance(source, bytes | Image.Image):
        kind = type(source).__name__
        raise InputError(f"{what}: {kind}, expected a path, bytes or a Pillow image")
    with _damage_named(what, max_pixels), _opened(source) as image:
        width, height = image.size
        if width * height > max_pixels:
            raise InputError(
                f"{what}: {width} x {height} pixels, expected at most {max_pixels / 1e6:g} "
                "megapixels; make it smaller"
            )
        if not width * height:
            raise InputError(f"{what}: {width} x {height} pixels, expected at least one")
        return _eight_bit(ImageOps.exif_transpose(image))


def is_opaque(image: Image.Image) -> Image.Image:
    """Of an RGBA image: "L", 255 where alpha is at least one half, else 0."""
    return at_least(image.getchannel("A"), OPAQUE_FROM)


def at_least(grey: Image.Image, threshold: int) -> Image.Image:
    """ "L" -> "L": 255 where the value is at least `threshold`, else 0."""
    return grey.point([255 * (value >= threshold) for value in range(256)])


def flattened(image: Image.Image) -> Image.Image:
    """RGB of an RGB or RGBA image; behind transparency lies the mean colour of what is opaque, so
    that the coarse tokens of the picture do not take whatever colour hides there."""
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
    """The image with its header read; what was opened here is closed again."""
    if isinstance(source, Image.Image):
        yield source
        return
    file = io.BytesIO(source) if isinstance(source, bytes) else source
    with warnings.catch_warnings():
        # Pillow only warns of images up to twice its own limit, which is above ours.
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        with Image.open(file, formats=FORMATS) as image:
            yield image


@contextmanager
def _damage_named(what: str, max_pixels: int) -> Iterator[None]:
    try:
        yield
    except InputError:
        raise
    except FileNotFoundError:
        raise InputError(f"{what}: no such file; give a JPEG, PNG or WebP") from None
    except Image.DecompressionBombError:
        raise InputError(
            f"{what}: its header claims far more than {max_pixels / 1e6:g} megapixels; "
            "make it smaller"
        ) from None
    except UnidentifiedImageError:
        raise InputError(f"{what}: is no JPEG, PNG or WebP image; convert it") from None
    except _DAMAGE as error:
        reason = getattr(error, "strerror", None) or error or type(error).__name__
        raise InputError(
            f"{what}: cannot be read ({reason}); is it whole? save it as PNG again"
        ) from None


def _eight_bit(image: Image.Image) -> Image.Image:
    """A new image in RGB or RGBA, with nothing attached but a profile of such values."""
    if image.mode.startswith("I"):
        # Pillow would clip the 16 bits at 255.
        found = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert("RGB")
    else:
        found = image.convert("RGBA" if image.has_transparency_data else "RGB")
    found.info = {}
    if image.mode in ("RGB", "RGBA", "P") and PROFILE in image.info:
        found.info[PROFILE] = image.info[PROFILE]
    return found
