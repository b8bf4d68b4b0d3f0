"""Rounding in closed form, GPTQ (Frantar et al., ICLR 2023), on a given grid.

    minimize  sum_t w_t |(W - W^) x_t|^2 = tr((W - W^) H (W - W^)^T),    H = sum_t w_t x_t x_t^T

Columns are rounded one after the other; the error of each is spread over those not yet rounded, by
U with U^T U = H^-1 (Cholesky, upper): w_j -= (w_i - w^_i) U_ij / U_ii. Columns of large H_ii go
first. Scales and zero points are those of nearest rounding, so the artifact has the same layout;
with a diagonal H the codes are the same too. Callers provide H.
"""

from __future__ import annotations

import torch
from torch import Tensor

from varptq.quant.affine import Grid
from varptq.quant.quantizers import QUANTIZERS, Quantizer

# Share of the mean diagonal added to the diagonal, so that directions without input have no effect.
DAMPING = 0.01
# Number of columns whose errors are spread over the rest in one product.
BLOCK = 128


def inverse_factor(moments_II: Tensor, damping: float = DAMPING) -> Tensor:
    """U (I, I) float32, upper triangular, U^T U = (H + damping mean(diag H) 1)^-1.

    In float64; a column of zeros, an input that is always zero, is taken as independent of all.
    """
    moments = moments_II.double()
    diagonal = moments.diagonal()
    ridge = damping * float(diagonal.mean()) or 1.0
    damped = moments + ridge * torch.eye(len(moments), dtype=moments.dtype, device=moments.device)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped))
    return torch.linalg.cholesky(inverse, upper=True).float()


def gptq_codes(
    weight_OGg: Tensor,
    grid: Grid,
    num_bits: int,
    moments_II: Tensor,
    damping: float = DAMPING,
    quantizer: Quantizer = QUANTIZERS["affine"],
) -> Tensor:
    """Integer-valued codes (O, G, g) float32 of a weight (O, G, g) float32.

    grid: scale and zero point (O, G, 1); moments_II (I, I), I = G g, the H above. quantizer: who
    is asked for the nearest code of a value, and for the value of a code.
    """
    group = weight_OGg.shape[-1]
    order = moments_II.diagonal().argsort(descending=True, stable=True)
    factor = inverse_factor(moments_II[order][:, order], damping)
    # Input channels first, so that a column of the weight is contiguous in memory.
    left, scale, zero_point = (
        part.expand_as(weight_OGg).flatten(1).T[order].clone() for part in (weight_OGg, *grid)
    )
    codes = torch.empty_like(left)
    for start in range(0, len(left), BLOCK):
        end = min(start + BLOCK, len(left))
        errors = torch.empty_like(left[start:end])
        for i in range(start, end):
            column = Grid(scale[i], zero_point[i])
            codes[i] = quantizer.codes(left[i], column, num_bits)
            error = (left[i] - quantizer.values(codes[i], column, num_bits)) / factor[i, i]
            left[i + 1 : end] -= torch.outer(factor[i, i + 1 : end], error)
            errors[i - start] = error
        left[end:] -= factor[start:end, end:].T @ errors
    found = torch.empty_like(codes)
    found[order] = codes
    return found.T.unflatten(1, (-1, group)).contiguous()


def quadratic_loss(error_OI: Tensor, moments_II: Tensor) -> float:
    """tr(E H E^T) of a weight error E (O, I), in float64: what GPTQ minimizes."""
    error = error_OI.double()
    return float(((error @ moments_II.double()) * error).sum())
