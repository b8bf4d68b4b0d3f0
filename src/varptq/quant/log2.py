"""The log2 quantizer of attention probabilities, scaled by their row maximum m (method: section 2).

    e = round(-log2(p / m)),    p^ = m 2^-e, and 0 where e >= 2^b

It has one value more than b bits hold (2^b powers and zero); the row maximum stays a float.
Gradients as in affine.py. A row is a slice over `dims`; nothing is renormalised.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from varptq.quant.affine import Dims, round_ste_
from varptq.quant.uniform import row_max

# Keeps log2 and its gradient finite at p = 0, whose exponent is then 66: zero up to 6 bits, m
# 2^-66 above.
LOG2_SHIFT = 1e-20


def log2_range(num_bits: int) -> range:
    """0 to 2^b, which means zero."""
    return range(2**num_bits + 1)


def log2_scale(p: Tensor, num_bits: int, dims: Dims = -1) -> Tensor:
    """The value of the code 0 of each row of p, its maximum, at every width."""
    return row_max(p, dims)


def log2_codes(p: Tensor, scale: Tensor, num_bits: int) -> Tensor:
    """Exponents of p (..., n) with scale (..., 1) = `row_max`: integer-valued floats in [0, 2^b].

    They fit uint8 at every width, since no exponent is above 66.
    """
    ratio = (p.to(scale.dtype) / scale).add_(LOG2_SHIFT)
    return round_ste_(ratio.log2_().neg_()).clamp_(0, 2**num_bits)


def log2_values(codes: Tensor, scale: Tensor, num_bits: int) -> Tensor:
    """scale * 2^-code, exactly 0 for the code 2^b; codes float or integer, result as the scale."""
    power = codes.to(scale.dtype).neg()
    return torch.exp2(F.threshold(power, -(2.0**num_bits), -torch.inf, inplace=True)) * scale


def log2_fake(p: Tensor, num_bits: int, dims: Dims = -1) -> Tensor:
    """p as powers of two of its row maximum, same shape and dtype."""
    scale = log2_scale(p, num_bits, dims)
    return log2_values(log2_codes(p, scale, num_bits), scale, num_bits).to(p.dtype)
