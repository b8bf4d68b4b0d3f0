"""The sign-split quantizer: a scale per side, codes in range, gradients of both sides."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from varptq.quant.affine import SCALE_FLOOR
from varptq.quant.sign_split import (
    SignGrid,
    sign_split_codes,
    sign_split_fake,
    sign_split_grid,
    sign_split_levels,
    sign_split_values,
)

HALF_STEP = 0.5 + 1e-4


def gelu_like(rows: int, width: int, seed: int) -> Tensor:
    """What fc2 sees: a short negative side and a long positive one."""
    generator = torch.Generator().manual_seed(seed)
    return F.gelu(3 * torch.randn(rows, width, generator=generator), approximate="tanh")


def oracle(x: float, negative: float, positive: float, levels: int) -> float:
    """One element in float64, sides written apart."""
    scale = negative if x < 0 else positive
    return max(-levels, min(levels, round(x / scale))) * scale


@settings(deadline=None)
@given(st.integers(2, 8), st.sampled_from([1, 3, 37, 130]), st.integers(0, 99))
def test_the_error_is_half_a_step_of_its_side(num_bits: int, width: int, seed: int) -> None:
    x = gelu_like(3, width, seed)
    grid = sign_split_grid(x, num_bits)
    codes = sign_split_codes(x, grid, num_bits)
    assert bool((codes * x >= 0).all()), "a code has the sign of its value"
    step = torch.where(x < 0, grid.negative, grid.positive)
    values = sign_split_values(codes, grid)
    assert bool(((values - x).abs() <= HALF_STEP * step).all())


@settings(deadline=None)
@given(st.integers(2, 8))
def test_values_of_codes_come_back_as_the_same_codes(num_bits: int) -> None:
    grid = sign_split_grid(gelu_like(3, 37, num_bits), num_bits)
    levels = sign_split_levels(num_bits)
    codes = torch.arange(-levels, levels + 1.0).expand(3, -1)
    assert torch.equal(sign_split_codes(sign_split_values(codes, grid), grid, num_bits), codes)
    integers = codes.to(torch.int8)
    assert torch.equal(sign_split_values(integers, grid), sign_split_values(codes, grid))


def test_against_a_loop_in_float64() -> None:
    x = gelu_like(2, 37, 5).double()
    grid = sign_split_grid(x, 4)
    for row, negative, positive, found in zip(
        x, grid.negative, grid.positive, sign_split_fake(x, 4), strict=True
    ):
        expected = [oracle(float(v), float(negative), float(positive), 7) for v in row]
        assert found.tolist() == pytest.approx(expected, rel=1e-12, abs=1e-15)


def test_a_foreign_grid_clamps() -> None:
    """The released group variant has no clamp; values beyond the grid would leave the codes."""
    grid = SignGrid(torch.tensor([0.1]), torch.tensor([1.0]))
    x = torch.tensor([-5.0, -0.3, 0.0, 6.6, 100.0])
    assert sign_split_codes(x, grid, 4).tolist() == [-7, -3, 0, 7, 7]


@pytest.mark.parametrize("num_bits", [2, 4, 8])
@pytest.mark.parametrize(
    "row", [[0.0] * 3, [1e-40, -1e-41, 0.0], [3e38, -3e38, 1.0], [5.0] * 3, [-0.17] * 3]
)
def test_ends_of_the_float_range(row: list[float], num_bits: int) -> None:
    x = torch.tensor([row])
    grid = sign_split_grid(x, num_bits)
    assert float(torch.minimum(grid.negative, grid.positive)) >= 0.99 * SCALE_FLOOR
    assert bool(torch.isfinite(sign_split_fake(x, num_bits)).all())


def test_gradient_is_one_on_both_sides_and_at_zero() -> None:
    """-0.02 and 0.05 both round to 0: their gradient must not take the scale of the other side."""
    x = torch.tensor([[-1.0, -0.02, 0.0, 0.05, 9.0]], requires_grad=True)
    sign_split_fake(x, 4).sum().backward()
    assert x.grad is not None
    # The first and the last element also move the scales.
    torch.testing.assert_close(x.grad[0, 1:-1], torch.ones(3))
