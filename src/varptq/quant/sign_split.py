"""The sign-split quantizer: input of fc2, whose GELU has a short negative and a long positive side.

    s- = max(-min, 0) / L      s+ = max(max, 0) / L      L = 2^(b-1) - 1 levels per side
    q  = clamp(round(x / s-), -L, 0) for x < 0, clamp(round(x / s+), 0, L) otherwise
    x^ = q s- or q s+

Scales are at least 1e-6, as in the released code: the input is what GELU makes, whose units no
rewriting of the model can change, so nothing that matters lies below. Zero is a code, so there is
no zero point; 2^b - 1 of the 2^b codes are used. Codes are always clamped (the released group
variant does not, which shows only through float rounding). Gradients as in affine.py.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from varptq.quant.affine import SCALE_FLOOR, Dims, round_ste_, wide


class SignGrid(NamedTuple):
    """Positive scales of the two sides, broadcastable to what they quantize, float32 or wider."""

    negative: Tensor
    positive: Tensor


def sign_split_levels(num_bits: int) -> int:
    """L: non-zero codes of each side."""
    return 2 ** (num_bits - 1) - 1


def sign_split_range(num_bits: int) -> range:
    """-L to L: the codes."""
    levels = sign_split_levels(num_bits)
    return range(-levels, levels + 1)


def sign_split_grid(x: Tensor, num_bits: int, dims: Dims = -1) -> SignGrid:
    """A scale per side and slice of x over `dims`, which stay as dimensions of size 1."""
    levels = sign_split_levels(num_bits)
    low, high = wide(x.amin(dims, keepdim=True)), wide(x.amax(dims, keepdim=True))
    return SignGrid((-low / levels).clamp(min=SCALE_FLOOR), (high / levels).clamp(min=SCALE_FLOOR))


def _side_codes(x: Tensor, grid: SignGrid, num_bits: int) -> tuple[Tensor, Tensor]:
    """Codes of the negative and of the positive side; each is 0 where x is on the other.

    At x = 0 relu passes no gradient and clamp(max=0) does, so it is counted once.
    """
    levels = sign_split_levels(num_bits)
    x = x.to(grid.positive.dtype)
    negative = round_ste_(x.clamp(max=0.0).div_(grid.negative)).clamp_(min=-levels)
    positive = round_ste_(x.relu() / grid.positive).clamp_(max=levels)
    return negative, positive


def sign_split_codes(x: Tensor, grid: SignGrid, num_bits: int) -> Tensor:
    """Codes of x, integer-valued floats in [-L, L], in the dtype of the grid."""
    negative, positive = _side_codes(x, grid, num_bits)
    return negative.add_(positive)


def sign_split_values(codes: Tensor, grid: SignGrid) -> Tensor:
    """The real values of signed codes (float or integer dtype), in the dtype of the grid."""
    negative = codes.clamp(max=0) * grid.negative
    return negative.add_(codes.clamp(min=0) * grid.positive)


def sign_split_fake(x: Tensor, num_bits: int, dims: Dims = -1) -> Tensor:
    """x on its own grid, same shape and dtype: the values of its codes.

    The sides are kept apart to the end, since a code 0 no longer tells which scale its gradient
    belongs to.
    """
    grid = sign_split_grid(x, num_bits, dims)
    negative, positive = _side_codes(x, grid, num_bits)
    return negative.mul_(grid.negative).add_(positive.mul_(grid.positive)).to(x.dtype)
