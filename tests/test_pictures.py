"""Sheets of images: every pixel where it belongs, sizes, labels, and PNG files."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from varptq.errors import InputError, OutputError
from varptq.pictures import (
    BACKGROUND,
    GAP,
    MARGIN,
    MAX_SLUG,
    VISIBLE_SIDE,
    Block,
    Pixels,
    Row,
    gallery,
    sheet,
    slug,
    to_pixels,
    write_png,
)


def plain(colors: list[tuple[int, int, int]], side: int = 3) -> Pixels:
    """One image per colour."""
    return np.array(colors, np.uint8)[:, None, None, :].repeat(side, 1).repeat(side, 2)


RED, GREEN, BLUE, GREY = (255, 0, 0), (0, 255, 0), (0, 0, 255), (128, 128, 128)


def test_pixels_round_to_nearest_and_clip() -> None:
    values = torch.tensor([-1.0, 0.0, 0.5 / 255, 1.6 / 255, 1.0, 2.0])
    images = values.view(6, 1, 1, 1).expand(6, 3, 2, 5)
    pixels = to_pixels(images)
    assert pixels.shape == (6, 2, 5, 3) and pixels.dtype == np.uint8
    assert pixels[:, 0, 0, 0].tolist() == [0, 0, 0, 2, 255, 255]


def test_channels_stay_in_order() -> None:
    image = torch.zeros(1, 3, 2, 2)
    image[:, 1] = 1.0
    assert to_pixels(image)[0, 0, 0].tolist() == [0, 255, 0]


@pytest.mark.parametrize("zoom", [1, 3])
def test_every_image_stands_in_its_row_and_column(zoom: int) -> None:
    rows = [Row(plain([RED, GREEN])), Row(plain([BLUE, GREY]))]
    picture = np.asarray(sheet([Block(rows)], zoom=zoom))
    tile = 3 * zoom
    for (row, column), color in {(0, 0): RED, (0, 1): GREEN, (1, 0): BLUE, (1, 1): GREY}.items():
        top, left = (MARGIN + index * (tile + GAP) for index in (row, column))
        assert (picture[top : top + tile, left : left + tile] == color).all()
    side = 2 * MARGIN + 2 * tile + GAP
    assert picture.shape == (side, side, 3)
    assert (picture[:MARGIN] == BACKGROUND).all()


def test_enlarging_repeats_pixels() -> None:
    image = np.arange(27, dtype=np.uint8).reshape(1, 3, 3, 3)
    picture = np.asarray(sheet([Block([Row(image)])], zoom=4))
    inner = picture[MARGIN:-MARGIN, MARGIN:-MARGIN]
    assert (inner == image[0].repeat(4, 0).repeat(4, 1)).all()


@pytest.mark.parametrize(("side", "zoom"), [(32, 4), (100, 1), (256, 1), (3, 42)])
def test_small_images_are_enlarged_until_visible(side: int, zoom: int) -> None:
    picture = sheet([Block([Row(plain([RED], side))])])
    assert picture.width == 2 * MARGIN + side * zoom
    assert side * zoom <= max(side, VISIBLE_SIDE)


def colored(picture: Image.Image, color: tuple[int, int, int]) -> int:
    """Images of this colour and 12 x 12 pixels in a picture."""
    return int((np.asarray(picture) == color).all(-1).sum()) // 144


def test_blocks_of_different_lengths_lose_nothing() -> None:
    blocks = [
        Block([Row(plain([RED, RED, RED]), "a long label"), Row(plain([GREEN]))], title="first"),
        Block([Row(plain([BLUE]))]),
        Block([Row(plain([RED]), "b")], title="a title much too long for such a narrow block" * 3),
    ]
    for across in (1, 2, 3, 7):
        picture = sheet(blocks, across=across, zoom=4, heading="heading")
        counts = [colored(picture, color) for color in (RED, GREEN, BLUE)]
        assert counts == [4, 1, 1]


def test_text_is_drawn_where_there_is_some() -> None:
    images = plain([GREY], 40)
    silent = np.asarray(sheet([Block([Row(images)])]))
    spoken = np.asarray(sheet([Block([Row(images, "float")], title="cat")]))
    assert set(map(tuple, silent.reshape(-1, 3))) == {BACKGROUND, GREY}
    assert spoken.shape[0] > silent.shape[0] and spoken.shape[1] > silent.shape[1]
    assert (spoken.reshape(-1, 3).sum(-1) < 200).any()


def test_a_gallery_groups_neighbours_of_a_label() -> None:
    images = plain([RED, RED, GREEN, GREEN], 12)
    rows = gallery(images, ["cat", "cat", "ship", "ship"], zoom=1)
    square = gallery(images, ["cat", "dog", "ship", "frog"], zoom=1)
    for picture in (rows, square):
        assert (colored(picture, RED), colored(picture, GREEN)) == (2, 2)
    assert rows.width < rows.height


@pytest.mark.parametrize(
    "blocks", [[], [Block([])], [Block([Row(plain([RED], 3)), Row(plain([RED], 4))])]]
)
def test_sheets_without_one_size_are_refused(blocks: list[Block]) -> None:
    with pytest.raises(InputError, match="sheet: images of sizes"):
        sheet(blocks)


def test_png_files_hold_the_pixels(tmp_path: Path) -> None:
    image = np.arange(5 * 7 * 3, dtype=np.uint8).reshape(5, 7, 3)
    path = tmp_path / "deep" / "image.png"
    write_png(path, image)
    assert (np.asarray(Image.open(path)) == image).all()
    with pytest.raises(OutputError):
        write_png(path / "below-a-file.png", image)


def test_a_class_name_in_a_file_name() -> None:
    for title, name in (
        ("Great auk, male", "great-auk-male"),
        ("class 207", "class-207"),
        ("../etc/passwd", "etc-passwd"),
        ("Schnürsenkel", "schnürsenkel"),
        ("?!", "image"),
        ("", "image"),
        ("a" * 300, "a" * MAX_SLUG),
    ):
        assert slug(title) == name
