"""From an image of any size to the model's square, by crop or pad, and back by pasting.

    crop: the centred square of the shorter side is resized to S x S
    pad:  the whole image is resized to fit into S x S, centred, its edge pixels repeated around it
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

Fit = Literal["crop", "pad"]
FITS: tuple[Fit, ...] = ("crop", "pad")
Rectangle = tuple[int, int, int, int]


@dataclass(frozen=True)
class Frame:
    """The part of an image that the model sees, and its place in the model's square.

    size: (width, height) of the image. side: S. seen: (left, top, right, bottom) in pixels of the
    image; inner: the same part in pixels of the square.
    """

    size: tuple[int, int]
    side: int
    seen: Rectangle
    inner: Rectangle

    @classmethod
    def of(cls, size: tuple[int, int], side: int, fit: str) -> Frame:
        """The frame for an image of `size`. Raises `InputError` for an unknown `fit`."""
        if fit not in FITS:
            raise InputError(f"fit {fit!r}: unknown, expected {' or '.join(FITS)}")
        width, height = size
        if fit == "crop":
            short = min(size)
            left, top = (width - short) // 2, (height - short) // 2
            return cls(size, side, (left, top, left + short, top + short), (0, 0, side, side))
        # Even a very long image is at least one pixel high.
        across, down = (max(1, round(length * side / max(size))) for length in size)
        left, top = (side - across) // 2, (side - down) // 2
        return cls(size, side, (0, 0, width, height), (left, top, left + across, top + down))

    def to_model(self, image: Image.Image) -> Image.Image:
        """RGB of `size` -> RGB (S, S)."""
        content = image.resize(extent(self.inner), Image.Resampling.LANCZOS, box=self.seen)
        left, top, right, bottom = self.inner
        around = ((top, self.side - bottom), (left, self.side - right), (0, 0))
        return Image.fromarray(np.pad(np.asarray(content), around, mode="edge"))

    def mask_to_model(self, mask: Image.Image) -> NDArray[np.bool_]:
        """A mask "L" of `size` -> (S, S): True where any of its pixels is above 0."""
        # In floats: one white pixel among thousands would be rounded to black.
        share = mask.convert("F").resize(
            extent(self.inner), Image.Resampling.BOX, box=self.seen, reducing_gap=None
        )
        left, top, right, bottom = self.inner
        square = np.zeros((self.side, self.side), bool)
        square[top:bottom, left:right] = np.asarray(share) > 0
        return square

    def paste(self, image: Image.Image, generated: Image.Image, weight: Image.Image) -> Image.Image:
        """`image` (RGB or RGBA, of `size`) under `generated` (RGB, (S, S)), in the mode of `image`.

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


def extent(rectangle: Rectangle) -> tuple[int, int]:
    """(width, height)."""
    left, top, right, bottom = rectangle
    return right - left, bottom - top
