"""The schedule of scales: which token belongs to which token map.

A next-scale model writes K square token maps of growing side, concatenated coarse to fine and
row-major inside a map; L is the sum of squared sides. Everything that cuts a sequence by scale asks
this class.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor


@dataclass(frozen=True)
class Scales:
    """Sides of the K token maps, coarse to fine, e.g. (1, 2, 3, 4, 5, 6, 8, 10, 13, 16)."""

    sides: tuple[int, ...]

    def __post_init__(self) -> None:
        if not self.sides or any(side < 1 for side in self.sides):
            raise ValueError(f"sides must be positive, got {self.sides}")

    @classmethod
    def of(cls, sides: Sequence[int]) -> Scales:
        return cls(tuple(int(side) for side in sides))

    @property
    def num_scales(self) -> int:
        """K."""
        return len(self.sides)

    @property
    def lengths(self) -> tuple[int, ...]:
        """Tokens of each scale, side * side."""
        return tuple(side * side for side in self.sides)

    @property
    def ends(self) -> tuple[int, ...]:
        """Tokens in scales 0..k, i.e. the number of keys a query of scale k may see."""
        return tuple(accumulate(self.lengths))

    @property
    def starts(self) -> tuple[int, ...]:
        return (0, *self.ends[:-1])

    @property
    def num_tokens(self) -> int:
        """L."""
        return self.ends[-1]

    @property
    def last_side(self) -> int:
        return self.sides[-1]

    def slices(self) -> tuple[slice, ...]:
        """Position range of each scale."""
        return tuple(slice(a, b) for a, b in zip(self.starts, self.ends, strict=True))

    def scale_of_L(self) -> Tensor:
        """(L,) int64: scale index of each position."""
        scales = [k for k, length in enumerate(self.lengths) for _ in range(length)]
        return torch.tensor(scales, dtype=torch.int64, device="cpu")

    def ratio(self, scale: int) -> float:
        """scale / (K - 1): 0 at the first scale, 1 at the last (0 for a single scale)."""
        return scale / (self.num_scales - 1) if self.num_scales > 1 else 0.0
