"""What to regenerate: from a picture, the alpha channel or a box, down to every scale.

White is regenerated, black is kept. On the last token grid a cell is regenerated if any of its
pixels is white; a box instead takes round(position * side), half to even, as in the VAR code.
    keep at scale k = bilinear(keep at the last scale, side k) > 0.5; all of a scale of <= 3 tokens
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
from varptq.models.scales import Scales
from varptq.reading import is_opaque

# Scales of so few tokens are always given, as they describe the whole image.
ALWAYS_GIVEN = 3

Box = tuple[float, float, float, float]


@dataclass(frozen=True)
class Mask:
    """pixels: "L" of the image's size, 255 where the image is regenerated. cells_PP: (P, P) bool,
    True for the tokens of the last scale that are."""

    pixels: Image.Image
    cells_PP: NDArray[np.bool_]


def picture_mask(source: MaskLike, frame: Frame, side: int) -> Mask:
    """From a picture of the image's size: white, or at least light grey, is regenerated.

    side: P. Raises `InputError` for another size, or as `read_mask` does.
    """
    picture = read_mask(source)
    if picture.size != frame.size:
        found, expected = (f"{w} x {h}" for w, h in (picture.size, frame.size))
        raise InputError(
            f"mask: {found} pixels, the image has {expected} (upright); make them equal"
        )
    return _from_pixels(picture, frame, side)


def alpha_mask(image: Image.Image, frame: Frame, side: int) -> Mask:
    """From an RGBA image: pixels with alpha below one half are regenerated. side: P."""
    return _from_pixels(ImageChops.invert(is_opaque(image)), frame, side)


def box_mask(box: Sequence[float], frame: Frame, side: int, *, inside: bool) -> Mask:
    """From a rectangle: its inside is regenerated, or everything around it.

    box: (x0, y0, x1, y1) relative to the whole image, 0 left and top, 1 right and bottom. side: P.
    Raises `InputError` for coordinates that are not a rectangle.
    """
    x0, y0, x1, y1 = _checked(box)
    width, height = frame.size
    area = (round(x0 * width), round(y0 * height), round(x1 * width), round(y1 * height))
    back, front = (0, 255) if inside else (255, 0)
    pixels = Image.new("L", frame.size, back)
    pixels.paste(front, area)
    cells = np.full((side, side), not inside)
    rows, columns = (
        slice(*(_cell(value, axis, frame, side) for value in pair))
        for axis, pair in ((1, (y0, y1)), (0, (x0, x1)))
    )
    cells[rows, columns] = inside
    return Mask(pixels, cells)


def keep_mask(cells_PP: NDArray[np.bool_], scales: Scales) -> Tensor:
    """(L,) bool: which tokens are given, for `cells_PP` regenerated at the last scale."""
    keep_11PP = torch.from_numpy(~cells_PP).float()[None, None]
    parts = []
    for side, length in zip(scales.sides, scales.lengths, strict=True):
        resized = F.interpolate(keep_11PP, size=(side, side), mode="bilinear", align_corners=False)
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
    radius = width // 2
    if radius:
        grown = Image.fromarray(_grown(np.asarray(seen) > 0, radius).astype(np.uint8) * 255)
        seen = ImageChops.lighter(seen, grown.filter(ImageFilter.BoxBlur(radius)))
    weight = Image.new("L", pixels.size)
    weight.paste(seen, frame.seen[:2])
    return weight


def feather_width(wanted: int | None, frame: Frame, side: int) -> int:
    """Width in pixels of the image: the given one, or half a token of the last scale. side: P."""
    if wanted is not None:
        return wanted
    return round(max(extent(frame.seen)) / max(extent(frame.inner)) * frame.side / side / 2)


def _from_pixels(pixels: Image.Image, frame: Frame, side: int) -> Mask:
    block = frame.side // side
    square = frame.mask_to_model(pixels).reshape(side, block, side, block)
    return Mask(pixels, np.asarray(square.any(axis=(1, 3))))


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


def _cell(value: float, axis: int, frame: Frame, side: int) -> int:
    """The border of the token grid nearest to `value` (of the whole image) along an axis."""
    length, first, last = frame.size[axis], frame.seen[axis], frame.seen[axis + 2]
    start, end = frame.inner[axis], frame.inner[axis + 2]
    # For a square image every factor is 1 and every offset 0, so that halves stay exact.
    within = (value - first / length) * (length / (last - first))
    placed = within * ((end - start) / frame.side) + start / frame.side
    return min(max(round(placed * side), 0), side)


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
