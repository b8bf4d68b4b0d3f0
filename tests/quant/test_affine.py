"""The uniform quantizer: codes in range, error bounds, ends of the float range, gradients, half
precision.
"""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from varptq.quant.affine import (
    SCALE_FLOOR,
    Grid,
    RangeRule,
    affine_codes,
    affine_fake,
    affine_grid,
    affine_values,
    from_groups,
    integer_codes,
    round_ste,
    to_groups,
)

BITS = st.integers(2, 8)
RULES: tuple[RangeRule, ...] = ("with_zero", "min_max", "min_max_clamped")
# One element, odd sizes, more than a vector register.
WIDTHS = st.sampled_from([1, 3, 37, 130])
# Half a step, plus float32 rounding of quotient and product relative to the range (256 steps at
# most).
HALF_STEP = 0.5 + 1e-4


def normal(rows: int, width: int, seed: int, scale: float = 1.0, offset: float = 0.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, width, generator=generator) * scale + offset


@settings(deadline=None)
@given(BITS, WIDTHS, st.integers(0, 99), st.floats(1e-3, 1e6), st.floats(-3, 3))
def test_with_zero_codes_are_codes_and_the_error_is_half_a_step(
    num_bits: int, width: int, seed: int, scale: float, offset: float
) -> None:
    x = normal(3, width, seed, scale, offset * scale)
    grid = affine_grid(x, num_bits)
    codes = affine_codes(x, grid, num_bits)
    top = 2**num_bits - 1
    for integers in (codes, grid.zero_point):
        assert torch.equal(integers, integers.round())
        assert float(integers.min()) >= 0 and float(integers.max()) <= top
    # The zero point rounds the range by up to half a step, which the value at its end then misses.
    error = (affine_values(codes, grid) - x).abs()
    assert bool((error <= 2 * HALF_STEP * grid.scale).all())
    inside = (codes > 0) & (codes < top)
    assert bool((error <= HALF_STEP * grid.scale)[inside].all())


@settings(deadline=None)
@given(BITS, st.integers(0, 99), st.sampled_from(RULES))
def test_values_of_codes_come_back_as_the_same_codes(
    num_bits: int, seed: int, rule: RangeRule
) -> None:
    grid = affine_grid(normal(5, 37, seed), num_bits, -1, rule)
    codes = torch.arange(2.0**num_bits).expand(5, -1)
    assert torch.equal(affine_codes(affine_values(codes, grid), grid, num_bits), codes)


@settings(deadline=None)
@given(BITS, st.integers(0, 99))
def test_zero_is_exact_with_zero_in_the_range(num_bits: int, seed: int) -> None:
    x = normal(4, 37, seed, offset=20.0)
    x[:, 0] = 0.0
    assert torch.equal(affine_fake(x, num_bits)[:, 0], torch.zeros(4))


@settings(deadline=None)
@given(BITS, st.integers(0, 99))
def test_more_bits_are_never_much_worse(num_bits: int, seed: int) -> None:
    x = normal(2, 130, seed)
    errors = [float((affine_fake(x, b) - x).square().mean()) for b in (num_bits, num_bits + 1)]
    assert errors[1] <= errors[0]


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("num_bits", [2, 4, 8])
@pytest.mark.parametrize(
    "row",
    [
        pytest.param([0.0, 0.0, 0.0], id="zeros"),
        pytest.param([1e-40, -1e-41, 1e-45], id="denormal"),
        pytest.param([5.0, 5.0, 5.0], id="constant"),
        pytest.param([-3e32, -3e32, -3e32], id="large constant"),
        pytest.param([3e38, 3e38, 3e38], id="constant near the end"),
        pytest.param([-3e38, -3e38, -3e38], id="negative constant near the end"),
        pytest.param([-2e38, 0.0, 2e38], id="range beyond float32"),
        pytest.param([1e-9, 1.0, 1e30], id="nine decades"),
    ],
)
def test_finite_input_never_gives_nan(row: list[float], num_bits: int, rule: RangeRule) -> None:
    x = torch.tensor([row])
    grid = affine_grid(x, num_bits, -1, rule)
    assert bool(torch.isfinite(grid.scale).all()) and bool(torch.isfinite(grid.zero_point).all())
    assert not bool(torch.isnan(affine_fake(x, num_bits, -1, rule)).any())


@pytest.mark.parametrize("value", [5.0, -0.25, 1e4])
def test_constant_rows(value: float) -> None:
    """with_zero represents a constant exactly; the released rules step by the floor of the scale,
    or collapse.
    """
    x = torch.full((1, 37), value)
    torch.testing.assert_close(affine_fake(x, 4), x, rtol=1e-6, atol=0)
    unclamped = affine_fake(x, 4, -1, "min_max")
    torch.testing.assert_close(unclamped, x, rtol=1e-6, atol=SCALE_FLOOR)
    collapsed = affine_fake(x, 4, -1, "min_max_clamped")
    assert float(collapsed.abs().max()) <= 15 * SCALE_FLOOR


@pytest.mark.parametrize("num_bits", range(2, 9))
def test_a_row_of_one_sign_survives_with_zero_and_collapses_clamped(num_bits: int) -> None:
    """Weights in [10, 11]: the case the released weight quantizer turns into at most 1."""
    x = torch.linspace(10, 11, 130).unsqueeze(0)
    assert float((affine_fake(x, num_bits) - x).abs().max()) <= 11 / (2**num_bits - 1) / 2 * 1.001
    assert float(affine_fake(x, num_bits, -1, "min_max_clamped").max()) <= 1.0001


def test_rounds_half_to_even() -> None:
    x = torch.tensor([[0.0, 0.5, 1.5, 2.5, 3.5, 15.0]])
    assert affine_codes(x, affine_grid(x, 4), 4).tolist() == [[0, 0, 2, 2, 4, 15]]


@pytest.mark.parametrize("dims", [-1, -2, (-2, -1), (1, 3)])
def test_one_scale_per_slice(dims: int | tuple[int, ...]) -> None:
    x = normal(6, 4 * 37, 0).view(2, 3, 4, 37)
    grid = affine_grid(x, 4, dims)
    reduced = {d % 4 for d in ((dims,) if isinstance(dims, int) else dims)}
    assert grid.scale.shape == tuple(1 if d in reduced else n for d, n in enumerate(x.shape))
    assert grid.zero_point.shape == grid.scale.shape
    low, high = x.amin(dims, keepdim=True).clamp(max=0), x.amax(dims, keepdim=True).clamp(min=0)
    assert torch.equal(grid.scale, (high - low) / 15)


@settings(deadline=None)
@given(st.integers(1, 5), st.sampled_from([1, 3, 64]))
def test_groups_are_separate_rows(groups: int, size: int) -> None:
    x = normal(2, groups * size, groups)
    cut = to_groups(x, size)
    assert cut.shape == (2, groups, size)
    assert torch.equal(from_groups(cut), x)
    expected = torch.cat([affine_fake(part, 3) for part in x.split(size, dim=1)], dim=1)
    assert torch.equal(from_groups(affine_fake(cut, 3)), expected)
    assert to_groups(x, None) is x


def test_double_precision_stays() -> None:
    x = normal(3, 37, 1).double()
    assert affine_fake(x, 8).dtype == affine_grid(x, 8).scale.dtype == torch.float64


def test_inputs_are_not_modified() -> None:
    x = normal(3, 37, 3)
    grid = affine_grid(x, 4)
    codes = affine_codes(x, grid, 4)
    before = [t.clone() for t in (x, codes, *grid)]
    affine_values(codes, grid)
    affine_fake(x, 4)
    assert all(torch.equal(a, b) for a, b in zip(before, (x, codes, *grid), strict=True))


def test_gradient_passes_rounding_and_stops_at_the_clamp() -> None:
    x = torch.tensor([-9.0, -0.3, 0.0, 0.4, 2.6, 9.0], requires_grad=True)
    grid = Grid(torch.tensor([1.0]), torch.tensor([2.0]))
    affine_values(affine_codes(x, grid, 3), grid).sum().backward()
    assert x.grad is not None
    assert x.grad.tolist() == [0, 1, 1, 1, 1, 0]


def test_gradient_reaches_the_range_unless_the_caller_detaches_it() -> None:
    """With fixed codes, d value / d scale = code - zero_point; the range hands it to the extreme
    elements.
    """
    x = torch.tensor([[-1.0, 0.2, 0.45, 2.0]], requires_grad=True)
    grid = affine_grid(x, 4)
    assert grid.scale.requires_grad
    fixed = Grid(*(t.detach() for t in grid))
    affine_values(affine_codes(x, fixed, 4), fixed).sum().backward()
    assert x.grad is not None and x.grad.tolist() == [[1, 1, 1, 1]]
    x.grad = None
    affine_fake(x, 4).sum().backward()
    assert x.grad is not None
    # x / s = -5, 1, 2.25, 10: only the third is rounded, by -0.25, and s = (max - min) / 15.
    expected = torch.tensor([[1 + 0.25 / 15, 1, 1, 1 - 0.25 / 15]])
    torch.testing.assert_close(x.grad, expected)


def test_round_ste() -> None:
    x = torch.tensor([-2.5, -0.3, 0.49999997, 0.5, 1.5, 8388609.0], requires_grad=True)
    rounded = round_ste(x)
    assert torch.equal(rounded.detach(), x.detach().round())
    rounded.sum().backward()
    assert x.grad is not None and x.grad.tolist() == [1] * 6


def test_integer_codes_decode_like_float_codes() -> None:
    x = normal(3, 37, 4)
    grid = affine_grid(x, 8)
    codes = affine_codes(x, grid, 8)
    assert integer_codes(codes).dtype == torch.uint8
    assert integer_codes(codes - 128, signed=True).dtype == torch.int8
    assert torch.equal(affine_values(integer_codes(codes), grid), affine_values(codes, grid))
