"""The codebook quantizer: weights, Linear inputs, q, k and v whose values are close to Gaussian.

    start = rms(x) reach            reach = top / 127, the unit of the entries at deviation 1
    code  = index of the entry c nearest to x / start
    s     = <x, c> / <c, c>         least squares, once the entries are known
    x^    = s c

The entries are the optimal codebook of a unit Gaussian (Lloyd 1957, Max 1960) in signed bytes, the
largest 127, so a whole row times a whole row is one product of int8. They are symmetric and none is
0. |x| on a border takes the larger entry, 0 the smallest positive one. Codes chosen again at s
would be nearer to x, but s would not fit them: <x, x^> = <x^, x^> is what scores of attention need.

s and start are 0 for a slice of zeros, or where one of them is no normal float: x^ is then exactly
0. 2^k x gives the codes of x. Scales are float sums, so their order is part of the definition
(`ordered_sum`).
Pure functions on tensors; computed in float32, or in float64 for float64.
"""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from varptq.quant.affine import LEAST_SCALE, Dims, Grid, wide
from varptq.quant.straight_through import passed

# The positive half of the entries, by number of bits, and the value at deviation 1 that 127 stands
# for. `tests/quant/test_codebook.py` computes both.
HALVES: dict[int, tuple[int, ...]] = {
    2: (38, 127),
    3: (14, 45, 79, 127),
    4: (6, 18, 31, 44, 58, 75, 96, 127),
    5: (3, 8, 13, 18, 24, 29, 35, 41, 47, 54, 61, 70, 79, 90, 105, 127),
    6: (
        *(1, 3, 6, 8, 10, 13, 15, 17, 20, 22, 24, 27, 30, 32, 35, 38),
        *(40, 43, 46, 49, 53, 56, 60, 64, 68, 73, 78, 84, 91, 99, 110, 127),
    ),
}
TOPS = {2: 1.5104176, 3: 2.1519457, 4: 2.7325896, 5: 3.2607325, 6: 3.7441013}
LARGEST = 127
# Numbers from which on a table of sizes is faster than searching between borders.
MANY = 2**15
# Borders are halves of whole numbers, so twice a size, cut to a whole number, says how many it has
# reached. All of them are at or below this.
LAST_BORDER = 255
# Numbers whose squares of entries add up to less than 2^31.
SHORT = 2**17


class BookGrid(NamedTuple):
    """Of slices that are quantized on their own: a `Grid`, and what x is divided by when its codes
    are chosen. On a plain `Grid`, as of a weight whose scale is fitted, that is the scale."""

    scale: Tensor
    zero_point: Tensor
    start: Tensor


def entries(num_bits: int, device: torch.device | None = None) -> Tensor:
    """(2^b,) int8, ascending: what code i stands for, in units of the scale."""
    half = torch.tensor(HALVES[num_bits], dtype=torch.int8, device=device)
    return torch.cat((-half.flip(0), half))


def reach(num_bits: int) -> float:
    """The scale of a slice over its deviation, before least squares."""
    return TOPS[num_bits] / LARGEST


def ordered_sum(x: Tensor) -> Tensor:
    """The sum over the last axis, (..., n) to (..., 1), in an order that does not depend on who
    adds: filled up with zeros to a power of two, then the second half onto the first until one
    number is left."""
    size = 1 << (x.shape[-1] - 1).bit_length()
    x = F.pad(x, (0, size - x.shape[-1]))
    while size > 1:
        size //= 2
        x = x[..., :size] + x[..., size:]
    return x


def codebook_grid(x: Tensor, num_bits: int, dims: Dims = -1) -> BookGrid:
    """Scale and start (..., 1), zero points 0, of the slices of x (..., n) over its last axis."""
    return _fitted(x, num_bits, dims)[0]


def codebook_fake(x: Tensor, num_bits: int, dims: Dims = -1) -> Tensor:
    """x^ (..., n) on the grid of x, in the dtype of x; the gradient goes to x as it is."""
    with torch.no_grad():
        grid, found = _fitted(x, num_bits, dims)
        values = found.to(grid.scale.dtype) * grid.scale
    return passed(x, values.to(x.dtype))


def codebook_codes(x: Tensor, grid: Grid | BookGrid, num_bits: int) -> Tensor:
    """Codes of x, integer-valued floats in [0, 2^b - 1], in the dtype of the grid."""
    unit = grid.start if isinstance(grid, BookGrid) else grid.scale
    return _codes(x.to(unit.dtype), unit, num_bits).to(unit.dtype)


def codebook_values(codes: Tensor, grid: Grid | BookGrid, num_bits: int) -> Tensor:
    """The real values of codes (float or integer dtype), in the dtype of the grid."""
    return _entries_of(codes, num_bits).to(grid.scale.dtype) * grid.scale


def _fitted(x: Tensor, num_bits: int, dims: Dims) -> tuple[BookGrid, Tensor]:
    """The grid of x and its entries on that, int8.

    Sums are taken of x over a power of two near its largest number, so no square overflows or is
    lost.
    """
    assert dims == -1, "sums have an order along the last axis only"
    x = wide(x)
    unit = _power_below(x.abs().amax(-1, keepdim=True))
    x = x / unit
    mean = ordered_sum(x.square()) / torch.full_like(unit, x.shape[-1])
    # Rounded once: torch's root of a float32 may be the number beside it, depending on the CPU.
    deviation = mean.double().sqrt().to(mean.dtype)
    start = deviation * torch.full_like(unit, reach(num_bits))
    codes = _codes(x, start, num_bits)
    found = _entries_of(codes, num_bits)
    # Exact, and rounded once.
    whole = found.to(torch.int32 if x.shape[-1] <= SHORT else torch.int64)
    squares = (whole * whole).sum(-1, keepdim=True, dtype=whole.dtype).to(x.dtype)
    scale = ordered_sum(x * found.to(x.dtype)) / squares * unit
    start = start * unit
    normal = torch.minimum(scale, start) >= LEAST_SCALE
    scale, start = (torch.where(normal, part, 0.0) for part in (scale, start))
    return BookGrid(scale, torch.zeros_like(scale), start), found


class Tables(NamedTuple):
    """All entries, the borders between the sizes of the positive ones, and how many borders are at
    or below half of 0, 1 .. LAST_BORDER; nobody changes them."""

    entries: Tensor
    borders: Tensor
    reached: Tensor


def _tables(num_bits: int, dtype: torch.dtype, device: torch.device) -> Tables:
    # A graph of torch.compile keeps its own.
    make = _made if torch.compiler.is_compiling() else _kept
    return make(num_bits, dtype, device)


def _made(num_bits: int, dtype: torch.dtype, device: torch.device) -> Tables:
    with torch.inference_mode(False):
        half = torch.tensor(HALVES[num_bits], dtype=dtype, device=device)
        borders = (half[1:] + half[:-1]) / 2
        halves = torch.arange(LAST_BORDER + 1, dtype=dtype, device=device) / 2
        reached = torch.bucketize(halves, borders, right=True).to(torch.uint8)
        return Tables(entries(num_bits, device), borders, reached)


_kept = cache(_made)


def _entries_of(codes: Tensor, num_bits: int) -> Tensor:
    table = _tables(num_bits, torch.float32, codes.device).entries
    return _at(table, codes.to(torch.int32))


def _at(table: Tensor, places: Tensor) -> Tensor:
    """table[places], which lies in memory as places do."""
    plain = not torch.compiler.is_compiling() and places.device.type == "cpu"
    if not plain or places.untyped_storage().nbytes() != places.nbytes:
        return table[places]
    # Places fill their memory: looked up in its order, several times as fast.
    found = table.index_select(0, places.as_strided((places.numel(),), (1,)))
    return found.as_strided(places.shape, places.stride())


def _codes(x: Tensor, scale: Tensor, num_bits: int) -> Tensor:
    """uint8 codes of x in units of `scale`; a scale of 0 divides by 1."""
    half = len(HALVES[num_bits])
    above = _borders_reached(x.abs() / torch.where(scale > 0, scale, 1.0), num_bits)
    # Of a negative number the code is that of its size with all bits turned round. In this order
    # the result lies in memory as x does, on which the sums of products behind it depend.
    return (x < 0).to(torch.uint8) * (2 * half - 1) ^ (above + half)


def _borders_reached(size: Tensor, num_bits: int) -> Tensor:
    """uint8: of the borders between the sizes of entries, how many are at or below each size."""
    tables = _tables(num_bits, size.dtype, size.device)
    searching = torch.compiler.is_compiling() or size.device.type != "cpu"
    if searching or size.numel() < MANY:
        found = torch.bucketize(size.contiguous(), tables.borders, right=True, out_int32=True)
        return found.to(torch.uint8)
    # By way of a byte, so that what is no number has a place in the table, too.
    places = (size * 2).clamp_(max=LAST_BORDER).to(torch.uint8).to(torch.int32)
    return _at(tables.reached, places)


def _power_below(largest: Tensor) -> Tensor:
    """The power of two at or below each number, 1 for those below the normal floats."""
    mantissa, _ = torch.frexp(largest)
    return torch.where(largest >= LEAST_SCALE, largest / (2 * mantissa), 1.0)
