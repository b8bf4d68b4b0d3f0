"""PSNR, SSIM and equal tokens of pairs, against loops over pixels."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from varptq.errors import InputError
from varptq.evaluate.paired import psnr, ssim, token_agreement
from varptq.pictures import Pixels


def pixels(shape: tuple[int, ...], seed: int = 0) -> Pixels:
    return np.random.default_rng(seed).integers(0, 256, shape).astype(np.uint8)


def ssim_by_definition(first: Pixels, second: Pixels) -> float:
    """Window by window, with the weighted moments written out."""
    offsets = np.arange(11) - 5
    line = np.exp(-np.square(offsets) / (2 * 1.5**2))
    weights = np.outer(line, line) / np.outer(line, line).sum()
    values = []
    for a, b in zip(first.astype(float), second.astype(float), strict=True):
        for y in range(a.shape[0] - 10):
            for x in range(a.shape[1] - 10):
                for colour in range(3):
                    p = a[y : y + 11, x : x + 11, colour]
                    q = b[y : y + 11, x : x + 11, colour]
                    mean_p, mean_q = (weights * p).sum(), (weights * q).sum()
                    var_p = (weights * np.square(p - mean_p)).sum()
                    var_q = (weights * np.square(q - mean_q)).sum()
                    both = (weights * (p - mean_p) * (q - mean_q)).sum()
                    c1, c2 = 2.55**2, 7.65**2
                    brightness = (2 * mean_p * mean_q + c1) / (mean_p**2 + mean_q**2 + c1)
                    values.append(brightness * (2 * both + c2) / (var_p + var_q + c2))
    return float(np.mean(values))


@pytest.mark.parametrize("shape", [(1, 11, 11, 3), (2, 13, 17, 3)])
def test_ssim_is_its_definition(shape: tuple[int, ...]) -> None:
    first = pixels(shape)
    second = np.clip(first.astype(int) + pixels(shape, 1) // 4 - 20, 0, 255).astype(np.uint8)
    found = ssim(first, second)
    assert 0.5 < found < 1
    assert found == pytest.approx(ssim_by_definition(first, second), rel=1e-9)


def test_ssim_of_equal_and_of_opposite_images() -> None:
    images = pixels((3, 37, 32, 3))
    assert ssim(images, images) == pytest.approx(1.0, abs=1e-12)
    assert ssim(images, 255 - images) < 0
    black, white = np.zeros_like(images), np.full_like(images, 255)
    assert ssim(black, white) == pytest.approx(0, abs=1e-3)


def test_ssim_refuses_what_has_no_window() -> None:
    with pytest.raises(InputError, match="at least 11 x 11"):
        ssim(pixels((1, 10, 32, 3)), pixels((1, 10, 32, 3)))
    with pytest.raises(InputError, match="expected equal ones"):
        ssim(pixels((1, 32, 32, 3)), pixels((2, 32, 32, 3)))


def test_psnr_takes_one_error_over_all_images() -> None:
    first = np.zeros((2, 4, 4, 3), dtype=np.uint8)
    second = first.copy()
    assert psnr(first, second) == math.inf
    second[1] = 10
    assert psnr(first, second) == pytest.approx(10 * math.log10(255**2 / 50))
    with pytest.raises(InputError, match="expected equal"):
        psnr(first, second[:1])


def test_token_agreement_counts_equal_ids() -> None:
    first = torch.tensor([[1, 2, 3], [4, 5, 6]])
    second = torch.tensor([[1, 0, 3], [0, 5, 0]])
    assert token_agreement(first, second) == 0.5
    with pytest.raises(InputError, match="expected equal"):
        token_agreement(first, second[:1])
