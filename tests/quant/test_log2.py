"""The log2 quantizer: exact powers of two, error bounds, zeros, gradient. What it shares with the
others is in test_quantizers.py."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from varptq.quant.log2 import log2_codes, log2_fake, log2_values
from varptq.quant.uniform import row_max, uniform_fake

BITS = range(2, 9)
FLOAT32_ROUNDING = 1e-5


def probabilities(rows: int, width: int, seed: int, sharpness: float = 3.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.softmax(sharpness * torch.randn(rows, width, generator=generator), dim=-1)


@pytest.mark.parametrize("num_bits", BITS)
@pytest.mark.parametrize("largest", [1.0, 0.75, 1 / 3])
def test_log2_is_exact_on_powers_of_two_of_the_maximum(num_bits: int, largest: float) -> None:
    exponents = torch.arange(float(min(2**num_bits, 60)))
    p = (largest * torch.exp2(-exponents)).unsqueeze(0)
    codes = log2_codes(p, row_max(p), num_bits)
    assert torch.equal(codes, exponents.unsqueeze(0))
    assert torch.equal(log2_fake(p, num_bits), p)


@settings(deadline=None)
@given(st.integers(2, 8), st.sampled_from([1, 3, 37, 130]), st.integers(0, 99))
def test_log2_error_is_half_a_power_and_the_tail_is_zero(
    num_bits: int, width: int, seed: int
) -> None:
    p = probabilities(3, width, seed, sharpness=6.0)
    largest = row_max(p)
    codes = log2_codes(p, largest, num_bits)
    values = log2_values(codes, largest, num_bits)
    zero = codes == 2**num_bits
    assert bool((values[zero] == 0).all()) and bool((values[~zero] > 0).all())
    # Below m 2^-45 the shift inside the logarithm shows; such values do not matter to a row.
    ratio = (values / p)[~zero & (p > largest * 2.0**-45)]
    half = math.sqrt(2) * (1 + FLOAT32_ROUNDING)
    assert bool(((ratio <= half) & (ratio >= 1 / half)).all())
    bound = largest * 2.0 ** (0.5 - 2**num_bits) * (1 + FLOAT32_ROUNDING)
    assert bool((p <= bound)[zero].all())


def test_log2_at_two_bits_has_four_powers_and_zero() -> None:
    p = torch.tensor([[1.0, 0.5, 0.25, 0.125, 0.0625, 0.0]])
    assert log2_fake(p, 2).tolist() == [[1.0, 0.5, 0.25, 0.125, 0.0, 0.0]]


@pytest.mark.parametrize("num_bits", BITS)
def test_zeros(num_bits: int) -> None:
    """A zero, e.g. of a masked key, stays below float32's resolution of the row; a row of zeros
    is no NaN.
    """
    p = torch.tensor([[0.0, 0.3, 0.7], [0.0, 0.0, 0.0]])
    for fake in (log2_fake, uniform_fake):
        values = fake(p, num_bits)
        assert float(values[0, 0]) <= 0.7 * 2.0**-66
        assert float(values[1].max()) <= 1e-25
    assert float(log2_codes(p, row_max(p), num_bits).max()) <= 255, "codes fit uint8"


def test_log2_gradient_is_value_over_probability() -> None:
    """Straight through the rounding of the exponent: d(m 2^-e)/dp = p^/p with m fixed, 0 in the
    zeroed tail.
    """
    p = torch.tensor([[1.0, 0.3, 0.06, 1e-4]], requires_grad=True)
    largest = row_max(p).detach()
    log2_values(log2_codes(p, largest, 2), largest, 2).sum().backward()
    assert p.grad is not None
    expected = torch.tensor([[1.0, 0.25 / 0.3, 0.0, 0.0]])
    torch.testing.assert_close(p.grad, expected, rtol=1e-5, atol=1e-7)
