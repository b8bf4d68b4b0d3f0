"""Rotary positions on two axes, laid over one grid at every scale (RoFormer, Su et al. 2021; as in
Infinity, Han et al., CVPR 2025).

Token (i, j) of a map of h x w lies at row round(i U / h) and column round(j V / w) of the grid
(U, V) of the schedule, whatever the scale. Of the c / 2 pairs of channels (2n, 2n + 1) of a head
the first half turns by row w_m, the second by column w_m, with w_m = 10000^(-2m / (c / 2)),
m = 0 .. c / 4 - 1.

Shapes: L tokens of the schedule, l of them in a call, B rows, H heads, c head width.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from varptq.models.scales import Scales

BASE = 10000.0
# Pairs of two channels on each of two axes.
QUANTUM = 4
# Tables of so many schedules are kept.
KEPT = 8


class Rotary(NamedTuple):
    """Tables (L, c / 2) float32 of all tokens of a schedule."""

    cos_Lp: Tensor
    sin_Lp: Tensor

    def turn(self, x_BHlc: Tensor, positions: slice) -> Tensor:
        """The heads of the tokens at `positions`, turned; computed in float32."""
        cos_lp, sin_lp = self.cos_Lp[positions], self.sin_Lp[positions]
        even_BHlp, odd_BHlp = x_BHlc.float().unflatten(-1, (-1, 2)).unbind(-1)
        turned = (even_BHlp * cos_lp - odd_BHlp * sin_lp, even_BHlp * sin_lp + odd_BHlp * cos_lp)
        return torch.stack(turned, dim=-1).flatten(-2).to(x_BHlc.dtype)


def nearest(number: int, side: int, last: int) -> int:
    """round(number * last / side), half to even. In integers: there are hundreds of ties, and
    floating point gets some of them wrong."""
    whole, rest = divmod(number * last, side)
    return whole + int(2 * rest > side or (2 * rest == side and whole % 2 == 1))


def positions(scales: Scales) -> Tensor:
    """(L, 2) int64 row and column of every token on the grid of the schedule."""
    grid = scales.grid or scales.last
    maps: list[Tensor] = []
    for sides in scales.sides:
        rows, columns = (
            torch.tensor(
                [nearest(number, side, last) for number in range(side)],
                dtype=torch.int64,
                device="cpu",
            )
            for side, last in zip(sides, grid, strict=True)
        )
        maps.append(torch.cartesian_prod(rows, columns))
    return torch.cat(maps)


def rotary(scales: Scales, head_width: int, device: torch.device) -> Rotary:
    """The tables of a schedule for heads of `head_width` channels. A graph of torch.compile holds
    them as they are."""
    return _made(scales, head_width, device)


# What `torch.compiler.assume_constant_result` sets, which imports the compiler: two seconds and
# 150 MB of every process that loads a model.
rotary._dynamo_marked_constant = True  # pyright: ignore[reportFunctionMemberAccess]


@lru_cache(maxsize=KEPT)
def _made(scales: Scales, head_width: int, device: torch.device) -> Rotary:
    # They are kept, and may be wanted by a pass with gradients after one without.
    with torch.inference_mode(False):
        # In float32 throughout, as the models were trained: angles go up to 111 radians.
        steps = torch.arange(head_width // QUANTUM, dtype=torch.float32, device="cpu")
        frequencies = 1 / BASE ** (2 * steps / (head_width // 2))
        angles_Lp = (positions(scales).unsqueeze(-1) * frequencies).flatten(1)
        return Rotary(angles_Lp.cos().to(device), angles_Lp.sin().to(device))
