"""Written gradients against the ones that define them, of every row and of rounded weights."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from helpers.quantizer_cases import NAMES, cases, tensors
from varptq.quant import adaround, affine, straight_through

# Sums of a few hundred float64 terms in another order, relative to the largest gradient.
ROUNDING = 1e-12
Fake = Callable[[Tensor], Tensor]


def same(ours: Fake, plain: Fake, x: Tensor) -> None:
    """Equal values to the bit, equal gradients up to the order of sums."""
    copies = [x.clone().requires_grad_() for _ in range(2)]
    outputs = [fake(copy) for fake, copy in zip((ours, plain), copies, strict=True)]
    assert torch.equal(*outputs) and outputs[0].dtype == x.dtype
    generator = torch.Generator().manual_seed(1)
    weights = torch.randn(x.shape, generator=generator, dtype=torch.float64)
    for output in outputs:
        (output * weights).sum().backward()
    found, expected = (copy.grad for copy in copies)
    assert found is not None and expected is not None
    # Sums cancel, so rounding is measured against what went in as well.
    size = max(float(expected.abs().max()), float(weights.abs().max()))
    assert float((found - expected).abs().max()) <= ROUNDING * size
    with torch.no_grad():
        assert torch.equal(ours(copies[0]), outputs[1].detach())


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
@given(st.data(), st.sampled_from((-1, -2, (-2, -1))))
def test_every_row(name: str, data: st.DataObject, dims: affine.Dims) -> None:
    row, spec, x = data.draw(cases(name))
    # Sums of a codebook have an order along the last axis only.
    dims = dims if row.table is None else -1
    same(lambda t: row.straight_through(t, spec, dims), lambda t: row.fake(t, spec, dims), x)


def test_affine_where_codes_are_clamped() -> None:
    """A range of one sign under "min_max_clamped" pushes every code to an end, where no gradient
    passes but that of the scale; the random rows above seldom do."""
    x = torch.linspace(5, 6, 37, dtype=torch.float64).expand(3, 37).contiguous()
    same(
        lambda t: straight_through.affine_fake(t, 4, -1, "min_max_clamped"),
        lambda t: affine.affine_fake(t, 4, -1, "min_max_clamped"),
        x,
    )


@given(tensors(), st.sampled_from((2, 4, 8)))
def test_rounded_weight(x: Tensor, bits: int) -> None:
    grid = affine.affine_grid(x, bits)
    floor = adaround.floor_codes(x, grid)
    alphas = 2 * adaround.init_alpha(x, grid).nan_to_num(0.0, 9.0, -9.0)
    same(
        lambda a: straight_through.rounded_weight(floor, a, grid, bits),
        lambda a: affine.affine_values(adaround.straight_through_codes(floor, a, bits), grid),
        alphas,
    )


def test_there_is_no_second_derivative() -> None:
    x = torch.randn(3, 5, generator=torch.Generator().manual_seed(0)).requires_grad_()
    with pytest.raises(AssertionError, match="second derivatives"):
        torch.autograd.grad(straight_through.affine_fake(x, 4).sum(), x, create_graph=True)
