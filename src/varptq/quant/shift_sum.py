"""Shift-and-sum: a grid 2^n times finer for values that get much attention (method: section 2).

The paper sums N = 2^n quantized copies of v, each shifted by a fraction of a step:

    code = clamp(mean of round(v/s + (2i+1)/(2N)) over i = -N/2 .. N/2-1, + z, 0, 2^b - 1)

By Hermite's identity the sum of the N roundings is one rounding on a grid N times finer, round(N
v/s), so that is the definition here: code = clamp(round(v / (s/N)) / N + z, 0, 2^b - 1), N = 1
being the plain quantizer. The two differ only where N v/s is exactly a half-integer, by one fine
step, and both then lie at distance s/(2N) from v. A code is a multiple of 1/N; times N it is one
integer of b + n bits, which is what a runtime on integers stores instead of N columns. The mean
is clamped, not the copies (the released code's order). Gradients as in affine.py.
"""

from __future__ import annotations

import torch
from torch import Tensor

from varptq.quant.affine import Grid, affine_values, round_ste_, wide
from varptq.quant.config import MAX_ORDER


def token_scores(p: Tensor) -> Tensor:
    """abar (..., L): the attention each key gets, averaged over the queries of a call; of p
    (..., l, L) before its quantization. At least float32, without gradient."""
    return wide(p.detach()).mean(dim=-2)


def orders(abar: Tensor, theta: float, max_order: int = MAX_ORDER) -> Tensor:
    """Kernel order n = clamp(ceil(log2(abar / theta)), 0, max_order), int64, shape of abar.

    abar is what `token_scores` gives. Written as the number of
    thresholds theta, 2 theta, 4 theta, ... that abar exceeds: the same integer without the
    rounding of log2 and of the division.
    """
    order = torch.zeros_like(abar, dtype=torch.int64)
    for n in range(max_order):
        order += abar > theta * 2**n
    return order


def copies_of(order: Tensor, dtype: torch.dtype) -> Tensor:
    """N = 2^n of each key as a float (..., L, 1) that broadcasts over channels; exact."""
    return torch.exp2(order.to(dtype)).unsqueeze(-1)


def shift_sum_codes(v: Tensor, grid: Grid, order: Tensor, num_bits: int) -> Tensor:
    """Codes of v (..., L, c) for order (..., L): floats that are multiples of 2^-n in [0, 2^b - 1].

    The grid is that of the plain quantizer, `affine_grid(v, num_bits, (-2, -1), ...)`;
    `affine_values` decodes.
    """
    copies = copies_of(order, grid.scale.dtype)
    fine = round_ste_(v.to(grid.scale.dtype) / (grid.scale / copies))
    return fine.div_(copies).add_(grid.zero_point).clamp_(0, 2**num_bits - 1)


def fixed_codes(
    v: Tensor, grid: Grid, order: Tensor, num_bits: int, max_order: int = MAX_ORDER
) -> Tensor:
    """Codes of v at `order` derived from one wider integer, as `shift_sum_codes` returns them.

    A cache whose codes never change holds u = 2^m (code - z) at the finest order m = max_order; a
    key of order n is read as u_n = floor((u + 2^(m-n-1)) / 2^(m-n)), a rounding shift. Rounding
    twice moves a code by one step of order n where the first rounding lands on a half.
    """
    finest = shift_sum_codes(v, grid, torch.full_like(order, max_order), num_bits)
    copies = copies_of(order, grid.scale.dtype)
    steps = (finest - grid.zero_point) * copies
    rounded = (steps.detach() + 0.5).floor()
    return (steps + (rounded - steps).detach()) / copies + grid.zero_point


def shift_sum_integers(v: Tensor, grid: Grid, order: Tensor, num_bits: int) -> Tensor:
    """N times the codes, int16 in [0, N (2^b - 1)]: a grid of step s/N and zero point N z a key."""
    codes = shift_sum_codes(v.detach(), grid, order, num_bits)
    return (codes * copies_of(order, codes.dtype)).to(torch.int16)


def shift_sum_fake(v: Tensor, grid: Grid, order: Tensor, num_bits: int) -> Tensor:
    """v (..., L, c) on the grids its orders (..., L) give it, same shape and dtype."""
    return affine_values(shift_sum_codes(v, grid, order, num_bits), grid).to(v.dtype)
