"""What the codebook quantizer alone promises: its entries, the order of its sums, its scale."""

from __future__ import annotations

import math
from itertools import pairwise
from statistics import NormalDist

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from varptq.quant.affine import Grid
from varptq.quant.codebook import (
    HALVES,
    LARGEST,
    MANY,
    TOPS,
    codebook_codes,
    codebook_grid,
    codebook_values,
    entries,
    ordered_sum,
    reach,
)

WIDTHS = sorted(HALVES)
# Of Lloyd's iteration: the largest change of a level in its last step.
SETTLED = 1e-10
# Mean squared error at deviation 1 (shared by the literature: Max 1960, table I, 2^b levels).
FLOAT_ERROR = {2: 0.1175, 3: 0.03454, 4: 0.009497, 5: 0.002499, 6: 0.000641}
# What rounding the levels to bytes may add to it.
ROUNDING_ERROR = 6e-5
GAUSSIAN = NormalDist()


def lloyd(num_bits: int) -> list[float]:
    """The positive levels of the optimal codebook of a unit Gaussian."""
    half = 2 ** (num_bits - 1)
    # Levels that are optimal as their number grows have density p^(1/3).
    start = NormalDist(0, math.sqrt(3))
    levels = [start.inv_cdf((half + i + 0.5) / (2 * half)) for i in range(half)]
    change = 1.0
    while change > SETTLED:
        borders = [0.0, *((a + b) / 2 for a, b in pairwise(levels))]
        p = [*map(GAUSSIAN.pdf, borders), 0.0]
        c = [*map(GAUSSIAN.cdf, borders), 1.0]
        means = [(p[i] - p[i + 1]) / (c[i + 1] - c[i]) for i in range(half)]
        change = max(abs(a - b) for a, b in zip(levels, means, strict=True))
        levels = means
    return levels


@pytest.mark.parametrize("num_bits", WIDTHS)
def test_entries_are_the_optimal_levels_in_bytes(num_bits: int) -> None:
    levels = lloyd(num_bits)
    assert TOPS[num_bits] == pytest.approx(levels[-1], abs=1e-7)
    rounded = tuple(round(LARGEST * level / levels[-1]) for level in levels)
    assert HALVES[num_bits] == rounded and rounded[0] > 0 and rounded[-1] == LARGEST
    table = entries(num_bits)
    assert table.dtype == torch.int8 and len(table) == 2**num_bits
    assert torch.equal(table, -table.flip(0)) and bool((table.int().diff() > 0).all())


def gaussian_error(num_bits: int) -> float:
    """E (x - x^)^2 of the byte entries at their unit, in closed form."""
    values = (entries(num_bits).double() * reach(num_bits)).tolist()
    ends = [-math.inf, *((a + b) / 2 for a, b in pairwise(values)), math.inf]
    error = 1.0
    for value, (low, high) in zip(values, pairwise(ends), strict=True):
        p = [GAUSSIAN.pdf(end) if math.isfinite(end) else 0.0 for end in (low, high)]
        mass = GAUSSIAN.cdf(high) - GAUSSIAN.cdf(low)
        error += value**2 * mass - 2 * value * (p[0] - p[1])
    return error


@pytest.mark.parametrize("num_bits", WIDTHS)
def test_bytes_cost_next_to_nothing(num_bits: int) -> None:
    error = gaussian_error(num_bits)
    assert error == pytest.approx(FLOAT_ERROR[num_bits], abs=ROUNDING_ERROR)
    x = torch.randn(1, 200_000, generator=torch.Generator().manual_seed(0))
    grid = codebook_grid(x, num_bits)
    found = codebook_values(codebook_codes(x, grid, num_bits), grid, num_bits)
    assert float((found - x).square().mean()) == pytest.approx(error, rel=0.02)


def by_hand(x: list[float]) -> float:
    """`ordered_sum` in float32, one addition after another."""
    size = 1 << (len(x) - 1).bit_length()
    left = [torch.tensor(v, dtype=torch.float32) for v in x]
    left += [torch.tensor(0.0)] * (size - len(x))
    while len(left) > 1:
        middle = len(left) // 2
        left = [a + b for a, b in zip(left[:middle], left[middle:], strict=True)]
    return float(left[0])


@pytest.mark.parametrize("n", [1, 2, 9, 37, 130])
def test_sums_have_one_order(n: int) -> None:
    x = torch.randn(3, n, generator=torch.Generator().manual_seed(n))
    assert ordered_sum(x).squeeze(-1).tolist() == [by_hand(row.tolist()) for row in x]


@st.composite
def slices(draw: st.DrawFn) -> Tensor:
    """(rows, n) float32 of widths that no power of two divides, with ties and rows of zeros."""
    shape = (draw(st.integers(1, 4)), draw(st.sampled_from((1, 3, 9, 60, 1920))))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 9999)))
    x = torch.randn(shape, generator=generator) * 2.0 ** draw(st.integers(-100, 100))
    if draw(st.booleans()):
        x[0] = 0.0
    return x


@given(slices(), st.sampled_from(WIDTHS))
def test_scale_is_least_squares_of_the_first_entries(x: Tensor, num_bits: int) -> None:
    """Against float64 and a search through all entries."""
    scale = codebook_grid(x, num_bits).scale.double()
    table = entries(num_bits).double()
    y = x.double()
    start = y.square().mean(-1, keepdim=True).sqrt() * reach(num_bits)
    far = (y.unsqueeze(-1) - table * start.unsqueeze(-1)).abs()
    c = table[far.argmin(-1)]
    fitted = (y * c).sum(-1, keepdim=True) / c.square().sum(-1, keepdim=True)
    # A number on a border between two entries may go either way.
    ahead = far.sort(-1).values[..., 1] - far.amin(-1)
    clear = ahead.amin(-1, keepdim=True) > 1e-4 * start
    assert torch.allclose(torch.where(clear, scale, fitted), fitted, rtol=1e-5, atol=0)
    assert bool((scale >= 0).all())
    grid = codebook_grid(x, num_bits)
    codes, there = codebook_codes(x, grid, num_bits), grid.scale > 0
    right = (codes == far.argmin(-1)) | (ahead <= 1e-4 * start)
    assert bool((right | ~there).all())
    # Least squares: x^ has the norm that scores of attention need.
    found = codebook_values(codes, grid, num_bits).double()
    both, own = (y * found).sum(-1), found.square().sum(-1)
    assert torch.allclose(both, own, rtol=1e-5, atol=0)


@given(slices(), st.sampled_from(WIDTHS))
def test_on_a_given_scale_the_code_is_the_nearest(x: Tensor, num_bits: int) -> None:
    """As GPTQ asks for them."""
    scale = codebook_grid(x, num_bits).scale * 1.05
    codes = codebook_codes(x, Grid(scale, torch.zeros_like(scale)), num_bits)
    far = (x.double().unsqueeze(-1) - entries(num_bits).double() * scale.unsqueeze(-1)).abs()
    found = far.gather(-1, codes.long().unsqueeze(-1)).squeeze(-1)
    assert bool(((found <= far.amin(-1) * (1 + 1e-5)) | (scale == 0)).all())


@given(slices(), st.sampled_from(WIDTHS))
def test_slices_of_zeros_are_exactly_zero_and_signs_mirror(x: Tensor, num_bits: int) -> None:
    grid = codebook_grid(x, num_bits)
    codes = codebook_codes(x, grid, num_bits)
    values = codebook_values(codes, grid, num_bits)
    assert torch.equal(values.abs().amax(-1) == 0, x.abs().amax(-1) == 0)
    there = x != 0
    mirrored = codebook_codes(-x, grid, num_bits)
    assert torch.equal(mirrored[there], 2**num_bits - 1 - codes[there])


@pytest.mark.parametrize("num_bits", WIDTHS)
def test_borders_and_the_ends_of_the_float_range(num_bits: int) -> None:
    half = torch.tensor(HALVES[num_bits], dtype=torch.float32)
    borders = (half[1:] + half[:-1]) / 2
    one = Grid(torch.ones(1), torch.zeros(1))
    assert torch.equal(
        codebook_values(codebook_codes(borders, one, num_bits), one, num_bits), half[1:]
    )
    below = borders.nextafter(torch.zeros(()))
    assert torch.equal(
        codebook_values(codebook_codes(below, one, num_bits), one, num_bits), half[:-1]
    )
    assert float(codebook_values(codebook_codes(torch.zeros(1), one, num_bits), one, num_bits)) > 0
    x = torch.tensor([[3e38, -3e38, 1.0], [1e-38, 1e-45, 0.0], [1e-45, -1e-45, 0.0]])
    grid = codebook_grid(x, num_bits)
    assert bool(grid.scale.isfinite().all()) and grid.scale.flatten().tolist()[1:] == [0.0, 0.0]
    assert float(grid.scale[0]) > 1e35


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("num_bits", WIDTHS)
def test_many_numbers_at_once_have_the_codes_of_a_few(num_bits: int, dtype: torch.dtype) -> None:
    """On borders, beside them, and anywhere."""
    half = torch.tensor(HALVES[num_bits], dtype=dtype)
    borders = (half[1:] + half[:-1]) / 2
    near = torch.cat((borders, *(borders.nextafter(torch.full_like(borders, e)) for e in (0, 200))))
    x = torch.randn(MANY, dtype=dtype, generator=torch.Generator().manual_seed(0)) * 50
    x = torch.cat((x, near, -near, torch.zeros(2, dtype=dtype)))
    one = Grid(torch.ones(1, dtype=dtype), torch.zeros(1, dtype=dtype))
    few = [codebook_codes(part, one, num_bits) for part in x.split(MANY // 4)]
    assert torch.equal(codebook_codes(x, one, num_bits), torch.cat(few))


@pytest.mark.parametrize("num_bits", WIDTHS)
def test_the_longest_row_fits_int32(num_bits: int) -> None:
    """|sum over K| is at most 127^2 K, for every K that the integer runtimes take."""
    from varptq.runtime.limits import MAX_SEGMENT

    largest = int(entries(num_bits).int().abs().max())
    assert largest**2 * MAX_SEGMENT < 2**31
