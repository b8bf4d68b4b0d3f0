"""The uniform quantizer of attention probabilities: equal steps from 0 to the row maximum m
(method: section 2).

    q = round(p / s),    p^ = q s with s = m / (2^b - 1)

Zero is a code, so there is no zero point. Gradients as in affine.py. A row is a slice over `dims`;
nothing is renormalised.
"""

from __future__ import annotations

from torch import Tensor

from varptq.quant.affine import SCALE_FLOOR, Dims, round_ste_, wide


def row_max(p: Tensor, dims: Dims = -1) -> Tensor:
    """Largest probability m of each row (..., 1), float32 or wider, at least 1e-6."""
    return wide(p.amax(dims, keepdim=True)).clamp(min=SCALE_FLOOR)


def uniform_scale(p: Tensor, num_bits: int, dims: Dims = -1) -> Tensor:
    """Step of each row (..., 1), above zero also for rows of zeros."""
    return row_max(p, dims) / (2**num_bits - 1)


def uniform_codes(p: Tensor, scale: Tensor, num_bits: int) -> Tensor:
    """Codes of p (..., n) on `uniform_scale` (..., 1): integer-valued floats in [0, 2^b - 1]."""
    return round_ste_(p.to(scale.dtype) / scale).clamp_(0, 2**num_bits - 1)


def uniform_values(codes: Tensor, scale: Tensor) -> Tensor:
    """code * scale; codes float or integer, result as the scale."""
    return codes * scale


def uniform_fake(p: Tensor, num_bits: int, dims: Dims = -1) -> Tensor:
    """p on the steps of its rows, same shape and dtype."""
    scale = uniform_scale(p, num_bits, dims)
    return uniform_values(uniform_codes(p, scale, num_bits), scale).to(p.dtype)
