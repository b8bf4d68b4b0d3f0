"""Pictures for people: images side by side with labels, and writing PNG files.

A sheet is a list of blocks, each with a title and rows of equally sized images, each row with a
label on its left; blocks fill the sheet line by line. Small images are enlarged by a whole factor
without smoothing, so that pixels stay square. Text is set in Pillow's built-in font. Metrics are
elsewhere.
"""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from varptq.errors import InputError
from varptq.files import write_atomic

Pixels = NDArray[np.uint8]

# Smaller images are enlarged to at least this side: 32 x 32 pixels become 128 x 128.
VISIBLE_SIDE = 128
# Characters of a class name in a file name; file systems allow 255 bytes.
MAX_SLUG = 60
MARGIN, GAP, BLOCK_GAP = 16, 4, 20
TITLE_SIZE, LABEL_SIZE = 16, 12
BACKGROUND, TITLE_COLOR, LABEL_COLOR = (255, 255, 255), (20, 20, 20), (110, 110, 110)


@dataclass(frozen=True)
class Row:
    """Images (N, H, W, 3) uint8 in one line; `label` is on their left, "" for none."""

    images: Pixels
    label: str = ""


@dataclass(frozen=True)
class Block:
    """Rows that belong together under one title."""

    rows: Sequence[Row]
    title: str = ""


def to_pixels(images_B3HW: Tensor) -> Pixels:
    """(B, 3, H, W) float in [0, 1] -> (B, H, W, 3) uint8, rounded to nearest, clipped."""
    scaled = images_B3HW.detach().float().clamp(0, 1).mul(255).round()
    return scaled.permute(0, 2, 3, 1).cpu().numpy().astype(np.uint8)


def slug(title: str) -> str:
    """The name of a class as a part of a file name: "Great auk, male" -> "great-auk-male".

    Never empty, never longer than `MAX_SLUG`; letters of all alphabets stay.
    """
    return re.sub(r"\W+", "-", title.lower())[:MAX_SLUG].strip("-") or "image"


def write_png(path: str | Path, picture: Pixels | Image.Image) -> None:
    """Write (H, W, 3) uint8 or a Pillow image as one PNG file, whole or not at all.

    Raises `OutputError` if it cannot be written.
    """
    if not isinstance(picture, Image.Image):
        picture = Image.fromarray(picture)
    buffer = io.BytesIO()
    picture.save(buffer, format="PNG")
    write_atomic(path, buffer.getvalue())


def sheet(
    blocks: Sequence[Block], *, across: int = 1, zoom: int | None = None, heading: str = ""
) -> Image.Image:
    """Draw blocks in lines of `across`, with an optional line of text on top.

    zoom: whole factor of enlargement; None enlarges small images until they are easy to see.
    Raises `InputError` for an empty sheet or images of different sizes.
    """
    sizes = {row.images.shape[1:] for block in blocks for row in block.rows}
    if not blocks or len(sizes) != 1:
        raise InputError(f"sheet: images of sizes {sorted(sizes)}, expected one size and one image")
    height, width, _ = sizes.pop()
    zoom = zoom or max(1, VISIBLE_SIDE // max(height, width))
    layout = _Layout.of(blocks, (width * zoom, height * zoom))
    lines = [blocks[start : start + across] for start in range(0, len(blocks), across)]
    top = MARGIN + (TITLE_SIZE + BLOCK_GAP if heading else 0)
    body = max(len(line) for line in lines) * (layout.block_width + BLOCK_GAP) - BLOCK_GAP
    size = (
        2 * MARGIN + max(body, _text_width(heading, TITLE_SIZE)),
        top + sum(layout.height(line) + BLOCK_GAP for line in lines) - BLOCK_GAP + MARGIN,
    )
    canvas = Image.new("RGB", size, BACKGROUND)
    ImageDraw.Draw(canvas).text((MARGIN, MARGIN), heading, TITLE_COLOR, _font(TITLE_SIZE))
    for line in lines:
        for index, block in enumerate(line):
            left = MARGIN + index * (layout.block_width + BLOCK_GAP)
            layout.draw(canvas, block, left, top)
        top += layout.height(line) + BLOCK_GAP
    return canvas


def gallery(images: Pixels, labels: Sequence[str], zoom: int | None = None) -> Image.Image:
    """One sheet of images (N, H, W, 3) with a label each: neighbours of one label share a block.

    Single images of different labels form a near-square; several images of a label form a row.
    """
    starts = [i for i, label in enumerate(labels) if i == 0 or label != labels[i - 1]]
    ends = [*starts[1:], len(labels)]
    blocks = [Block([Row(images[a:b])], title=labels[a]) for a, b in zip(starts, ends, strict=True)]
    single = len(blocks) == len(labels)
    return sheet(blocks, across=int(np.ceil(np.sqrt(len(blocks)))) if single else 1, zoom=zoom)


@dataclass(frozen=True)
class _Layout:
    """Pixel measures shared by all blocks of a sheet, so that their images line up."""

    tile: tuple[int, int]
    label_width: int
    columns: int
    titled: bool

    @classmethod
    def of(cls, blocks: Sequence[Block], tile: tuple[int, int]) -> _Layout:
        rows = [row for block in blocks for row in block.rows]
        widest = max(_text_width(row.label, LABEL_SIZE) for row in rows)
        columns = max(len(row.images) for row in rows)
        titled = any(block.title for block in blocks)
        return cls(tile, widest + 2 * GAP if widest else 0, columns, titled)

    @property
    def block_width(self) -> int:
        return self.label_width + self.columns * (self.tile[0] + GAP) - GAP

    @property
    def title_height(self) -> int:
        return TITLE_SIZE + 2 * GAP if self.titled else 0

    def height(self, line: Sequence[Block]) -> int:
        """Height of a line of blocks: that of its tallest."""
        rows = max(len(block.rows) for block in line)
        return self.title_height + rows * (self.tile[1] + GAP) - GAP

    def draw(self, canvas: Image.Image, block: Block, left: int, top: int) -> None:
        pen = ImageDraw.Draw(canvas)
        title = _fitted(block.title, TITLE_SIZE, self.block_width - self.label_width)
        pen.text((left + self.label_width, top), title, TITLE_COLOR, _font(TITLE_SIZE))
        top += self.title_height
        for row in block.rows:
            middle = top + self.tile[1] // 2
            pen.text((left, middle), row.label, LABEL_COLOR, _font(LABEL_SIZE), anchor="lm")
            for column, image in enumerate(row.images):
                picture = Image.fromarray(image).resize(self.tile, Image.Resampling.NEAREST)
                x = left + self.label_width + column * (self.tile[0] + GAP)
                canvas.paste(picture, (x, top))
            top += self.tile[1] + GAP


def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size)


def _text_width(text: str, size: int) -> int:
    return int(np.ceil(_font(size).getlength(text)))


def _fitted(text: str, size: int, width: int) -> str:
    """The text, cut with "..." if it is wider than `width` pixels."""
    if _text_width(text, size) <= width:
        return text
    while text and _text_width(text + "...", size) > width:
        text = text[:-1]
    return text + "..."
