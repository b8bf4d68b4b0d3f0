"""How alike two models' images of the same classes and seeds are.

    token_agreement = share of equal ids          psnr = 10 log10(255^2 / mean squared error)
    ssim = mean over windows of alikeness in brightness, contrast and structure
Both sample freely, so one different token changes all that follows: read these beside
`tokens.token_fidelity`, which compares under the same context. None says which image is better;
the perceptual distance of a pair is `networks/lpips.py`.
"""

from __future__ import annotations

import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from varptq.errors import InputError
from varptq.pictures import Pixels

SSIM_WINDOW, SSIM_SIGMA = 11, 1.5


def token_agreement(first_BL: Tensor, second_BL: Tensor) -> float:
    """Share of equal ids of two (B, L) int64 tensors. Raises `InputError` for unequal shapes."""
    if first_BL.shape != second_BL.shape:
        raise InputError(
            f"tokens: shapes {tuple(first_BL.shape)} and {tuple(second_BL.shape)}, expected equal"
        )
    return float((first_BL.cpu() == second_BL.cpu()).double().mean())


def psnr(first: Pixels, second: Pixels) -> float:
    """Peak signal-to-noise ratio in dB of two (B, H, W, 3) uint8 arrays, infinite for equal ones.

    The ratio is computed from the error over all images, so that one pair of equal images does not
    make it infinite. Raises `InputError` for unequal shapes.
    """
    if first.shape != second.shape:
        raise InputError(f"images: shapes {first.shape} and {second.shape}, expected equal")
    error = float(np.square(first.astype(np.float64) - second).mean())
    return math.inf if error == 0 else 10 * math.log10(255**2 / error)


def ssim(first: Pixels, second: Pixels) -> float:
    """Structural similarity of two (B, H, W, 3) uint8 arrays, mean over images; 1 for equal ones.

    Wang et al. 2004: Gaussian window of 11 x 11, sigma 1.5, only at positions where it fits; K1 =
    0.01, K2 = 0.03, peak 255; each colour channel on its own. Raises `InputError` for unequal
    shapes or images smaller than the window.
    """
    if first.shape != second.shape or min(first.shape[1:3]) < SSIM_WINDOW:
        raise InputError(
            f"images: shapes {first.shape} and {second.shape}, expected equal ones of at least "
            f"{SSIM_WINDOW} x {SSIM_WINDOW}"
        )
    return float(np.mean([_ssim(a, b) for a, b in zip(first, second, strict=True)]))


def _ssim(first: Pixels, second: Pixels) -> float:
    """One image at a time: five windowed maps in float64 of all images would not fit in memory."""
    a, b = (torch.from_numpy(x).permute(2, 0, 1).unsqueeze(1).double() for x in (first, second))
    mean_a, mean_b = _windowed(a), _windowed(b)
    var_a = _windowed(a * a) - mean_a.square()
    var_b = _windowed(b * b) - mean_b.square()
    covariance = _windowed(a * b) - mean_a * mean_b
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    alike = (2 * mean_a * mean_b + c1) * (2 * covariance + c2)
    return float((alike / ((mean_a**2 + mean_b**2 + c1) * (var_a + var_b + c2))).mean())


def _windowed(x: Tensor) -> Tensor:
    """(3, 1, H, W) float64 -> Gaussian-weighted means (3, 1, H - 10, W - 10)."""
    offsets = torch.arange(SSIM_WINDOW, dtype=torch.float64, device="cpu") - SSIM_WINDOW // 2
    weights = torch.exp(-offsets.square() / (2 * SSIM_SIGMA**2))
    weights /= weights.sum()
    return F.conv2d(F.conv2d(x, weights.view(1, 1, -1, 1)), weights.view(1, 1, 1, -1))
