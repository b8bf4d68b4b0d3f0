"""Two models asked for the same images with the same seeds: how alike the answers are.

    token_agreement = share of equal ids          psnr = 10 log10(255^2 / mean squared error)
Both sample freely, so one different token changes all that follows: read these beside
`tokens.token_fidelity`, which compares under the same context. Neither says which image is better.
"""

from __future__ import annotations

import math

import numpy as np
from torch import Tensor

from varptq.errors import InputError
from varptq.pictures import Pixels


def token_agreement(first_BL: Tensor, second_BL: Tensor) -> float:
    """Share of equal ids of two (B, L) int64 tensors. Raises `InputError` for unequal shapes."""
    if first_BL.shape != second_BL.shape:
        raise InputError(
            f"tokens: shapes {tuple(first_BL.shape)} and {tuple(second_BL.shape)}, expected equal"
        )
    return float((first_BL.cpu() == second_BL.cpu()).double().mean())


def psnr(first: Pixels, second: Pixels) -> float:
    """Peak signal-to-noise ratio in dB of two (B, H, W, 3) uint8 arrays, infinite for equal ones.

    One ratio from the error over all images, so that a pair of equal images does not make it
    infinite. Raises `InputError` for unequal shapes.
    """
    if first.shape != second.shape:
        raise InputError(f"images: shapes {first.shape} and {second.shape}, expected equal")
    error = float(np.square(first.astype(np.float64) - second).mean())
    return math.inf if error == 0 else 10 * math.log10(255**2 / error)
