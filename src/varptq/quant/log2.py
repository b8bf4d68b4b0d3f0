"""Quantizers of attention probabilities, scaled by their row maximum m (method: section 2).

    log2      e = round(-log2(p / m)),    p^ = m 2^-e, and 0 where e >= 2^b
    uniform   q = round(p / s),           p^ = q s with s = m / (2^b - 1)

log2 has one value more than b bits hold (2^b powers and zero); the row maximum stays a float.
Which rule runs is the `type` of the TensorSpec. Gradients as in affine.py. Rows are the last
axis; nothing is renormalised.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from varptq.quant.affine import SCALE_FLOOR, round_ste_, wide
from varptq.quant.config import TensorSpec

# Keeps log2 and its gradient finite at p = 0, whose exponent is then 66: zero up to 6 bits, m
# 2^-66 above.
LOG2_SHIFT = 1e-20


def row_max(p: Tensor) -> Tensor:
    """Largest probability m of each row (..., 1), float32 or wider, at least 1e-6."""
    return wide(p.amax(-1, keepdim=True)).clamp(min=SCALE_FLOOR)


def log2_codes(p: Tensor, scale: Tensor, num_bits: int) -> Tensor:
    """Exponents of p (..., n) with scale (..., 1) = `row_max`: integer-valued floats in [0, 2^b].

    2^b means zero. They fit uint8 at every width, since no exponent is above 66.
    """
    ratio = (p.to(scale.dtype) / scale).add_(LOG2_SHIFT)
    return round_ste_(ratio.log2_().neg_()).clamp_(0, 2**num_bits)


def log2_values(codes: Tensor, scale: Tensor, num_bits: int) -> Tensor:
    """scale * 2^-code, exactly 0 for the code 2^b; codes float or integer, result as the scale."""
    power = codes.to(scale.dtype).neg()
    return torch.exp2(F.threshold(power, -(2.0**num_bits), -torch.inf, inplace=True)) * scale


def uniform_scale(p: Tensor, num_bits: int) -> Tensor:
    """Step of each row (..., 1), above zero also for rows of zeros."""
    return row_max(p) / (2**num_bits - 1)


def uniform_codes(p: Tensor, scale: Tensor, num_bits: int) -> Tensor:
    """Codes of p (..., n) on `uniform_scale` (..., 1): integer-valued floats in [0, 2^b - 1]."""
    return round_ste_(p.to(scale.dtype) / scale).clamp_(0, 2**num_bits - 1)


def uniform_values(codes: Tensor, scale: Tensor) -> Tensor:
    """code * scale; codes float or integer, result as the scale."""
    return codes * scale


def probability_fake(p: Tensor, spec: TensorSpec) -> Tensor:
    """p (..., n) after the rule `spec.type`, same shape and dtype."""
    if spec.type == "log2":
        scale = row_max(p)
        values = log2_values(log2_codes(p, scale, spec.num_bits), scale, spec.num_bits)
    else:
        assert spec.type == "uniform", "AttentionSpec admits no other rule for probabilities"
        scale = uniform_scale(p, spec.num_bits)
        values = uniform_values(uniform_codes(p, scale, spec.num_bits), scale)
    return values.to(p.dtype)
