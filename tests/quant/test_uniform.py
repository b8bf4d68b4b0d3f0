"""The uniform quantizer: the row maximum is a code, and values come back as their codes. What it
shares with the others is in test_quantizers.py."""

from __future__ import annotations

import pytest
import torch

from varptq.quant.uniform import uniform_codes, uniform_scale, uniform_values


@pytest.mark.parametrize("width", [1, 3, 37, 130])
@pytest.mark.parametrize("num_bits", range(2, 9))
def test_the_maximum_is_exact_and_values_come_back(num_bits: int, width: int) -> None:
    generator = torch.Generator().manual_seed(width)
    p = torch.randn(3, width, generator=generator).mul(3).softmax(-1)
    scale = uniform_scale(p, num_bits)
    codes = uniform_codes(p, scale, num_bits)
    assert bool((codes.amax(-1) == 2**num_bits - 1).all())
    values = uniform_values(codes, scale)
    torch.testing.assert_close(values.amax(-1), p.amax(-1), rtol=1e-6, atol=0)
    assert torch.equal(uniform_codes(values, scale, num_bits), codes)
