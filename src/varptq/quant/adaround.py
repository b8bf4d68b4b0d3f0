"""Learned rounding of weights, AdaRound (Nagel et al. 2020; method: section 5).

    q = clamp(floor(w/s) + z + h(alpha), 0, 2^b - 1)
    h(alpha) = clamp(1.2 sigmoid(alpha) - 0.1, 0, 1)

alpha starts where h is the fractional part of w/s, so the soft weight starts as the float weight.
A regularizer drives h to 0 or 1; afterwards h becomes (alpha >= 0). Where values are entries e of a
table, not even steps, the choice is between neighbours and h starts as the share of the way:

    w = s (e_q + h(alpha) (e_(q+1) - e_q)),    e_q <= w/s < e_(q+1)

Pure functions; the training loop is elsewhere.
"""

from __future__ import annotations

import torch
from torch import Tensor

from varptq.quant.affine import Grid

# The stretch of the sigmoid to [GAMMA, ZETA], so that h reaches 0 and 1 at finite alpha.
GAMMA, ZETA = -0.1, 1.1


def floor_codes(w: Tensor, grid: Grid) -> Tensor:
    """floor(w / s) + z, the part of the codes that is not learned; not clamped yet."""
    return torch.floor(w / grid.scale) + grid.zero_point


def init_alpha(w: Tensor, grid: Grid) -> Tensor:
    """alpha for which h is the fractional part of w / s; finite for every finite w."""
    steps = w / grid.scale
    return alpha_of(steps - torch.floor(steps))


def alpha_of(fraction: Tensor) -> Tensor:
    """alpha for which h is this number in [0, 1]."""
    return -torch.log((ZETA - GAMMA) / (fraction - GAMMA) - 1)


def entries_below(w: Tensor, grid: Grid, table: Tensor) -> tuple[Tensor, Tensor]:
    """q in [0, 2^b - 2] and the share of the way from entry q to the next, in [0, 1]. table: (2^b,)
    float32, ascending."""
    steps = w / torch.where(grid.scale > 0, grid.scale, 1.0)
    above = torch.bucketize(steps.contiguous(), table, right=True)
    floor = (above - 1).clamp(0, len(table) - 2)
    low, high = table[floor], table[floor + 1]
    return floor.to(w.dtype), ((steps - low) / (high - low)).clamp(0, 1)


def entry_values(floor: Tensor, alpha: Tensor, grid: Grid, table: Tensor, *, hard: bool) -> Tensor:
    """Values between entry `floor` and the next; `hard`: one of the two, with the gradient of what
    lies between."""
    index = floor.long()
    low, high = table[index], table[index + 1]
    share = soft_target(alpha)
    if hard:
        share = share + ((alpha >= 0).to(share.dtype) - share).detach()
    return grid.scale * (low + share * (high - low))


def soft_target(alpha: Tensor) -> Tensor:
    """h(alpha) in [0, 1]; differentiable, with no gradient where it is clamped."""
    return (torch.sigmoid(alpha) * (ZETA - GAMMA) + GAMMA).clamp(0, 1)


def soft_codes(floor: Tensor, alpha: Tensor, num_bits: int) -> Tensor:
    """Fractional codes in [0, 2^b - 1] while alpha is learned; `floor` from `floor_codes`."""
    return (floor + soft_target(alpha)).clamp(0, 2**num_bits - 1)


def hard_codes(floor: Tensor, alpha: Tensor, num_bits: int) -> Tensor:
    """Integer-valued codes in [0, 2^b - 1] that alpha stands for: up where alpha >= 0."""
    return (floor + (alpha >= 0)).clamp(0, 2**num_bits - 1)


def straight_through_codes(floor: Tensor, alpha: Tensor, num_bits: int) -> Tensor:
    """The hard codes, with the gradient of the soft ones: what is trained is what is deployed."""
    soft = soft_target(alpha)
    hard = (alpha >= 0).to(soft.dtype)
    return (floor + (soft + (hard - soft).detach())).clamp(0, 2**num_bits - 1)


def regularizer(alpha: Tensor, beta: float) -> Tensor:
    """sum(1 - |2h - 1|^beta), a scalar: 0 when every h is 0 or 1."""
    return (1 - (2 * soft_target(alpha) - 1).abs().pow(beta)).sum()


def linear_beta(
    step: int, steps: int, start: float = 20.0, end: float = 2.0, warmup: float = 0.0
) -> float:
    """beta at `step` of `steps`: `start` in the warmup (a fraction), then linear to `end`."""
    first = warmup * steps
    if step < first or first >= steps:
        return start
    return end + (start - end) * max(0.0, 1 - (step - first) / (steps - first))
