"""Quantizers of attention probabilities: exact powers of two, error bounds, zeros, gradients."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from varptq.quant.config import TensorSpec
from varptq.quant.probability import (
    log2_codes,
    log2_values,
    probability_fake,
    row_max,
    uniform_codes,
    uniform_scale,
    uniform_values,
)

BITS = range(2, 9)
LOG2 = {b: TensorSpec(num_bits=b, type="log2") for b in BITS}
UNIFORM = {b: TensorSpec(num_bits=b, type="uniform") for b in BITS}
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
    assert torch.equal(probability_fake(p, LOG2[num_bits]), p)


@settings(deadline=None)
@given(st.integers(2, 8), st.sampled_from([1, 3, 37, 130]), st.integers(0, 99))
def test_log2_error_is_half_a_power_and_the_tail_is_zero(
    num_bits: int, width: int, seed: int
) -> None:
    p = probabilities(3, width, seed, sharpness=6.0)
    largest = row_max(p)
    codes = log2_codes(p, largest, num_bits)
    values = log2_values(codes, largest, num_bits)
    assert torch.equal(values, probability_fake(p, LOG2[num_bits]))
    assert torch.equal(codes, codes.round())
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
    assert probability_fake(p, LOG2[2]).tolist() == [[1.0, 0.5, 0.25, 0.125, 0.0, 0.0]]


@pytest.mark.parametrize("num_bits", BITS)
def test_zeros(num_bits: int) -> None:
    """A zero, e.g. of a masked key, stays below float32's resolution of the row; a row of zeros
    is no NaN.
    """
    p = torch.tensor([[0.0, 0.3, 0.7], [0.0, 0.0, 0.0]])
    for spec in (LOG2[num_bits], UNIFORM[num_bits]):
        values = probability_fake(p, spec)
        assert float(values[0, 0]) <= 0.7 * 2.0**-66
        assert float(values[1].max()) <= 1e-25
    assert float(log2_codes(p, row_max(p), num_bits).max()) <= 255, "codes fit uint8"


@settings(deadline=None)
@given(st.integers(2, 8), st.sampled_from([1, 3, 37, 130]), st.integers(0, 99))
def test_uniform_error_is_half_a_step_and_the_maximum_exact(
    num_bits: int, width: int, seed: int
) -> None:
    p = probabilities(3, width, seed)
    scale = uniform_scale(p, num_bits)
    codes = uniform_codes(p, scale, num_bits)
    assert torch.equal(codes, codes.round())
    assert float(codes.min()) >= 0 and bool((codes.amax(-1) == 2**num_bits - 1).all())
    values = uniform_values(codes, scale)
    assert torch.equal(values, probability_fake(p, UNIFORM[num_bits]))
    assert bool(((values - p).abs() <= (0.5 + 1e-4) * scale).all())
    torch.testing.assert_close(values.amax(-1), p.amax(-1), rtol=1e-6, atol=0)
    assert torch.equal(uniform_codes(values, scale, num_bits), codes)


@pytest.mark.parametrize("spec", [LOG2[4], UNIFORM[8]])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_quantized_in_float32(spec: TensorSpec, dtype: torch.dtype) -> None:
    p = probabilities(3, 37, 1).to(dtype)
    fake = probability_fake(p, spec)
    assert fake.dtype == dtype
    assert torch.equal(fake, probability_fake(p.float(), spec).to(dtype))


@pytest.mark.parametrize("spec", [LOG2[2], LOG2[8], UNIFORM[8]])
def test_gradients_are_finite_at_zero_and_numbers_are_the_same(spec: TensorSpec) -> None:
    p = probabilities(3, 37, 2)
    p[0, :5] = 0.0
    tracked = p.clone().requires_grad_()
    values = probability_fake(tracked, spec)
    assert torch.equal(values.detach(), probability_fake(p, spec))
    values.sum().backward()
    assert tracked.grad is not None and bool(torch.isfinite(tracked.grad).all())


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
