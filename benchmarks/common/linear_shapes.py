"""The Linear layers of VAR-d16 at 256 px, the schemes they are timed with, and memory targets."""

from __future__ import annotations

from typing import NamedTuple

# Rows of the ten scales, with guidance.
ROWS = (2, 8, 18, 32, 50, 72, 128, 200, 338, 512)
DEPTH = 16
# Name, inputs, outputs, times in an image per scale (0: ada_lin, once an image at M = 2).
LAYERS = (
    ("qkv", 1024, 3072, DEPTH),
    ("proj", 1024, 1024, DEPTH),
    ("fc1", 1024, 4096, DEPTH),
    ("fc2", 4096, 1024, DEPTH),
    ("head", 1024, 4096, 1),
    ("ada_lin", 1024, 6144, 0),
)


# At most this much resident memory for loading and one image.
MOST_BYTES = {"w8a8": 0.80e9, "w4a8": 0.65e9, "w4a4": 0.65e9}


class Scheme(NamedTuple):
    """Bits of rows and weights, and their groups; with groups uniform steps below 6 bits, where
    there are codebooks otherwise."""

    row_bits: int
    weight_bits: int
    row_group: int | None = None
    weight_group: int | None = None

    @property
    def books(self) -> tuple[bool, bool]:
        """Whether rows and weights are on codebooks."""
        grouped = self.row_group or self.weight_group
        return (not grouped and self.row_bits < 6, not grouped and self.weight_bits < 6)


SCHEMES = {
    "W8A8": Scheme(8, 8),
    "W6A6": Scheme(6, 6),
    "W4A8": Scheme(8, 4),
    "W4A4": Scheme(4, 4),
    "W3A8": Scheme(8, 3),
    "W2A8": Scheme(8, 2),
    "W4A8 in groups": Scheme(8, 4, None, 128),
    "W4A4 in groups": Scheme(4, 4, 64, 128),
}
