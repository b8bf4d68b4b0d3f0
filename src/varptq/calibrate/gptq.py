"""Rounding in closed form, GPTQ (Frantar et al., ICLR 2023), on a given grid.

    minimize  sum_t w_t |(W - W^) x_t|^2 = tr((W - W^) H (W - W^)^T),    H = sum_t w_t x_t x_t^T

Columns are rounded one after the other; the error of each is spread over those not yet rounded, by
U with U^T U = H^-1 (Cholesky, upper): w_j -= (w_i - w^_i) U_ij / U_ii. Columns of large H_ii go
first. On even steps scales and zero points are those of nearest rounding; with a diagonal H the
codes are the same too. A codebook is solved at two sizes of every row's scales, the better is kept
and then fitted: s <w, H v> / <v, H v>, v the row's values. Callers provide H.

Where the layers before are quantized, x is not what the float layer read, x'. What it gave is
fitted by W' = W C (H + d)^-1 in place of W, C = sum_t w_t x'_t x_t^T and d the damping (the
asymmetric calibration of GPTAQ, Li et al. 2025, in one step for all columns).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from varptq.quant.affine import LEAST_SCALE, Grid
from varptq.quant.quantizers import QUANTIZERS, Quantizer

# Share of the mean diagonal added to the diagonal, so that directions without input have no effect.
DAMPING = 0.01
# Number of columns whose errors are spread over the rest in one product.
BLOCK = 128
# Scales that a codebook is tried on, in units of those of nearest rounding.
TRIED = (0.95, 1.05)


def _damped(moments: Tensor, damping: float) -> Tensor:
    """H + damping mean(diag H) 1, positive definite; a copy in float64."""
    damped = moments.to(torch.float64, copy=True)
    diagonal = damped.diagonal()
    diagonal.add_(damping * float(diagonal.mean()) or 1.0)
    return damped


def corrected(
    weight_OI: Tensor, moments_II: Tensor, cross_II: Tensor, damping: float = DAMPING
) -> Tensor:
    """W + W (C - H)(H + d)^-1, the weight whose product with x is nearest to W x'. In float64,
    returned in the dtype of the weight."""
    weight, moments = weight_OI.double(), moments_II.double()
    factor = torch.linalg.cholesky(_damped(moments, damping))
    missed = weight @ (cross_II.double() - moments)
    return (weight + torch.cholesky_solve(missed.T, factor).T).to(weight_OI.dtype)


def inverse_factor(moments_II: Tensor, damping: float = DAMPING) -> Tensor:
    """U (I, I) float32, upper triangular, U^T U = (H + damping mean(diag H) 1)^-1.

    In float64; a column of zeros, an input that is always zero, is taken as independent of all.
    """
    # A wide layer's matrices are gigabytes, so each is let go as soon as the next is there.
    damped = _damped(moments_II, damping)
    del moments_II
    lower = torch.linalg.cholesky(damped)
    del damped
    inverse = torch.cholesky_inverse(lower)
    del lower
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


class Solved(NamedTuple):
    """Codes (O, G, g), integer-valued float32, and their grid (O, G, 1)."""

    codes: Tensor
    grid: Grid


def solved_rows(
    weight_OGg: Tensor, grid: Grid, num_bits: int, moments_II: Tensor, quantizer: Quantizer
) -> Solved:
    """GPTQ as a quantizer wants it: on the grid as it is, or with a search for the rows' scales
    where values are entries of a table. Arguments as of `gptq_codes`."""
    if quantizer.table is None:
        codes = gptq_codes(weight_OGg, grid, num_bits, moments_II, quantizer=quantizer)
        return Solved(codes, grid)
    # All sizes at once, as rows of one problem (2 O, G, g).
    tried = Grid(
        torch.cat([grid.scale * factor for factor in TRIED]),
        grid.zero_point.repeat(len(TRIED), 1, 1),
    )
    weight = weight_OGg.repeat(len(TRIED), 1, 1)
    codes = gptq_codes(weight, tried, num_bits, moments_II, quantizer=quantizer)
    values = quantizer.values(codes, tried, num_bits).flatten(1).double()
    weight, moments = weight.flatten(1).double(), moments_II.double()
    error = weight - values
    losses = ((error @ moments) * error).sum(-1).view(len(TRIED), -1)
    outputs = len(weight_OGg)
    best_O = losses.argmin(0) * outputs + torch.arange(
        outputs, dtype=torch.int64, device=losses.device
    )
    weighted = values[best_O] @ moments
    energy_O = (weighted * values[best_O]).sum(-1)
    share_O = (weighted * weight[best_O]).sum(-1)
    # Rows of zeros, and inputs that are always zero, leave nothing to fit.
    fits = (energy_O > 0) & (share_O > 0)
    factor_O = torch.where(fits, share_O / energy_O.where(fits, 1.0), 1.0)
    scale = tried.scale[best_O]
    fitted = (scale.double() * factor_O.view(-1, 1, 1)).float()
    # A scale is 0 or a normal float.
    fitted = torch.where(fitted >= LEAST_SCALE, fitted, scale)
    return Solved(codes[best_O], Grid(fitted, grid.zero_point))


def quadratic_loss(error_OI: Tensor, moments_II: Tensor) -> float:
    """tr(E H E^T) of a weight error E (O, I), in float64: what GPTQ minimizes."""
    error = error_OI.double()
    return float(((error @ moments_II.double()) * error).sum())
