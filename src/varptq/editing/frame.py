"""From an image of any size to the model's H x W pixels, by crop or pad, and back by pasting.

    crop: the largest centred part of the model's proportions is resized to H x W
    pad:  the whole image is resized to fit into H x W, centred, its edge pixels repeated around it
Back again, the generated part is resized to its size in the image and blended in by a weight per
pixel: 0 leaves the pixel unchanged, bit for bit. Both ways use Lanczos.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from varptq.errors import InputError
from varptq.models.scales import Size

Fit = Literal["crop", "pad"]
FITS: tuple[Fit, ...] = ("crop", "pad")
Rectangle = tuple[int, int, int, int]


@dataclass(frozen=True)
class Frame:
    """The part of an image that the model sees, and its place in the model's picture.

    size: (width, height) of the image. model: (H, W). seen: (left, top, right, bottom) in pixels of
    the image; inner: the same part in pixels of the model's picture.
    """

    size: tuple[int, int]
    model: Size
    seen: Rectangle
    inner: Rectangle

    @classmethod
    def of(cls, size: tuple[int, int], model: Size, fit: str) -> Frame:
        """The frame for an image of `size` and a model that draws (H, W). Raises `InputError` for
        an unknown `fit`."""
        if fit not in FITS:
            raise InputError(f"fit {fit!r}: unknown, expected {' or '.join(FITS)}")
        (width, height), (down, across) = size, model
        is_wider = width * down > height * across
        if fit == "crop":
            # Even of a very long image a pixel is seen.
            part = max(1, round(height * across / down)) if is_wider else width
            tall = height if is_wider else max(1, round(width * down / across))
            return cls(size, model, _centred(size, (part, tall)), (0, 0, across, down))
        wide = across if is_wider else max(1, round(width * down / height))
        high = max(1, round(height * across / width)) if is_wider else down
        return cls(size, model, (0, 0, width, height), _centred((across, down), (wide, high)))

    def to_model(self, image: Image.Image) -> Image.Image:
        """RGB of `size` -> RGB (H, W)."""
        content = image.resize(extent(self.inner), Image.Resampling.LANCZOS, box=self.seen)
        (left, top, right, bottom), (height, width) = self.inner, self.model
        around = ((top, height - bottom), (left, width - right), (0, 0))
        return Image.fromarray(np.pad(np.asarray(content), around, mode="edge"))

    def mask_to_model(self, mask: Image.Image) -> NDArray[np.bool_]:
        """A mask "L" of `size` -> (H, W): True where any of its pixels is above 0."""
        # In floats: one white pixel among thousands would be rounded to black.
        share = mask.convert("F").resize(
            extent(self.inner), Image.Resampling.BOX, box=self.seen, reducing_gap=None
        )
        left, top, right, bottom = self.inner
        placed = np.zeros(self.model, bool)
        placed[top:bottom, left:right] = np.asarray(share) > 0
        return placed

    def paste(self, image: Image.Image, generated: Image.Image, weight: Image.Image) -> Image.Image:
        """`image` (RGB or RGBA, of `size`) under `generated` (RGB, (H, W)), in the mode of `image`.

        weight: "L" of `size`, 0 outside `seen`.
        """
        part = generated.resize(extent(self.seen), Image.Resampling.LANCZOS, box=self.inner)
        overlay = Image.new("RGBA", self.size)
        overlay.paste(part, self.seen[:2])
        overlay.putalpha(weight)
        pasted = Image.alpha_composite(image.convert("RGBA"), overlay).convert(image.mode)
        # The same values are the same colours only with the profile of the input.
        pasted.info = dict(image.info)
        return pasted


def _centred(outer: tuple[int, int], part: tuple[int, int]) -> Rectangle:
    """The rectangle of (width, height) `part` in the middle of `outer`."""
    left, top = ((whole - length) // 2 for whole, length in zip(outer, part, strict=True))
    return left, top, left + part[0], top + part[1]


def extent(rectangle: Rectangle) -> tuple[int, int]:
    """(width, height)."""
    left, top, right, bottom = rectangle
    return right - left, bottom - top
