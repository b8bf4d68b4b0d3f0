"""What to regenerate: from a picture, the alpha channel or a box, down to every scale.

White is regenerated, black is kept. On the last token grid a cell is regenerated if any of its
pixels is white; a box instead takes round(position * side), half to even, as in the VAR code.
    keep at scale k = bilinear(keep at the last scale) > 0.5; all of a scale of <= 3 tokens
The weight for pasting is 1 on the mask and falls to 0 within the feather around it. Source: Tian et
al. (VAR), zero-shot editing; docs/editing.md.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageChops, ImageFilter
from torch import Tensor
from torch.nn import functional as F

from varptq.editing.frame import Frame, extent
from varptq.editing.reading import MaskLike, read_mask
from varptq.errors import InputError
from varptq.models.scales import Scales, Size
from varptq.reading import is_opaque

# Scales of so few tokens are always given, as they describe the whole image.
ALWAYS_GIVEN = 3

Box = tuple[float, float, float, float]


@dataclass(frozen=True)
class Mask:
    """pixels: "L" of the image's size, 255 where the image is regenerated. cells_PQ: (P, Q) bool,
    True for the tokens of the last scale that are."""

    pixels: Image.Image
    cells_PQ: NDArray[np.bool_]


def picture_mask(source: MaskLike, frame: Frame, last: Size) -> Mask:
    """From a picture of the image's size: white, or at least light grey, is regenerated.

    last: (P, Q), the last map. Raises `InputError` for another size, or as `read_mask` does.
    """
    picture = read_mask(source)
    if picture.size != frame.size:
        found, expected = (f"{w} x {h}" for w, h in (picture.size, frame.size))
        raise InputError(
            f"mask: {found} pixels, the image has {expected} (upright); make them equal"
        )
    return _from_pixels(picture, frame, last)


def alpha_mask(image: Image.Image, frame: Frame, last: Size) -> Mask:
    """From an RGBA image: pixels with alpha below one half are regenerated. last: (P, Q)."""
    return _from_pixels(ImageChops.invert(is_opaque(image)), frame, last)


def box_mask(box: Sequence[float], frame: Frame, last: Size, *, inside: bool) -> Mask:
    """From a rectangle: its inside is regenerated, or everything around it.

    box: (x0, y0, x1, y1) relative to the whole image, 0 left and top, 1 right and bottom. last:
    (P, Q).
    Raises `InputError` for coordinates that are not a rectangle.
    """
    x0, y0, x1, y1 = _checked(box)
    width, height = frame.size
    area = (round(x0 * width), round(y0 * height), round(x1 * width), round(y1 * height))
    back, front = (0, 255) if inside else (255, 0)
    pixels = Image.new("L", frame.size, back)
    pixels.paste(front, area)
    cells = np.full(last, not inside)
    rows, columns = (
        slice(*(_cell(value, axis, frame, last) for value in pair))
        for axis, pair in ((1, (y0, y1)), (0, (x0, x1)))
    )
    cells[rows, columns] = inside
    return Mask(pixels, cells)


def keep_mask(cells_PQ: NDArray[np.bool_], scales: Scales) -> Tensor:
    """(L,) bool: which tokens are given, for `cells_PQ` regenerated at the last scale."""
    keep_11PQ = torch.from_numpy(~cells_PQ).float()[None, None]
    parts = []
    for size, length in zip(scales.sides, scales.lengths, strict=True):
        resized = F.interpolate(keep_11PQ, size=size, mode="bilinear", align_corners=False)
        given_l = resized.flatten() > 0.5
        parts.append(given_l | (length <= ALWAYS_GIVEN))
    return torch.cat(parts)


def forced_ids(given_BL: Tensor, keep_L: Tensor) -> Tensor:
    """Tokens as `generate(forced=...)` takes them: the given ones, -1 where it is to draw."""
    drawn_L = ~keep_L.to(given_BL.device)
    return given_BL.masked_fill(drawn_L if given_BL.dim() == 2 else drawn_L.unsqueeze(-1), -1)


def feathered(pixels: Image.Image, width: int, frame: Frame) -> Image.Image:
    """The weight "L" for pasting: 255 on the mask, falling to 0 `width` pixels outside of it.

    Outside the part that the model sees all weights are 0. The band lies outside the mask because
    the model reproduces the original there, so that two nearly equal images are mixed.
    """
    seen = pixels.crop(frame.seen)
    # From the length of the longer side on the whole of it has full weight.
    radius = min(width // 2, max(seen.size))
    if radius:
        grown = Image.fromarray(_grown(np.asarray(seen) > 0, radius).astype(np.uint8) * 255)
        seen = ImageChops.lighter(seen, grown.filter(ImageFilter.BoxBlur(radius)))
    weight = Image.new("L", pixels.size)
    weight.paste(seen, frame.seen[:2])
    return weight


def feather_width(wanted: int | None, frame: Frame, last: Size) -> int:
    """Width in pixels of the image: the given one, or half a token of the last map, (P, Q)."""
    if wanted is not None:
        return wanted
    return round(max(extent(frame.seen)) / max(extent(frame.inner)) * frame.model[0] / last[0] / 2)


def _from_pixels(pixels: Image.Image, frame: Frame, last: Size) -> Mask:
    rows, columns = last
    pixels_HW = frame.mask_to_model(pixels)
    cells = pixels_HW.reshape(rows, frame.model[0] // rows, columns, frame.model[1] // columns)
    return Mask(pixels, np.asarray(cells.any(axis=(1, 3))))


def _checked(box: Sequence[float]) -> Box:
    values = tuple(box)
    if len(values) == 4 and all(math.isfinite(v) and 0 <= v <= 1 for v in values):
        x0, y0, x1, y1 = values
        if x0 < x1 and y0 < y1:
            return x0, y0, x1, y1
    raise InputError(
        f"box {','.join(f'{v:g}' for v in values)}: expected x0,y0,x1,y1 with "
        "0 <= x0 < x1 <= 1 and 0 <= y0 < y1 <= 1, shares of width and height"
    )


def _cell(value: float, axis: int, frame: Frame, last: Size) -> int:
    """The border of the token grid nearest to `value` (of the whole image) along an axis."""
    length, before, behind = frame.size[axis], frame.seen[axis], frame.seen[axis + 2]
    start, end = frame.inner[axis], frame.inner[axis + 2]
    # For a square image every factor is 1 and every offset 0, so that halves stay exact.
    within = (value - before / length) * (length / (behind - before))
    # An axis is 0 across and 1 down, in a size it is the other way round.
    pixels, cells = frame.model[1 - axis], last[1 - axis]
    placed = within * ((end - start) / pixels) + start / pixels
    return min(max(round(placed * cells), 0), cells)


def _grown(mask_HW: NDArray[np.bool_], radius: int) -> NDArray[np.bool_]:
    """True wherever a square of (2 radius + 1)^2 around the pixel holds a True."""
    for axis in (0, 1):
        ends = [(0, 0), (0, 0)]
        ends[axis] = (radius + 1, radius)
        sums = np.cumsum(np.pad(mask_HW, ends), axis=axis, dtype=np.int32)
        count = mask_HW.shape[axis]
        later = np.take(sums, range(2 * radius + 1, 2 * radius + 1 + count), axis=axis)
        mask_HW = later > np.take(sums, range(count), axis=axis)
    return mask_HW
