"""Reading pictures: every mode and orientation, and files that are damaged, hostile or none."""

from __future__ import annotations

import io
import struct
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from helpers.picture_files import file_of, png_header
from varptq.errors import InputError
from varptq.reading import FORMATS, MAX_PIXELS, flattened, read_image

ORIENTATION = 0x0112


def noise(width: int, height: int, channels: int = 3, seed: int = 0) -> np.ndarray:
    shape = (height, width, channels)[: 2 + (channels > 1)]
    return np.random.default_rng(seed).integers(0, 256, shape, np.uint8)


def jpeg_header(width: int, height: int) -> bytes:
    """A small JPEG whose frame header claims another size."""
    content = bytearray(file_of(Image.new("RGB", (8, 8)), "JPEG"))
    place = content.index(b"\xff\xc0") + 5
    content[place : place + 4] = struct.pack(">HH", height, width)
    return bytes(content)


@pytest.mark.parametrize("kind", FORMATS)
def test_formats_are_read_from_bytes_path_and_image(kind: str, tmp_path: Path) -> None:
    content = file_of(Image.fromarray(noise(13, 7)), kind)
    path = tmp_path / "picture"
    path.write_bytes(content)
    expected = np.asarray(Image.open(io.BytesIO(content)).convert("RGB"))
    for source in (content, path, str(path), Image.open(path)):
        found = read_image(source)
        assert (found.mode, found.size) == ("RGB", (13, 7))
        assert (np.asarray(found) == expected).all()


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "CMYK", "YCbCr", "HSV", "LAB"])
def test_modes_without_alpha_become_rgb(mode: str) -> None:
    image = Image.fromarray(noise(5, 3)).convert(mode)
    assert (read_image(image).mode, read_image(image).size) == ("RGB", (5, 3))


@pytest.mark.parametrize("mode", ["LA", "PA", "RGBA"])
def test_modes_with_alpha_keep_it(mode: str) -> None:
    image = Image.fromarray(noise(5, 3, 4)).convert(mode)
    found = read_image(image)
    assert found.mode == "RGBA"
    assert (np.asarray(found)[..., 3] == np.asarray(image.convert("RGBA"))[..., 3]).all()


def test_a_transparent_palette_entry_is_alpha() -> None:
    image = Image.fromarray(np.array([[0, 1, 2]], np.uint8), "P")
    image.putpalette([255, 0, 0, 0, 255, 0, 0, 0, 255])
    found = read_image(file_of(image, transparency=1))
    assert np.asarray(found)[0, :, 3].tolist() == [255, 0, 255]


def test_grey_and_cmyk_have_the_colours_they_show() -> None:
    grey = read_image(file_of(Image.new("L", (2, 2), 90), "JPEG"))
    assert np.asarray(grey).tolist() == [[[90] * 3] * 2] * 2
    cmyk = read_image(file_of(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "JPEG"))
    red = np.asarray(cmyk)[0, 0]
    assert red[0] > 240 and max(red[1:]) < 15


def test_sixteen_bits_are_scaled_not_clipped() -> None:
    values = np.array([[0, 0x00FF, 0x8000, 0xFFFF]], np.uint16)
    found = np.asarray(read_image(file_of(Image.fromarray(values))))
    assert found[0, :, 0].tolist() == [0, 0, 0x80, 0xFF]


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", FORMATS)
def test_orientation_is_applied(orientation: int, kind: str) -> None:
    upright = np.zeros((16, 24, 3), np.uint8)
    upright[:8, :8], upright[:8, 16:] = (255, 0, 0), (0, 255, 0)
    # How a camera turned that way stores the scene: the inverse of what a viewer has to do.
    stored = {
        1: lambda x: x,
        2: lambda x: x[:, ::-1],
        3: lambda x: x[::-1, ::-1],
        4: lambda x: x[::-1],
        5: lambda x: x.swapaxes(0, 1),
        6: lambda x: np.rot90(x, 1),
        7: lambda x: x[::-1, ::-1].swapaxes(0, 1),
        8: lambda x: np.rot90(x, -1),
    }[orientation](upright)
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    picture = Image.fromarray(np.ascontiguousarray(stored))
    content = file_of(picture, kind, exif=exif, quality=95)
    found = np.asarray(read_image(content)).astype(int)
    assert found.shape == upright.shape
    assert np.abs(found - upright).mean() < 12  # JPEG and WebP are lossy
    assert read_image(read_image(content)).size == (24, 16)  # not turned twice


@pytest.mark.parametrize(
    ("width", "height", "make"),
    [
        (30_000, 30_000, png_header),
        (30_000, 30_000, jpeg_header),
        (9_000, 9_000, png_header),  # Pillow itself does not mind this one
        (12_000, 12_000, png_header),  # and warns of this one
        (64_001, 1_000, jpeg_header),
        (2**31 - 1, 1, png_header),
    ],
)
def test_a_bomb_is_refused_by_its_header(
    width: int, height: int, make: Any, recwarn: pytest.WarningsRecorder, tmp_path: Path
) -> None:
    path = tmp_path / "bomb"
    path.write_bytes(make(width, height))
    started = time.monotonic()
    with pytest.raises(InputError, match=r"64 megapixels.*make it smaller") as error:
        read_image(path)
    assert time.monotonic() - started < 1
    assert str(path) in str(error.value) and "\n" not in str(error.value)
    assert not recwarn.list


def test_the_limit_is_on_the_number_of_pixels() -> None:
    image = Image.new("1", (100, 20))
    assert read_image(image, max_pixels=2000).size == (100, 20)
    with pytest.raises(InputError, match="100 x 20 pixels"):
        read_image(image, max_pixels=1999)
    assert MAX_PIXELS < 30_000**2


SAMPLES = [
    file_of(Image.fromarray(noise(9, 5, channels)), kind)
    for kind, channels in (("PNG", 4), ("PNG", 1), ("JPEG", 3), ("WEBP", 3), ("WEBP", 4))
]


@settings(max_examples=300)
@given(
    st.sampled_from(SAMPLES),
    st.floats(0, 1),
    st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 255)), max_size=4),
)
def test_a_damaged_file_is_read_or_refused(
    content: bytes, kept: float, changes: list[tuple[float, int]]
) -> None:
    damaged = bytearray(content[: int(kept * len(content))])
    for place, value in changes:
        if damaged:
            damaged[int(place * len(damaged))] = value
    try:
        found = read_image(bytes(damaged))
    except InputError as error:
        assert "\n" not in str(error)
    else:
        assert found.mode in ("RGB", "RGBA")


@pytest.mark.parametrize("kind", FORMATS)
def test_half_a_file_is_refused(kind: str) -> None:
    content = file_of(Image.fromarray(noise(64, 64)), kind)
    with pytest.raises(InputError, match=r"image: (cannot be read|not a JPEG)"):
        read_image(content[: len(content) // 2])


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (b"", "image: not a JPEG, PNG or WebP"),
        (b"GIF89a", "image: not a JPEG, PNG or WebP"),
        (file_of(Image.new("RGB", (4, 4)), "GIF"), "image: not a JPEG, PNG or WebP"),
        (file_of(Image.new("RGB", (4, 4)), "BMP"), "image: not a JPEG, PNG or WebP"),
        ("missing.png", "image missing.png: no such file"),
        (".", "image .: cannot be read"),
        (None, "image: NoneType, expected a path"),
        (np.zeros((2, 2, 3), np.uint8), "image: ndarray, expected a path"),
        (Image.new("RGB", (0, 5)), "image: 0 x 5 pixels"),
    ],
)
def test_what_is_no_image_is_named(source: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        read_image(source)


def test_the_given_image_is_left_alone() -> None:
    image = Image.fromarray(noise(4, 6, 4))
    found = read_image(image)
    found.paste((1, 2, 3, 4), (0, 0, 4, 6))
    assert (np.asarray(image) == noise(4, 6, 4)).all()


def test_behind_transparency_lies_the_mean_of_what_is_opaque() -> None:
    pixels = np.zeros((1, 4, 4), np.uint8)
    pixels[0] = [(10, 0, 0, 255), (30, 0, 0, 255), (200, 200, 200, 0), (255, 255, 255, 0)]
    found = np.asarray(flattened(Image.fromarray(pixels)))
    assert found[0].tolist() == [[10, 0, 0], [30, 0, 0], [20, 0, 0], [20, 0, 0]]
    assert flattened(Image.new("RGBA", (2, 2))).getpixel((0, 0)) == (127, 127, 127)
