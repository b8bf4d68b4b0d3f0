"""Pictures as cameras, phones, painting programs and servers leave them: read as a viewer shows
them, alike for edits and for real images, or refused by name."""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from helpers.picture_files import chunk, file_of, png_of, png_with
from varptq.errors import InputError
from varptq.evaluate.image_files import ImageFiles
from varptq.reading import flattened, read_image

PIXELS = np.random.default_rng(0).integers(0, 256, (6, 8, 3), dtype=np.uint8)
PICTURE = Image.fromarray(PIXELS)
LONG = b'{"workflow": "' + b"x" * 2**20 + b'"}'
NO_EXIF = b"\0\x08\0\2\1\x12\0\3"


def with_wrong_sum(kind: bytes, content: bytes) -> bytes:
    return chunk(kind, content)[:-1] + b"?"


def text(name: bytes, content: bytes) -> bytes:
    return chunk(b"zTXt", name + b"\0\0" + zlib.compress(content))


def webp(**more: Any) -> bytes:
    return file_of(PICTURE, "WEBP", lossless=True, **more)


WHOLE = {
    "zTXt of 1 MB": png_with(PICTURE, text(b"workflow", LONG)),
    "iTXt of 1 MB, packed": png_with(
        PICTURE, chunk(b"iTXt", b"prompt\0\1\0\0\0" + zlib.compress(LONG))
    ),
    "iTXt of 3 MB": png_with(PICTURE, chunk(b"iTXt", b"prompt\0\0\0\0\0" + 3 * LONG)),
    "XMP of 3 MB": png_with(PICTURE, chunk(b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0" + 3 * LONG)),
    "text of 70 MB": png_with(PICTURE, chunk(b"tEXt", b"a\0" + bytes(70 * 2**20))),
    "text behind the pixels": png_with(PICTURE, back=text(b"parameters", LONG)),
    "profile of 2 MB": png_with(PICTURE, chunk(b"iCCP", b"p\0\0" + zlib.compress(bytes(2**21)))),
    "profile that is none": png_with(PICTURE, chunk(b"iCCP", b"p\0\0no zlib")),
    "profile packed otherwise": png_with(PICTURE, chunk(b"iCCP", b"p\0\1" + bytes(9))),
    "profile without an end": png_with(PICTURE, chunk(b"iCCP", b"p")),
    "eXIf that is none": png_with(PICTURE, chunk(b"eXIf", NO_EXIF)),
    "empty eXIf": png_with(PICTURE, chunk(b"eXIf", b"")),
    "EXIF as text that is none": png_with(PICTURE, text(b"Raw profile type exif", b"\na\n9\nzz")),
    "short pHYs": png_with(PICTURE, chunk(b"pHYs", b"\0")),
    "short gAMA": png_with(PICTURE, chunk(b"gAMA", b"\0")),
    "short cHRM": png_with(PICTURE, chunk(b"cHRM", b"\0" * 7)),
    "empty sRGB": png_with(PICTURE, chunk(b"sRGB", b"")),
    "frames out of order": png_with(
        PICTURE, chunk(b"acTL", struct.pack(">II", 2, 0)) + chunk(b"fcTL", b"\0\0\0\7" + bytes(22))
    ),
    "wrong sum of a text": png_with(PICTURE, with_wrong_sum(b"tEXt", b"Software\0x")),
    "wrong sum of the profile": png_with(PICTURE, with_wrong_sum(b"iCCP", b"p\0\0abc")),
    "wrong sum of a time": png_with(PICTURE, with_wrong_sum(b"tIME", bytes(7))),
    "chunk of a program": png_with(PICTURE, chunk(b"prVW", bytes(3 * 2**20))),
    "bytes behind the end": png_with(PICTURE) + b"more" * 9,
    "PNG cut in its last chunk": png_with(PICTURE)[:-9],
    "WebP with EXIF that is none": webp(exif=b"b'Exif\\x00\\x00"),
    "WebP with a profile of 2 MB": webp(icc_profile=bytes(2**21)),
    "WebP with XMP of 3 MB": webp(xmp=3 * LONG),
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "real"
    path.mkdir()
    return path


def only(folder: Path, name: str, content: bytes) -> np.ndarray:
    """The picture as a set of real images has it, alone in its folder."""
    for path in folder.iterdir():
        path.unlink()
    (folder / name).write_bytes(content)
    return next(ImageFiles.open(folder).batches(1))[0]


def test_metadata_does_not_keep_a_picture_from_being_read(
    folder: Path, counted: Callable[[], None], recwarn: pytest.WarningsRecorder
) -> None:
    for what, content in WHOLE.items():
        counted()
        found = read_image(content)
        assert np.array_equal(np.asarray(found), PIXELS), what
        assert np.array_equal(only(folder, "x.png", content), PIXELS), what
        # What goes on into a result can be read again by any program.
        assert len(found.info.get("icc_profile", b"")) <= 2**20, what
        Image.open(io.BytesIO(file_of(found, icc_profile=found.info.get("icc_profile")))).load()
    assert not recwarn.list


def test_a_profile_that_is_one_goes_along(counted: Callable[[], None]) -> None:
    counted()
    profile = bytes(range(256)) * 8
    content = png_with(PICTURE, text(b"workflow", LONG) + chunk(b"tIME", bytes(7)))
    packed = chunk(b"iCCP", b"p\0\0" + zlib.compress(profile))
    whole = content[:33] + packed + content[33:]
    assert read_image(whole).info == {"icc_profile": profile}


XMP = b'<x:xmpmeta><rdf:Description tiff:Orientation="6"/></x:xmpmeta>'


def exif(orientation: object) -> bytes:
    made = Image.Exif()
    made[0x0112] = orientation
    return made.tobytes()


RAW_EXIF = b"\nexif\n      34\n" + exif(6).hex().encode()
TURNED = {
    "eXIf": png_with(PICTURE, chunk(b"eXIf", exif(6)[6:])),
    "eXIf behind the pixels": png_with(PICTURE, back=chunk(b"eXIf", exif(6)[6:])),
    "EXIF as text": png_with(PICTURE, text(b"Raw profile type exif", RAW_EXIF)),
    "XMP": png_with(PICTURE, chunk(b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0" + XMP)),
    "XMP behind a long text": png_with(
        PICTURE, text(b"a", LONG), chunk(b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0" + XMP)
    ),
    "WebP": webp(exif=exif(6)),
}


def test_the_orientation_is_found_wherever_it_stands(
    folder: Path, counted: Callable[[], None]
) -> None:
    upright = np.rot90(PIXELS, -1)
    for what, content in TURNED.items():
        counted()
        assert np.array_equal(np.asarray(read_image(content)), upright), what
        assert np.array_equal(only(folder, "x.png", content), upright), what
        assert ImageFiles.open(folder).size == (8, 6), what
    for odd in (0, 9, 65535):
        counted()
        assert np.array_equal(np.asarray(read_image(webp(exif=exif(odd)))), PIXELS), odd


RAMP = (np.add.outer(np.arange(6), np.arange(8)) * 5000).astype(np.uint16)
HIGH = (RAMP >> 8).astype(np.uint8)
ROWS = np.arange(48, dtype=np.uint8).reshape(6, 8)


def rows(values: np.ndarray) -> bytes:
    """As a PNG stores them."""
    lines = values.reshape(len(values), -1)
    return b"".join(b"\0" + line.astype(line.dtype.newbyteorder(">")).tobytes() for line in lines)


def grey(values: np.ndarray) -> np.ndarray:
    return np.dstack([values] * 3)


def animation(kind: str) -> bytes:
    return file_of(
        PICTURE, kind, save_all=True, append_images=[Image.new("RGB", (8, 6))], lossless=True
    )


def deep() -> dict[str, tuple[bytes, np.ndarray]]:
    """Files and the RGB that they show."""
    rgb16 = np.dstack([RAMP, RAMP, RAMP // 2])
    bits = ROWS % 3 == 0
    palette = Image.fromarray(ROWS, "P")
    palette.putpalette(PIXELS.tobytes())
    return {
        "16-bit grey": (file_of(Image.fromarray(RAMP)), grey(HIGH)),
        "16-bit grey with alpha": (
            png_of(8, 6, 16, 4, rows(np.dstack([RAMP, np.full_like(RAMP, 65535)]))),
            grey(HIGH),
        ),
        "16-bit colours": (png_of(8, 6, 16, 2, rows(rgb16)), (rgb16 >> 8).astype(np.uint8)),
        "1-bit": (file_of(Image.fromarray(bits)), grey(bits * np.uint8(255))),
        "8-bit grey": (file_of(Image.fromarray(ROWS)), grey(ROWS)),
        "4-bit grey": (png_of(8, 6, 4, 0, rows(ROWS[:, :4])), grey(nibbles(ROWS[:, :4]))),
        "palette": (file_of(palette), PIXELS.reshape(48, 3)[ROWS]),
        "opaque alpha": (file_of(PICTURE.convert("RGBA")), PIXELS),
        "animated PNG": (animation("PNG"), PIXELS),
        "animated WebP": (animation("WEBP"), PIXELS),
    }


def nibbles(packed: np.ndarray) -> np.ndarray:
    return (np.dstack([packed >> 4, packed & 15]).reshape(len(packed), -1) * 17).astype(np.uint8)


def test_depths_are_read_alike_everywhere(folder: Path, counted: Callable[[], None]) -> None:
    for what, (content, expected) in deep().items():
        counted()
        assert np.array_equal(np.asarray(flattened(read_image(content))), expected), what
        assert np.array_equal(only(folder, "x.png", content), expected), what


def test_transparency_is_the_mean_of_what_is_opaque(
    folder: Path, counted: Callable[[], None]
) -> None:
    layer = np.dstack([PIXELS, np.full((6, 8), 255, np.uint8)])
    layer[:3, :, 3] = 0
    palette = PICTURE.quantize(16)
    cases = {
        "RGBA": file_of(Image.fromarray(layer)),
        "LA": file_of(Image.fromarray(layer).convert("LA")),
        "palette": file_of(palette, transparency=palette.getpixel((0, 0))),
        "16-bit grey": png_of(8, 6, 16, 0, rows(RAMP), chunk(b"tRNS", struct.pack(">H", 5000))),
        "WebP": file_of(Image.fromarray(layer), "WEBP", lossless=True),
    }
    for what, content in cases.items():
        counted()
        seen = read_image(content)
        assert seen.mode == "RGBA" and np.asarray(seen)[..., 3].min() == 0, what
        assert np.array_equal(only(folder, "x.png", content), np.asarray(flattened(seen))), what
        assert "1 with transparency (x.png)" in (ImageFiles.open(folder).warning or ""), what


def test_pillow_images_of_other_depths(counted: Callable[[], None]) -> None:
    deep16 = Image.fromarray(RAMP)
    big_endian = Image.frombytes("I;16B", (8, 6), RAMP.astype(">u2").tobytes())
    for image in (deep16, deep16.convert("I"), big_endian):
        counted()
        assert np.array_equal(np.asarray(read_image(image)), grey(HIGH)), image.mode
    for values, expected in (
        (RAMP.astype(np.float32), r"image: floats \(mode F\), expected 8 or 16 bits"),
        (RAMP.astype(np.int32) - 1, "image: values from -1 to 59999, expected 8 bits, or 16"),
        (RAMP.astype(np.int32) * 2, "image: values from 0 to 120000, expected 8 bits, or 16"),
    ):
        counted()
        with pytest.raises(InputError, match=expected):
            read_image(Image.fromarray(values))


def mpo() -> bytes:
    """As a phone with two lenses writes it."""
    buffer = io.BytesIO()
    PICTURE.save(buffer, "MPO", save_all=True, append_images=[Image.new("RGB", (8, 6))])
    return buffer.getvalue()


def test_jpegs_of_phones_and_print_shops(folder: Path, counted: Callable[[], None]) -> None:
    plain = file_of(PICTURE, "JPEG")
    shown = np.asarray(Image.open(io.BytesIO(plain)).convert("RGB"))
    broken = file_of(PICTURE, "JPEG", exif=b"Exif\0\0" + NO_EXIF)
    cases = {"two pictures": mpo(), "EXIF that is none": broken, "bytes behind": plain + b"\0" * 99}
    for what, content in cases.items():
        counted()
        assert np.array_equal(only(folder, "X.JPG", content), shown), what
    counted()
    # Adobe's programs store the four inks inverted.
    red = file_of(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "JPEG")
    assert only(folder, "cmyk.JPEG", red)[0, 0].tolist() == [255, 0, 0]


STRANGERS = {
    "": "empty",
    "GIF89a": "a GIF",
    "BM1234": "a BMP",
    "II*\0abc": "a TIFF",
    "\0\0\0\x18ftypheic": "HEIC or AVIF",
    "\0\5\x16\7\0\2\0\0Mac OS X": "a resource fork of macOS",
    "version https://git-lfs.github.com/spec/v1": "a pointer of git-lfs",
    "<!DOCTYPE html>": "HTML or SVG",
}


def test_what_is_no_picture_is_named(tmp_path: Path, counted: Callable[[], None]) -> None:
    for content, kind in STRANGERS.items():
        counted()
        (tmp_path / "x.png").write_bytes(content.encode("latin-1"))
        for source in (tmp_path / "x.png", content.encode("latin-1")):
            with pytest.raises(InputError, match=f"not a JPEG, PNG or WebP image but {kind}"):
                read_image(source)
    counted()
    (tmp_path / "link.png").symlink_to(tmp_path / "gone.png")
    with pytest.raises(InputError, match=r"link\.png: a link to a file that does not exist"):
        read_image(tmp_path / "link.png")


def test_a_file_that_was_cut_is_refused_before_it_is_decoded(
    folder: Path, counted: Callable[[], None]
) -> None:
    large = Image.fromarray(np.random.default_rng(1).integers(0, 256, (64, 64, 3), np.uint8))
    for kind, cuts in (("JPEG", (1, 2, 10, 500)), ("PNG", (100, 5000)), ("WEBP", (1, 2, 500))):
        content = file_of(large, kind)
        for cut in cuts:
            counted()
            with pytest.raises(InputError, match="image: cannot be read"):
                read_image(content[:-cut])
            (folder / "x.png").write_bytes(content[:-cut])
            with pytest.raises(InputError, match=r"x\.png: cannot be read"):
                ImageFiles.open(folder)
