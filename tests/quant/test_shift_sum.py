"""Shift-and-sum against the sum over shifted copies it stands for, its error bound, and the order
rule.
"""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from varptq.quant.affine import Grid, affine_fake, affine_grid, affine_values
from varptq.quant.shift_sum import (
    copies_of,
    orders,
    shift_sum_codes,
    shift_sum_fake,
    shift_sum_integers,
)

ORDERS = (0, 1, 2, 3)


def codes_from_copies(v: Tensor, grid: Grid, order: Tensor, num_bits: int) -> Tensor:
    """The definition in the paper: average 2^n roundings of shifted values, then zero point and
    clamp.
    """
    codes = torch.empty_like(v)
    for n in order.unique().tolist():
        copies = 2 ** int(n)
        shifts = [(2 * i + 1) / (2 * copies) for i in range(-copies // 2, copies // 2)]
        shifts = [0.0] if copies == 1 else shifts
        mean = sum(torch.round(v / grid.scale + shift) for shift in shifts) / copies
        codes = torch.where((order == n).unsqueeze(-1), mean + grid.zero_point, codes)
    return codes.clamp(0, 2**num_bits - 1)


def values(seed: int, keys: int = 12, width: int = 37) -> Tensor:
    """Float64 values on no grid: exact half-steps do not occur."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(2, 3, keys, width, generator=generator, dtype=torch.float64)


def some_orders(v: Tensor) -> Tensor:
    """Every order in every head, (B, H, L)."""
    return torch.arange(v.shape[-2]).remainder(4).expand(v.shape[:-1])


@settings(deadline=None)
@given(st.integers(2, 8), st.integers(0, 99))
def test_equals_the_copies(num_bits: int, seed: int) -> None:
    v = values(seed)
    grid = affine_grid(v, num_bits, (-2, -1), "min_max")
    order = some_orders(v)
    expected = codes_from_copies(v, grid, order, num_bits)
    assert torch.equal(shift_sum_codes(v, grid, order, num_bits), expected)


@settings(deadline=None)
@given(st.integers(2, 8), st.integers(0, 99), st.sampled_from(ORDERS))
def test_error_bound_of_the_paper(num_bits: int, seed: int, n: int) -> None:
    """|v - f(v)| <= s / (2N), the paper's s / (4 order) with order = N/2, wherever the clamp is
    not met.
    """
    v = values(seed)
    grid = affine_grid(v, num_bits, (-2, -1), "min_max")
    order = torch.full(v.shape[:-1], n)
    codes = shift_sum_codes(v, grid, order, num_bits)
    inside = (codes > 0) & (codes < 2**num_bits - 1)
    error = (affine_values(codes, grid) - v).abs()
    bound = grid.scale / 2 ** (n + 1) * (1 + 1e-9)
    assert bool((error <= bound)[inside].all())
    # At the two ends the range is that of the plain grid, whatever the order.
    assert bool((error <= grid.scale / 2 * (1 + 1e-9)).all())


@pytest.mark.parametrize("n", ORDERS)
def test_ties_differ_from_the_copies_by_one_fine_step(n: int) -> None:
    """v / s exactly between two fine steps: the copies and the finer grid may choose different
    neighbours.
    """
    copies = 2**n
    steps = (torch.arange(-40, 40, dtype=torch.float64) + 0.5) / copies
    v = steps[(steps > -5) & (steps < 5)].view(1, 1, 1, -1)
    grid = Grid(torch.ones(1, 1, 1, 1, dtype=torch.float64), torch.full((1, 1, 1, 1), 8.0).double())
    order = torch.full((1, 1, 1), n)
    ours, theirs = shift_sum_codes(v, grid, order, 4), codes_from_copies(v, grid, order, 4)
    assert float((ours - theirs).abs().max()) <= 1 / copies
    for codes in (ours, theirs):
        error = (codes - 8 - v).abs()
        assert bool((error == 0.5 / copies).all())


@settings(deadline=None)
@given(st.integers(2, 8), st.integers(0, 99))
def test_order_zero_is_the_plain_quantizer(num_bits: int, seed: int) -> None:
    v = values(seed).float()
    grid = affine_grid(v, num_bits, (-2, -1))
    zero = torch.zeros(v.shape[:-1], dtype=torch.int64)
    assert torch.equal(shift_sum_fake(v, grid, zero, num_bits), affine_fake(v, num_bits, (-2, -1)))


@settings(deadline=None)
@given(st.integers(2, 8), st.integers(0, 99))
def test_one_wide_integer_holds_all_copies(num_bits: int, seed: int) -> None:
    v = values(seed).float()
    grid = affine_grid(v, num_bits, (-2, -1))
    order = some_orders(v)
    wide = shift_sum_integers(v, grid, order, num_bits)
    copies = copies_of(order, torch.float32)
    assert wide.dtype == torch.int16
    assert bool(((wide >= 0) & (wide <= copies * (2**num_bits - 1))).all())
    assert bool((wide < 2.0**num_bits * copies).all()), "b + n bits"
    fine = Grid(grid.scale / copies, grid.zero_point * copies)
    assert torch.equal(affine_values(wide, fine), shift_sum_fake(v, grid, order, num_bits))


@settings(deadline=None)
@given(st.integers(0, 99), st.floats(1e-3, 1.0), st.integers(0, 3))
def test_orders_follow_the_formula(seed: int, theta: float, max_order: int) -> None:
    abar = torch.rand(2, 3, 37, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    abar[..., 0] = 0.0
    logs = [math.ceil(math.log2(a / theta)) if a > 0 else 0 for a in abar.flatten().tolist()]
    expected = torch.tensor([min(max(n, 0), max_order) for n in logs]).view_as(abar)
    found = orders(abar, theta, max_order)
    assert found.dtype == torch.int64
    assert torch.equal(found, expected)


def test_orders_at_the_thresholds() -> None:
    """An order starts above theta 2^(n-1): at the threshold itself the logarithm is an integer
    already.
    """
    theta = 0.125
    abar = torch.tensor([0.0, 0.125, 0.25, 0.5, 1.0])
    assert orders(abar, theta).tolist() == [0, 0, 1, 2, 3]
    assert orders(torch.nextafter(abar, torch.tensor(2.0)), theta).tolist() == [0, 1, 2, 3, 3]
    assert orders(abar, 1.0).tolist() == [0] * 5, "theta = 1 makes no copies: a mean is at most 1"


@settings(deadline=None)
@given(st.integers(0, 99))
def test_larger_theta_never_raises_an_order(seed: int) -> None:
    abar = torch.rand(37, generator=torch.Generator().manual_seed(seed))
    assume(float(abar.max()) > 0.1)
    assert bool((orders(abar, 0.05) >= orders(abar, 0.06)).all())


def test_gradient_passes_straight_for_every_order() -> None:
    v = values(0).float()
    grid = affine_grid(v, 4, (-2, -1))
    tracked = v.clone().requires_grad_()
    order = some_orders(v)
    codes = shift_sum_codes(tracked, grid, order, 4)
    affine_values(codes, grid).sum().backward()
    assert tracked.grad is not None
    inside = (codes > 0) & (codes < 15)
    torch.testing.assert_close(tracked.grad[inside], torch.ones(int(inside.sum())))
    assert torch.equal(codes.detach(), shift_sum_codes(v, grid, order, 4))


def test_bfloat16_keeps_the_fine_grid() -> None:
    """At 8 bits bfloat16 cannot hold v / s to 1/16; the arithmetic must be float32."""
    v = values(1).bfloat16()
    grid = affine_grid(v, 8, (-2, -1))
    order = some_orders(v)
    codes = shift_sum_codes(v, grid, order, 8)
    assert torch.equal(codes, shift_sum_codes(v.float(), grid, order, 8))
    assert shift_sum_fake(v, grid, order, 8).dtype == torch.bfloat16
