"""The schedule of scales: which token belongs to which token map.

A next-scale model writes K token maps of growing sides, concatenated coarse to fine and row-major
inside a map; L is the sum of their areas. Everything that cuts a sequence by scale asks this class.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import accumulate
from numbers import Integral
from typing import Any

import torch
from torch import Tensor

from varptq.readable import side

Size = tuple[int, int]


@dataclass(frozen=True, init=False)
class Scales:
    """Height and width of the K token maps, coarse to fine; a side alone stands for a square, e.g.
    (1, 2, 3, 4, 5, 6, 8, 10, 13, 16).

    sides: ((height, width), ..). grid: size of the map that positions refer to, if it is not the
    last map, as in a shorter schedule of the same model.
    """

    sides: tuple[Size, ...]
    grid: Size | None = None

    def __init__(self, sides: Iterable[Any], grid: Size | None = None) -> None:
        object.__setattr__(self, "sides", tuple(map(_size, sides)))
        object.__setattr__(self, "grid", None if grid is None else _size(grid))
        if not self.sides or any(length < 1 for length in self.lengths):
            raise ValueError(f"sides must be positive, got {self.plain()}")

    @property
    def num_scales(self) -> int:
        """K."""
        return len(self.sides)

    @property
    def lengths(self) -> tuple[int, ...]:
        """Tokens of each scale, height * width."""
        return tuple(height * width for height, width in self.sides)

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
    def last(self) -> Size:
        """Height and width of the last map."""
        return self.sides[-1]

    def slices(self) -> tuple[slice, ...]:
        """Position range of each scale."""
        return tuple(slice(a, b) for a, b in zip(self.starts, self.ends, strict=True))

    def scale_of_L(self) -> Tensor:
        """(L,) int64: scale index of each position."""
        lengths_K = torch.tensor(self.lengths, dtype=torch.int64, device="cpu")
        scale_of_K = torch.arange(self.num_scales, dtype=torch.int64, device="cpu")
        return scale_of_K.repeat_interleave(lengths_K)

    def ratio(self, scale: int) -> float:
        """scale / (K - 1): 0 at the first scale, 1 at the last (0 for a single scale)."""
        return scale / (self.num_scales - 1) if self.num_scales > 1 else 0.0

    def plain(self) -> list[int | list[int]]:
        """The sides as plain values: a number for a square, else [height, width]."""
        return [height if height == width else [height, width] for height, width in self.sides]

    def __str__(self) -> str:
        """The sides for people: "1, 2, 3x2"."""
        return ", ".join(map(side, self.plain()))


def _size(value: Any) -> Size:
    height, width = (value, value) if isinstance(value, Integral) else value
    return int(height), int(width)
