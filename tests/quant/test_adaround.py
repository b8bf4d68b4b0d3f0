"""Learned rounding: where it starts, where it ends, and that its derivatives are safe."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from varptq.quant import adaround
from varptq.quant.affine import Grid, affine_codes, affine_grid, affine_values
from varptq.quant.codebook import codebook_codes, codebook_grid, codebook_values, entries
from varptq.quant.layers import LearnedRounding

BITS = st.integers(2, 8)


def weight(seed: int, rows: int = 3, width: int = 37) -> Tensor:
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(seed))


@settings(deadline=None)
@given(BITS, st.integers(0, 99))
def test_starts_at_the_float_weight_and_at_nearest_rounding(num_bits: int, seed: int) -> None:
    w = weight(seed)
    grid = affine_grid(w, num_bits)
    alpha, floor = adaround.init_alpha(w, grid), adaround.floor_codes(w, grid)
    # The ends of the range may lie half a step outside the codes; the soft weight is clamped there.
    inside = (floor >= 0) & (floor < 2**num_bits - 1)
    soft = affine_values(adaround.soft_codes(floor, alpha, num_bits), grid)
    torch.testing.assert_close(soft[inside], w[inside], rtol=0, atol=1e-5)
    hard = adaround.hard_codes(floor, alpha, num_bits)
    # At a tie, nearest rounds to even and alpha = 0 up.
    decided = alpha.abs() > 1e-4
    assert torch.equal(hard[decided], affine_codes(w, grid, num_bits)[decided])


@settings(deadline=None)
@given(BITS, st.integers(0, 99))
def test_codes_stay_in_range_for_any_alpha(num_bits: int, seed: int) -> None:
    w = weight(seed)
    grid = affine_grid(w, num_bits)
    floor = adaround.floor_codes(w, grid)
    for alpha in (weight(seed + 1) * 5, torch.full_like(w, 1e9), torch.full_like(w, -1e9)):
        hard = adaround.hard_codes(floor, alpha, num_bits)
        assert torch.equal(hard, hard.round())
        for codes in (hard, adaround.soft_codes(floor, alpha, num_bits)):
            assert float(codes.min()) >= 0 and float(codes.max()) <= 2**num_bits - 1


def test_soft_meets_hard_once_alpha_is_decided() -> None:
    w = weight(0)
    grid = affine_grid(w, 4)
    floor = adaround.floor_codes(w, grid)
    alpha = torch.sign(adaround.init_alpha(w, grid)) * 3
    soft, hard = adaround.soft_codes(floor, alpha, 4), adaround.hard_codes(floor, alpha, 4)
    assert torch.equal(soft, hard)
    assert float(adaround.regularizer(alpha, 2.0)) == 0.0


@pytest.mark.parametrize("fraction", [0.0, 1e-7, 0.25, 0.5, 0.75, 1 - 1e-6])
def test_alpha_inverts_h(fraction: float) -> None:
    grid = Grid(torch.ones(1, 1), torch.zeros(1, 1))
    w = torch.tensor([[fraction]])
    h = adaround.soft_target(adaround.init_alpha(w, grid))
    torch.testing.assert_close(h, w, rtol=0, atol=1e-6)


def test_undecided_alpha_rounds_up() -> None:
    floor, alpha = torch.tensor([3.0, 3.0, 3.0]), torch.tensor([-1e-6, 0.0, 1e-6])
    assert adaround.hard_codes(floor, alpha, 4).tolist() == [3, 4, 4]


def test_alpha_is_finite_just_below_an_integer() -> None:
    """floor(-1e-9) = -1 leaves a fraction that rounds to 1 in float32."""
    grid = Grid(torch.ones(1, 1), torch.zeros(1, 1))
    w = torch.tensor([[-1e-9, -1e-30, 7.0, 1e30, -1e30]])
    assert bool(torch.isfinite(adaround.init_alpha(w, grid)).all())


@pytest.mark.parametrize("beta", [2.0, 7.5, 20.0])
def test_regularizer_and_its_gradient_are_finite_everywhere(beta: float) -> None:
    alpha = torch.tensor([-1e9, -3.0, -1e-8, 0.0, 1e-8, 3.0, 1e9], requires_grad=True)
    penalty = adaround.regularizer(alpha, beta)
    penalty.backward()
    assert alpha.grad is not None and bool(torch.isfinite(alpha.grad).all())
    assert float(penalty.detach()) == pytest.approx(3.0, abs=1e-5), "one for each undecided alpha"


def test_regularizer_pushes_away_from_the_middle() -> None:
    alpha = torch.tensor([-0.5, 0.5], requires_grad=True)
    adaround.regularizer(alpha, 2.0).backward()
    assert alpha.grad is not None
    assert float(alpha.grad[0]) > 0 > float(alpha.grad[1])


def test_gradient_reaches_alpha_only() -> None:
    w = weight(2)
    grid = affine_grid(w, 4)
    alpha = adaround.init_alpha(w, grid).requires_grad_()
    floor = adaround.floor_codes(w, grid)
    affine_values(adaround.soft_codes(floor, alpha, 4), grid).square().sum().backward()
    assert alpha.grad is not None and float(alpha.grad.abs().sum()) > 0
    assert not floor.requires_grad and not grid.scale.requires_grad


def test_training_finds_a_better_rounding_than_nearest() -> None:
    """Two weights that always see the same input: rounding one up and one down halves the error
    of nearest.
    """
    grid = Grid(torch.ones(1, 1), torch.zeros(1, 1))
    w = torch.tensor([[2.4, 3.4]])
    floor = adaround.floor_codes(w, grid)
    alpha = adaround.init_alpha(w, grid).requires_grad_()
    optimizer = torch.optim.Adam([alpha], lr=0.05)
    for step in range(400):
        error = (adaround.soft_codes(floor, alpha, 4).sum() - w.sum()).square()
        beta = adaround.linear_beta(step, 400)
        loss = error + 0.3 * adaround.regularizer(alpha + torch.tensor([[0.3, 0.0]]), beta)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    hard = adaround.hard_codes(floor, alpha.detach(), 4)
    assert abs(float(hard.sum() - w.sum())) < 0.5 < abs(float(w.round().sum() - w.sum()))


def test_linear_beta() -> None:
    assert adaround.linear_beta(0, 10) == 20.0
    assert adaround.linear_beta(10, 10) == 2.0
    assert adaround.linear_beta(11, 10) == 2.0
    assert adaround.linear_beta(5, 10) == pytest.approx(11.0)
    assert adaround.linear_beta(3, 10, 20.0, 2.0, warmup=0.5) == 20.0
    assert adaround.linear_beta(10, 10, 20.0, 2.0, warmup=1.0) == 20.0
    betas = [adaround.linear_beta(t, 100, 20.0, 2.0, 0.2) for t in range(101)]
    assert betas == sorted(betas, reverse=True)


@pytest.mark.parametrize("num_bits", [2, 4, 6])
def test_between_entries_of_a_table(num_bits: int) -> None:
    """The soft weight starts as the float one where the table reaches, the hard one as the nearest
    entry, and either choice is an entry beside the float weight."""
    x = torch.randn(5, 1, 40, generator=torch.Generator().manual_seed(num_bits))
    x[0] = 0.0
    grid, table = codebook_grid(x, num_bits), entries(num_bits)
    plain = Grid(grid.scale, grid.zero_point)
    rounding = LearnedRounding(x, plain, num_bits, hard=False, table=table)
    values = table.float() * grid.scale
    inside = (x >= values.amin(-1, keepdim=True)) & (x <= values.amax(-1, keepdim=True))
    soft = rounding.weight().view_as(x)
    assert torch.allclose(soft[inside], x[inside], atol=1e-5)
    nearest = codebook_values(codebook_codes(x, plain, num_bits), plain, num_bits)
    rounding.hard = True
    hard = rounding.weight().view_as(x)
    assert torch.allclose((hard - x).abs(), (nearest - x).abs(), atol=1e-6)
    codes = rounding.hard_codes()
    assert torch.equal(codebook_values(codes, plain, num_bits), hard)
    hard.sum().backward()
    gap = rounding.alpha.grad
    assert gap is not None and bool((gap[1:] >= 0).all()) and float(gap[1:].max()) > 0
    with torch.no_grad():
        rounding.alpha.neg_()
    other = rounding.hard_codes()
    moved = (codes - other).abs()
    assert bool((moved[rounding.alpha.abs() > 0] == 1).all())
